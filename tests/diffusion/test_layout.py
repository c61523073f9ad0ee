"""Where tensors lie: aligned, without waste, and the same for whoever computes it."""

import hypothesis
import msgspec
import pytest
import torch
from hypothesis import strategies as st

from hwcore.diffusion import Layout, layout_of
from hwcore.diffusion.layout import LARGE_BYTES, check_layout, layout_by
from hwcore.diffusion.specs import DTYPES, MAX_TENSORS, TensorSpec, check_spec
from hwcore.errors import ArgumentTypeError, ArgumentValueError

from ._tensors import shapes

SIZES = st.one_of(st.integers(0, 300), st.integers(LARGE_BYTES - 20, 3 * LARGE_BYTES))
SPECS = st.lists(st.tuples(st.sampled_from(sorted(DTYPES)), SIZES), max_size=40)
QUICK = hypothesis.settings(deadline=None)  # other work may have the core


def layout(specs):
    return layout_by([TensorSpec(dtype, (size,)) for dtype, size in specs], range(len(specs)))


@hypothesis.given(SPECS)
@QUICK
def test_places_are_aligned_to_what_kernels_ask_for(specs):
    for entry in layout(specs).places():
        assert entry.offset % DTYPES[entry.dtype].itemsize == 0
        if entry.size_bytes >= LARGE_BYTES:
            assert entry.offset % 64 == 0
        elif entry.size_bytes % 16 == 0:
            assert entry.offset % 16 == 0


@hypothesis.given(SPECS)
@QUICK
def test_places_do_not_overlap_and_end_at_the_size(specs):
    made, end = layout(specs), 0
    for entry in made.places():
        assert entry.offset >= end
        end = entry.offset + entry.size_bytes
    assert made.size_bytes == end


@hypothesis.given(SPECS)
@QUICK
def test_padding_is_below_two_percent_whatever_the_tensors(specs):
    made = layout(specs)
    assert made.size_bytes <= 1.016 * sum(entry.size_bytes for entry in made.entries)


@hypothesis.given(SPECS)
@QUICK
def test_gaps_are_the_bytes_of_no_tensor(specs):
    made = layout(specs)
    spans = [(e.offset, e.offset + e.size_bytes) for e in made.places()] + made.gaps()
    end = 0
    for start, stop in sorted(spans):
        assert (start, stop > start) == (end, True)
        end = stop
    assert end == made.size_bytes


def test_a_thousand_small_tensors_lie_without_a_gap():
    assert layout([("uint8", 64)] * 1000).size_bytes == 64_000


@hypothesis.given(SPECS)
@QUICK
def test_small_tensors_alone_lie_without_a_gap(specs):
    small = [(name, size) for name, size in specs if size * DTYPES[name].itemsize < LARGE_BYTES]
    assert layout(small).gaps() == []


def test_entries_keep_the_order_of_the_tensors():
    tensors = [torch.zeros(3, dtype=torch.int8), torch.zeros(5000), torch.zeros(4)]
    made = layout_of(tensors)
    assert [entry.shape for entry in made.entries] == [(3,), (5000,), (4,)]
    assert [entry.offset for entry in made.entries] == [20016, 0, 20000]


def test_it_is_computed_without_a_look_at_values_on_any_device(hw, late):
    assert layout_of(list(shapes(hw.device()).values())) == layout_of(list(shapes("cpu").values()))


def test_dense_tensors_keep_their_strides():
    made = shapes("cpu")
    wanted = {"channels last": (120, 1, 30, 3), "transposed": (1, 10)}
    for name, strides in wanted.items():
        assert layout_of([made[name]]).entries[0].strides == strides
    for name in made.keys() - wanted.keys():
        assert layout_of([made[name]]).entries[0].strides is None, name


def test_an_expanded_tensor_takes_the_bytes_of_its_elements():
    assert layout_of([torch.zeros(1).expand(10, 10)]).size_bytes == 400


def test_the_same_elements_have_one_place():
    x = torch.zeros(100)
    made = layout_of([x, x, x.view(100), x[:50], x.view(10, 10)])
    first, again, view, part, other = made.entries
    assert first == again == view
    assert len({entry.offset for entry in (first, part, other)}) == 3


def test_a_conjugate_is_not_its_base():
    x = torch.zeros(4, dtype=torch.complex64)
    assert len(layout_of([x, x.conj()]).places()) == 2


class Wrapped(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: torch.zeros(3).as_subclass(Wrapped), "Wrapped"),
        (lambda: torch.zeros(3).to_sparse(), "torch.sparse_coo"),
        (lambda: torch.eye(3).to_sparse_csr(), "torch.sparse_csr"),
        (lambda: torch.empty(3, device="meta"), "meta"),
        (lambda: torch.empty(3, dtype=torch.uint4), "torch.uint4"),
        (lambda: torch._empty_affine_quantized([3], scale=1.0, dtype=torch.qint8), "torch.qint8"),
        (lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]), "nested"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse", "ignore:The PyTorch API of nested", "ignore:.*quant")
def test_what_cannot_be_sent_is_named_with_its_place(make, named):
    with pytest.raises(ArgumentTypeError, match=f"tensor 1 got .*{named}"):
        layout_of([torch.zeros(1), make()])


@pytest.mark.filterwarnings("ignore:ComplexHalf", "ignore:.*quantized")
def test_every_dtype_that_torch_can_clone_can_be_sent():
    for name in dir(torch):
        dtype = getattr(torch, name)
        if isinstance(dtype, torch.dtype):
            try:
                torch.empty(2, dtype=dtype).clone()
            except (RuntimeError, NotImplementedError):
                assert dtype not in DTYPES.values()
            else:
                assert dtype in DTYPES.values()


def test_more_tensors_than_a_message_may_have_are_refused():
    with pytest.raises(ArgumentValueError, match=f"at most {MAX_TENSORS} tensors"):
        layout_of([torch.zeros(1)] * (MAX_TENSORS + 1))


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        (TensorSpec("object", (1,)), "dtype of tensor 0"),
        (TensorSpec("uint8", (-1,)), "shape"),
        (TensorSpec("uint8", (-1, -1)), "shape"),
        (TensorSpec("uint8", (2**63,)), "shape"),
        (TensorSpec("uint8", (2**40, 2**40)), "shape"),  # 0 in 64 bits
        (TensorSpec("uint8", (2**62, 0, 2**62)), "shape"),
        (TensorSpec("uint8", (1,) * 65), "rank"),
        (TensorSpec("float32", (26,)), "bytes"),
        (TensorSpec("uint8", (2, 3), (3,)), "strides"),
        (TensorSpec("uint8", (2, 3), (4, 1)), "strides"),
        (TensorSpec("uint8", (2, 3), (0, 1)), "strides"),
        (TensorSpec("uint8", (2, 3), (-3, 1)), "strides"),
        (TensorSpec("uint8", (1, 3), (2**62, 1)), "strides"),
        (TensorSpec("uint8", (0, 3), (3, 1)), "strides"),
    ],
)
def test_a_tensor_that_cannot_be_is_refused(spec, named):
    with pytest.raises(ArgumentValueError, match=named):
        check_spec("test", 0, spec, 100)


@pytest.mark.parametrize("offset", [-64, 1, 4096, 2**70])
def test_a_layout_with_a_moved_tensor_is_refused(offset):
    made = layout_of([torch.zeros(3000), torch.zeros(3)])
    moved = msgspec.structs.replace(made.entries[1], offset=offset)
    with pytest.raises(ArgumentValueError, match=r"entries\[1\].offset"):
        check_layout(Layout(made.size_bytes, (made.entries[0], moved)), 1 << 20)


def test_a_layout_whose_tensors_overlap_is_refused():
    made = layout_of([torch.zeros(3000), torch.zeros(1000)])
    onto = msgspec.structs.replace(made.entries[1], offset=0)
    with pytest.raises(ArgumentValueError, match=r"entries\[1\].offset"):
        check_layout(Layout(made.size_bytes, (made.entries[0], onto)), 1 << 20)


@pytest.mark.parametrize("size_bytes", [0, 11, 13, -1, 2**70])
def test_a_layout_of_another_size_is_refused(size_bytes):
    made = layout_of([torch.zeros(3)])
    with pytest.raises(ArgumentValueError, match="size_bytes"):
        check_layout(Layout(size_bytes, made.entries), 1 << 20)


def test_a_layout_larger_than_the_memory_is_refused():
    made = layout_of([torch.zeros(30), torch.zeros(30)])
    check_layout(made, 240)
    with pytest.raises(ArgumentValueError, match="at most 239 bytes"):
        check_layout(made, 239)


@hypothesis.given(SPECS)
@QUICK
def test_its_own_layouts_are_not_refused(specs):
    made = layout(specs)
    check_layout(made, made.size_bytes)
