"""Accepted paths' KV entries are moved to the front."""

import pytest
import torch

from hwcore.errors import ArgumentTypeError, ArgumentValueError
from hwcore.speculative import move_kv


@pytest.fixture
def cache(hw):
    """Two layers of eight slots; an entry's numbers tell layer and slot."""
    layer, slot = torch.arange(2).view(2, 1, 1, 1), torch.arange(8).view(1, 8, 1, 1)
    return (10 * layer + slot).repeat(1, 1, 2, 3).to(torch.bfloat16).to(hw.device())


def moves(hw, *rows):
    return torch.tensor(rows, device=hw.device())


def slots_of(cache, layer=0):
    return cache[layer, :, 0, 0].tolist()


def test_each_requests_path_comes_to_the_front_in_every_layer(hw, cache):
    # Slots 0 to 3 and 4 to 7; the root's stands in past the end.
    src, dst = moves(hw, [0, 2, 3], [4, 7, 4]), moves(hw, [0, 1, 2], [4, 5, 4])
    move_kv(cache, src, dst, backend=hw)
    assert slots_of(cache) == [0, 2, 3, 3, 4, 7, 6, 7]
    assert slots_of(cache, 1) == [10, 12, 13, 13, 14, 17, 16, 17]


def test_an_entry_that_is_overwritten_has_been_read_before(hw, cache):
    move_kv(cache, moves(hw, [1, 2, 3]), moves(hw, [3, 1, 2]), backend=hw)
    assert slots_of(cache) == [0, 2, 3, 1, 4, 5, 6, 7]


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.bool, torch.float8_e5m2])
def test_a_cache_may_be_of_any_dtype(hw, dtype):
    kv = torch.tensor([0, 1, 1, 0], dtype=torch.uint8).to(dtype).view(1, 4, 1).to(hw.device())
    move_kv(kv, moves(hw, [0, 2]), moves(hw, [0, 3]), backend=hw)
    assert kv.cpu().to(torch.float32).flatten().tolist() == [0, 1, 1, 1]


def test_an_empty_batch_moves_nothing(hw, cache):
    none = moves(hw, *[[0, 0, 0]])[:0]
    move_kv(cache, none, none, backend=hw)
    assert slots_of(cache) == list(range(8))


@pytest.mark.parametrize("end", ["src", "dst"])
@pytest.mark.parametrize("slot", [-1, 8])
def test_a_slot_that_the_cache_does_not_have_is_named_and_nothing_moved(
    hw, cache, end, slot, monkeypatch
):
    monkeypatch.setenv("HWCORE_DEBUG", "1")  # on the CPU it is always looked at
    good, bad = moves(hw, [0, 1]), moves(hw, [0, slot])
    with pytest.raises(ArgumentValueError, match=rf"kv_{end}\[0, 1\] got {slot}.*from 0 to 7"):
        move_kv(cache, *((bad, good) if end == "src" else (good, bad)), backend=hw)
    assert slots_of(cache) == list(range(8))


@pytest.mark.parametrize(
    ("kind", "part", "change"),
    [
        (ArgumentTypeError, "kv got 3", {"kv": lambda kv: 3}),
        (ArgumentValueError, r"Pass kv.unsqueeze\(0\)", {"kv": lambda kv: kv[0, :, 0]}),
        (ArgumentTypeError, "kv_src", {"kv_src": lambda slots: slots.float()}),
        (ArgumentTypeError, "kv_src", {"kv_src": lambda slots: slots[0]}),
        (ArgumentValueError, "kv_dst", {"kv_dst": lambda slots: slots[:, :1]}),
    ],
)
def test_malformed_arguments_are_refused(hw, cache, kind, part, change):
    given = {"kv": cache, "kv_src": moves(hw, [0, 1]), "kv_dst": moves(hw, [0, 1])}
    given |= {name: changed(given[name]) for name, changed in change.items()}
    with pytest.raises(kind, match=part):
        move_kv(**given, backend=hw)
    assert slots_of(cache) == list(range(8))


def test_it_can_be_captured(hw, cache):
    graph, pool = hw.create_graph(), hw.graph_pool()
    src, dst = moves(hw, [0, 2]), moves(hw, [0, 1])
    hw.graph_capture(graph, lambda: move_kv(cache, src, dst, backend=hw), pool)
    src.copy_(moves(hw, [0, 3]))
    cache.copy_(torch.arange(8, device=hw.device()).view(1, 8, 1, 1))
    hw.graph_replay(graph)
    assert slots_of(cache) == [0, 3, 2, 3, 4, 5, 6, 7]
