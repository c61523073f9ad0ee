"""Frames of a message: what is packed is what is unpacked, and no byte is taken on trust."""

import contextlib
import ctypes
import gc
import types
import weakref

import hypothesis
import msgspec
import pytest
import torch
from hypothesis import strategies as st

import hwcore
from hwcore.diffusion import TensorWrapper, pack_tensors, unpack_tensors
from hwcore.diffusion.manifest import MAX_ENCODED_BYTES, decode_manifest
from hwcore.errors import ArgumentTypeError, ArgumentValueError

from ._tensors import bits, dtypes, filled, same, shapes

pytestmark = pytest.mark.usefixtures("hw")


def received(tree, device=None, kind=bytearray):
    return unpack_tensors([kind(frame) for frame in pack_tensors(tree)], device)


@pytest.fixture(params=["host", "device"])
def where(hw, request):
    return torch.device("cpu") if request.param == "host" else hw.device()


# --- Round trips ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", dtypes(), ids=str)
@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_every_dtype_arrives(dtype, where):
    sent = [filled(dtype, shape, where) for shape in ((), (0,), (3,), (5, 1000))]
    for got, wanted in zip(received(sent), sent, strict=True):
        same(got, wanted)


@pytest.mark.parametrize("shape", shapes("cpu").keys())
def test_every_way_to_lie_in_memory_arrives(shape, where):
    sent = shapes(where)[shape]
    same(received([sent])[0], sent)


def test_dense_tensors_arrive_with_their_strides(where):
    for shape in ("channels last", "transposed"):
        sent = shapes(where)[shape]
        assert received([sent])[0].stride() == sent.stride()


def test_trees_arrive_with_their_tensors_in_place(where):
    x = torch.arange(6, device=where)
    tree = {"a": [None, x, (x + 1, {"b": 2.5})], 3: "text", "none": None, "empty": []}
    got = received(tree)
    assert [got["a"][0], got[3], got["none"], got["empty"]] == [None, "text", None, []]
    same(got["a"][1], x)
    same(got["a"][2][0], x + 1)
    assert got["a"][2][1] == {"b": 2.5}


def test_a_tensor_that_is_there_twice_arrives_as_one(where):
    x, y = torch.arange(2000, device=where), torch.arange(3, device=where)
    frames = pack_tensors([x, y, {"again": x}, y.view(3)])
    got = unpack_tensors([bytearray(frame) for frame in frames])
    assert got[0] is got[2]["again"]
    assert got[1] is got[3]
    assert sum(frame.nbytes for frame in frames[1:]) == 16_000 + 24


TENSORS = st.builds(
    filled,
    st.sampled_from([torch.bool, torch.uint8, torch.bfloat16, torch.float8_e5m2, torch.complex128]),
    st.lists(st.integers(0, 12), max_size=4).map(tuple),
    seed=st.integers(0, 9),
)


@hypothesis.given(st.lists(TENSORS, max_size=12), st.booleans(), st.booleans())
@hypothesis.settings(deadline=None, max_examples=60)
def test_any_tensors_arrive(tensors, transposed, on_device):
    device = hwcore.current_backend().device() if on_device else "cpu"
    sent = [(t.mT if transposed and t.dim() > 1 else t).to(device) for t in tensors]
    for got, wanted in zip(received(sent), sent, strict=True):
        same(got, wanted)


def test_what_streams_have_not_written_yet_arrives(hw, in_any_order):
    x = torch.zeros(3, 2000, device=hw.device())
    x += 1
    same(received([x, x[0, :5]])[0], torch.ones(3, 2000))


# --- Frames ---------------------------------------------------------------------------------------


def test_a_large_tensor_of_the_host_is_sent_from_where_it_is():
    x = torch.arange(5000).to(memory_format=torch.contiguous_format)
    frame = memoryview(pack_tensors([x])[1])
    x[7] = -1
    assert frame.cast("B").cast("q")[7] == -1


def test_small_tensors_share_a_frame():
    frames = pack_tensors([torch.zeros(16)] + [torch.full((16,), float(n)) for n in range(999)])
    assert len(frames) == 2
    wire = sum(memoryview(frame).nbytes for frame in frames)
    assert wire <= 1.02 * 1000 * 64


def test_a_tree_without_tensors_is_one_frame():
    assert len(pack_tensors({"a": 1})) == 1
    assert received({"a": 1}) == {"a": 1}


def test_frames_that_may_be_written_are_not_copied():
    frames = [bytearray(frame) for frame in pack_tensors([torch.zeros(5000), torch.zeros(3)])]
    large, small = unpack_tensors(frames)
    large[0], small[0] = 1, 2
    assert frames[2][:4] == frames[1][:4].replace(b"\0@", b"\x80?") == b"\0\0\x80?"


def test_frames_that_may_not_be_written_are_copied():
    frames = [bytes(frame) for frame in pack_tensors([torch.zeros(5000)])]
    unpack_tensors(frames)[0].fill_(1)
    assert not any(frames[1])


def test_a_frame_that_is_not_aligned_is_copied():
    frames = [bytes(frame) for frame in pack_tensors([torch.arange(5000)])]
    shifted = memoryview(bytearray(b"." + frames[1]))[1:]
    got = unpack_tensors([frames[0], shifted])[0]
    assert got.data_ptr() % 16 == 0
    same(got, torch.arange(5000))


def test_a_frame_cannot_be_resized_under_its_tensors():
    frames = [bytearray(frame) for frame in pack_tensors([torch.arange(5000)])]
    got = unpack_tensors(frames)
    with pytest.raises(BufferError):
        frames[1].extend(b"more")
    del got
    gc.collect()
    frames[1].extend(b"more")


def test_tensors_asked_for_on_a_device_have_memory_of_their_own(hw):
    frames = [bytearray(frame) for frame in pack_tensors([torch.zeros(5000), torch.zeros(3)])]
    got = unpack_tensors(frames, hw.device())
    for frame in frames[1:]:
        frame[:] = b"\xff" * len(frame)
    assert [t.device.type for t in got] == [hw.device().type] * 2
    assert not any(t.any() for t in got)


def test_a_device_whose_memory_the_host_can_read_is_not_copied_from(hw):
    if hw.device().type == "cpu":
        pytest.skip(
            "the host's own memory; test_a_large_tensor_of_the_host_is_sent_from_where_it_is"
        )
    asked = []

    def needs_cpu_fallback(tensor, purpose):
        asked.append(purpose)
        return False

    names = ("current_stream", "synchronize_stream", "pin_memory")
    shared = types.SimpleNamespace(**{name: getattr(hw, name) for name in names})
    shared.needs_cpu_fallback = needs_cpu_fallback
    x = torch.zeros(5000, device=hw.device())
    x += 1
    frames = pack_tensors([x, x[:3]], backend=shared)
    assert asked == ["serialize"] * 2
    assert memoryview(frames[2]).obj is not None
    assert frames[2].ctypes.data == x.data_ptr()
    same(unpack_tensors([bytes(frame) for frame in frames])[0], torch.ones(5000))


# --- TensorWrapper --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", dtypes(), ids=str)
@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_a_wrapper_is_the_bytes_of_its_tensor(dtype):
    for shape in ((), (0, 2), (2, 3)):
        x = filled(dtype, shape)
        seen = memoryview(TensorWrapper(x))
        assert (seen.format, seen.ndim, seen.c_contiguous) == ("B", 1, True)
        assert list(seen) == bits(x)


def test_a_buffer_outlives_the_tensor_and_the_wrapper():
    x = torch.full((100_000,), 7, dtype=torch.uint8)
    lost = weakref.ref(x)
    seen = memoryview(TensorWrapper(x))
    del x
    gc.collect()
    torch.zeros(100_000, dtype=torch.uint8)  # would get the memory
    assert set(seen) == {7}
    del seen
    gc.collect()
    assert lost() is None


def test_a_tensor_cannot_be_resized_under_its_buffer():
    x = torch.zeros(10)
    wrapper = TensorWrapper(x)
    with pytest.raises(RuntimeError, match="not resizable"):
        x.resize_(10**6)
    assert len(memoryview(wrapper)) == 40


@pytest.mark.parametrize(
    ("make", "fix"),
    [
        (lambda: torch.zeros(3, 4).t(), r"\.contiguous\(\)"),
        (lambda: torch.zeros(3, dtype=torch.complex64).conj(), r"resolve_conj"),
        (lambda: torch.zeros(3).to_sparse(), "to_dense"),
        (lambda: torch.zeros(3, device="meta"), r"\.cpu\(\)"),
    ],
)
def test_a_wrapper_of_what_has_no_row_of_bytes_is_refused(make, fix):
    with pytest.raises(ArgumentValueError, match=fix):
        TensorWrapper(make())


def test_a_wrapper_of_no_tensor_is_refused():
    with pytest.raises(ArgumentTypeError, match="expected a tensor"):
        TensorWrapper([1])


# --- From anywhere --------------------------------------------------------------------------------

TREE = {"a": [torch.arange(3), torch.zeros(2000), torch.ones(5, dtype=torch.uint8)], "b": 1}


@pytest.mark.parametrize("change", ["drop", "add", "swap", "cut", "extend"])
def test_frames_that_do_not_fit_the_manifest_are_refused(change):
    frames = [bytes(frame) for frame in pack_tensors(TREE)]
    match change:
        case "drop":
            frames.pop()
        case "add":
            frames.append(b"")
        case "swap":
            frames[1:] = frames[:0:-1]
        case "cut":
            frames[1] = frames[1][:-1]
        case "extend":
            frames[2] += b"\0"
    with pytest.raises(ArgumentValueError):
        unpack_tensors(frames)


@pytest.mark.parametrize("frames", [[], b"abc", [object()], [b"\x94", 5], [b"", b""]])
def test_what_is_no_message_is_refused(frames):
    with pytest.raises((ArgumentTypeError, ArgumentValueError), match="unpack_tensors"):
        unpack_tensors(frames)


@pytest.mark.parametrize("seed", range(30))
def test_a_damaged_manifest_is_refused_or_read_as_another(seed):
    frames = [bytearray(frame) for frame in pack_tensors(TREE)]
    choice = torch.Generator().manual_seed(seed)
    for _ in range(40):
        head = bytearray(frames[0])
        at, value = torch.randint(0, 256, (2,), generator=choice).tolist()
        head[at % len(head)] = value
        with contextlib.suppress(ArgumentTypeError, ArgumentValueError):
            unpack_tensors([head, *frames[1:]])


def manifest(*parts):
    return msgspec.msgpack.encode(parts)


ONE = [[1, ["uint8", [4], None]]]


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (manifest(2, ["x", 1], ONE, [[0, 1]]), "version"),
        (manifest(1, ["x", 1], ONE), "an encoded Manifest"),
        (manifest(1, ["x", 1], ONE, [[0, 1]], "more"), "an encoded Manifest"),
        (manifest(1, ["x", 1], [[2**40, ["uint8", [0], None]]], [[0, 1]]), "counts of `specs`"),
        (manifest(1, ["x", 1], [[-1, ["uint8", [4], None]]], [[0, 1]]), "counts of `specs`"),
        (manifest(1, ["x", 1], ONE, [[0, 2**40]]), "counts of `which`"),
        (manifest(1, ["x", 1], ONE, [[0, 1]] * 65537), "counts of `which`"),
        (manifest(1, ["x", 1], ONE, [[1, 1]]), "which"),
        (manifest(1, ["x", 1], ONE, [[-1, 1]]), "which"),
        (manifest(1, ["x", 1], [[1, ["uint8", [101], None]]], [[0, 1]]), "bytes of tensor 0"),
        (manifest(1, ["x", 1], [[30, ["uint8", [4], None]]], [[0, 1]]), "size_bytes"),
        (manifest(1, ["x", 1], [[1, ["float32", [1.5], None]]], [[0, 1]]), "an encoded Manifest"),
        (b"\x91" * 100_000, "an encoded Manifest"),
        (b"\xc1", "an encoded Manifest"),
        (bytes(MAX_ENCODED_BYTES + 1), "bytes of the manifest"),
    ],
    ids=range(15),
)
def test_a_manifest_that_was_not_written_here_is_refused(data, named):
    with pytest.raises(ArgumentValueError, match=named):
        decode_manifest(data, 100)


def test_a_tree_of_more_plain_bytes_than_a_peer_reads_is_refused_by_the_sender():
    with pytest.raises(ArgumentValueError, match="into tensors"):
        pack_tensors([bytes(MAX_ENCODED_BYTES)])


def test_reading_a_frame_never_runs_off_its_end():
    page = ctypes.create_string_buffer(64)
    frames = [bytes(frame) for frame in pack_tensors([torch.zeros(16)])]
    with pytest.raises(ArgumentValueError, match="sizes of the frames"):
        unpack_tensors([frames[0], memoryview(page)[:60]])
