"""Containers and plain values arrive as what they were; nothing else gets in or out."""

import collections
import contextlib
import enum
import math
import struct

import hypothesis
import msgspec
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from hwcore.diffusion import EnumRegistry
from hwcore.diffusion.tree import MAX_DEPTH, MAX_NODES, flatten, unflatten
from hwcore.errors import ArgumentTypeError, ArgumentValueError

ENUMS = EnumRegistry()


@ENUMS.register
class Mode(enum.Enum):
    FAST = "fast"
    SLOW = "slow"


@ENUMS.register
class Level(enum.IntEnum):
    LOW = 1


@ENUMS.register
class Parts(enum.Flag):
    A = 1
    B = 2


def over_the_wire(tree, enums=ENUMS):
    structure, tensors = flatten(tree, enums)
    return unflatten(msgspec.msgpack.decode(msgspec.msgpack.encode(structure)), tensors, enums)


def exactly(value):
    """A value with the types of all its parts, and floats by their bits."""
    kind = type(value)
    if kind is dict:
        return kind, [(exactly(k), exactly(v)) for k, v in value.items()]
    if kind in (list, tuple):
        return kind, [exactly(item) for item in value]
    if kind is float:
        return kind, struct.pack("<d", value)
    if kind is complex:
        return kind, struct.pack("<dd", value.real, value.imag)
    if isinstance(value, np.generic):
        return kind, value.tobytes()
    if kind is torch.Tensor:
        return kind, id(value)
    return kind, value


KEYS = st.one_of(
    st.text(), st.integers(), st.booleans(), st.none(), st.binary(), st.sampled_from(Mode)
)
TENSORS = [torch.zeros(1), torch.ones(2)]
LEAVES = st.one_of(
    KEYS,
    st.floats(),
    st.complex_numbers(),
    st.integers(-(2**200), 2**200),
    st.sampled_from([Level.LOW, Parts.B]),
    st.sampled_from([np.float32(0.1), np.int8(-3), np.bool_(True), np.uint64(2**64 - 1)]),
    st.sampled_from([np.complex64(1j), np.float16("nan"), np.float64(-0.0)]),
    st.sampled_from(TENSORS),
)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=5),
        st.lists(inner, max_size=5).map(tuple),
        st.dictionaries(KEYS, inner, max_size=5),
    ),
    max_leaves=30,
)


@hypothesis.given(TREES)
@hypothesis.settings(deadline=None)
def test_a_tree_arrives_as_it_was(tree):
    assert exactly(over_the_wire(tree)) == exactly(tree)


@pytest.mark.parametrize(
    "value",
    [math.nan, math.inf, -math.inf, -0.0, 5e-324, 2**63, 2**64, -(2**63) - 1, 10**5000, (), [], {}],
    ids=lambda value: "long" if value == 10**5000 else str(value),
)
def test_values_at_the_edges_arrive(value):
    assert exactly(over_the_wire([value])) == exactly([value])


def test_a_list_that_looks_like_a_node_is_a_list():
    tree = [["x", 1], ["l"], ["e", "Mode", "FAST"], ["d", 1]]
    assert over_the_wire(tree) == tree


def test_a_thousand_tensors_take_a_few_bytes():
    structure, tensors = flatten({"latents": [torch.zeros(1)] * 1000})
    assert len(tensors) == 1000
    assert len(msgspec.msgpack.encode(structure)) < 24


Point = collections.namedtuple("Point", "x y")


@pytest.mark.parametrize(
    ("value", "fix"),
    [
        (Point(1, 2), r"Convert it with tuple\(\)"),
        (torch.Size([1]), r"Convert it with tuple\(\)"),
        (collections.OrderedDict(a=1), r"Convert it with dict\(\)"),
        (np.str_("a"), "Convert it"),
        (np.zeros(3), r"torch.from_numpy\(\)"),
        (np.longdouble(1), "Convert it"),
        ({1, 2}, "Convert it"),
        (object(), "Convert it"),
        (bytearray(b"a"), "Convert it"),
        (torch.float32, "Convert it"),
        (Parts.A | Parts.B, "a list of the flags"),
    ],
)
def test_what_would_arrive_as_something_else_is_named_with_its_place(value, fix):
    with pytest.raises(ArgumentTypeError, match=rf"tree\['a'\]\[1\] got .*{fix}"):
        flatten({"a": [None, value]}, ENUMS)


@pytest.mark.parametrize("key", [1.5, (1,), np.int64(1), np.str_("a")])
def test_a_key_that_could_be_taken_for_another_is_refused(key):
    with pytest.raises(ArgumentTypeError, match="a key in tree got"):
        flatten({key: 1})


def test_text_that_utf8_cannot_hold_is_refused():
    with pytest.raises(ArgumentValueError, match="surrogatepass"):
        flatten(["\ud800"])


def test_an_enum_must_be_registered_by_the_sender():
    with pytest.raises(ArgumentTypeError, match="Register Mode in the EnumRegistry"):
        flatten([Mode.FAST])


def test_an_enum_must_be_registered_by_the_receiver():
    structure, tensors = flatten([Mode.FAST], ENUMS)
    with pytest.raises(ArgumentValueError, match="an enum that is registered"):
        unflatten(structure, tensors)


def test_an_enum_may_have_another_class_on_the_other_side():
    theirs = EnumRegistry()
    other = theirs.register(enum.Enum("Other", {"FAST": 7}), name="Mode")
    structure, _ = flatten(Mode.FAST, ENUMS)
    assert unflatten(structure, [], theirs) is other.FAST


@pytest.mark.parametrize("kind", [Mode, enum.Enum("Mode", {"A": 1}), Mode.FAST, int, None])
def test_a_registry_takes_each_enum_and_name_once(kind):
    with pytest.raises((ArgumentTypeError, ArgumentValueError), match=r"EnumRegistry\.register"):
        ENUMS.register(kind)


def test_a_container_that_holds_itself_is_refused():
    tree = []
    tree.append(tree)
    with pytest.raises(ArgumentValueError, match=f"at most {MAX_DEPTH} containers"):
        flatten(tree)


def test_the_deepest_tree_arrives_and_a_deeper_one_does_not_leave():
    tree = 1
    for _ in range(MAX_DEPTH):
        tree = [tree]
    assert over_the_wire(tree) == tree
    with pytest.raises(ArgumentValueError, match="depth"):
        flatten([tree])


def test_a_tree_that_repeats_itself_too_often_is_refused():
    tree = [0]
    for _ in range(40):
        tree = [tree, tree]
    with pytest.raises(ArgumentValueError, match=f"at most {MAX_NODES} values"):
        flatten(tree)


def nested(depth):
    node = 1
    for _ in range(depth):
        node = ["l", node]
    return node


def refused(structure, tensors):
    with pytest.raises(ArgumentValueError, match="structure got"):
        unflatten(structure, tensors, ENUMS)


@pytest.mark.parametrize(
    "structure",
    [
        [],
        ["q"],
        [1],
        [["l"]],
        {"a": 1},
        ["l", ["x", 0]],
        ["x", 0],
        ["d", "a"],
        ["d", ["l"], 1],
        ["d", ["t"], 1],
        ["d", 1.5, 1],
        ["d", 1, 1, True, 2],
        ["d", "a", 1, "a", 2],
        ["i", b"1"],
        ["i", "12345678901"],
        ["c", 1, 2],
        ["c", 1.0],
        ["e", "Mode", "MEDIUM"],
        ["e", "Mode", "__class__"],
        ["e", "Mode"],
        ["e", 1, 2],
        ["e", ["l"], "FAST"],
        ["n", "|O", b"12345678"],
        ["n", "<f4", b"12345"],
        ["n", "<f4", b""],
        ["n", "<f4", 1],
        nested(MAX_DEPTH + 1),
        ["l", *[None] * MAX_NODES],
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_structure_that_was_not_written_here_is_refused(structure):
    refused(structure, [])


@pytest.mark.parametrize(
    "structure",
    [
        1,
        ["x", 1],
        ["l", ["x", 1]],
        ["l", ["x", 3]],
        ["l", ["x", 2**60]],
        ["l", ["x", -1], ["x", 3]],
        ["l", ["x", True], ["x", 1]],
        ["l", ["x", 2.0]],
        ["l", ["x", "2"]],
        ["l", ["x"], ["x", 2]],
        ["l", ["x", 2, 1]],
        ["l", ["x", 1, 1], ["x", 1]],
        ["d", "a", ["x", 2]],
        ["d", ["x", 1], ["x", 1]],
    ],
    ids=str,
)
def test_a_structure_of_other_tensors_than_there_are_is_refused(structure):
    refused(structure, TENSORS)


WIRE = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**63), 2**64 - 1),
        st.floats(),
        st.sampled_from(["l", "t", "d", "x", "i", "c", "e", "n", "Mode", "FAST", "<f4"]),
        st.binary(max_size=9),
    ),
    lambda inner: st.lists(inner, max_size=6),
    max_leaves=20,
)


@hypothesis.given(WIRE)
@hypothesis.settings(deadline=None)
def test_any_structure_is_read_or_refused_by_name(structure):
    with contextlib.suppress(ArgumentValueError):
        unflatten(structure, TENSORS, ENUMS)
