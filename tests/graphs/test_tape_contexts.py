"""Where and how a tape may be used: modes, threads, memory, and misuse."""

import gc
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hwcore.errors import ArgumentTypeError, CaptureError
from hwcore.graphs.tape import Tape, is_capturing

from ._tapes import assert_replays_like_eager, captured

# --- Contexts of a replay -------------------------------------------------------------------


@pytest.mark.parametrize("around", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_replay_works_in_any_grad_mode_with_parameters(mode, around):
    weight = nn.Parameter(torch.randn(3, 3))
    x = torch.randn(2, 3)

    def fn():
        weight.mul_(0.5)
        return x @ weight

    tape, out = captured(fn, mode)
    expected = x @ (weight.detach() * 0.5)
    with around():
        tape.replay()
    assert torch.equal(out, expected)
    assert not out.requires_grad
    assert weight.requires_grad


def test_inference_tensors_may_be_captured_outside_inference_mode():
    with torch.inference_mode():
        weight = torch.randn(3, 3)
    x = torch.randn(2, 3)
    assert_replays_like_eager(lambda: F.linear(x, weight).reshape(-1), x.normal_)


def test_replay_works_from_another_thread():
    x = torch.zeros(3)
    tape, out = captured(lambda: x * 2, torch.inference_mode)
    x.fill_(1)
    thread = threading.Thread(target=tape.replay)
    thread.start()
    thread.join()
    assert out.tolist() == [2, 2, 2]


def test_autocast_around_a_replay_does_not_matter():
    # torch's own ops that autocast casts are repeated through out=, which it leaves alone.
    @torch.library.custom_op("hwcore_test::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    torch.library.register_autocast("hwcore_test::twice", "cpu", torch.bfloat16)
    x = torch.randn(8)
    tape, out = captured(lambda: twice(x))
    with torch.autocast("cpu", torch.bfloat16):
        tape.replay()
        assert torch.is_autocast_enabled("cpu")
        assert not torch.equal(twice(x), x * 2)
    assert torch.equal(out, x * 2)


def test_autocast_inside_a_capture_is_kept():
    a, b = torch.randn(8, 8), torch.randn(8, 8)

    def fn():
        with torch.autocast("cpu", torch.bfloat16):
            return a @ b

    assert_replays_like_eager(fn, a.normal_)


def test_replay_works_with_tensors_of_a_device_without_autocast():
    m = torch.empty(3, device="meta")
    tape, out = captured(lambda: m + 1)
    assert tape.replay() is out


RANDOM = {
    "rand": lambda x: torch.rand(4),
    "randn_like": torch.randn_like,
    "normal_": lambda x: torch.empty(4).normal_(),
    "multinomial": lambda x: torch.multinomial(x.softmax(-1), 2),
    "bernoulli": lambda x: torch.bernoulli(x.sigmoid()),
    "exponential race": lambda x: (x.softmax(-1) / torch.empty_like(x).exponential_(1)).argmax(-1),
    "dropout": lambda x: F.dropout(x, 0.5),
    "randperm": lambda x: torch.randperm(50),
}


@pytest.mark.parametrize("draw", RANDOM.values(), ids=RANDOM)
def test_random_op_replays_like_eager_from_the_same_seed(draw, mode):
    x = torch.randn(64)
    tape, out = captured(lambda: draw(x), mode)
    torch.manual_seed(5)
    tape.replay()
    first = out.clone()
    torch.manual_seed(5)
    with mode():
        assert torch.equal(first, draw(x))


def test_random_numbers_are_fresh_in_each_replay():
    tape, out = captured(lambda: torch.rand(8))
    seen = {tuple(out.tolist()), *(tuple(tape.replay().tolist()) for _ in range(3))}
    assert len(seen) == 4


def test_a_given_generator_advances():
    generator = torch.Generator().manual_seed(3)
    tape, out = captured(lambda: torch.rand(4, generator=generator))
    tape.replay()
    twin = torch.Generator().manual_seed(3)
    torch.rand(4, generator=twin)
    assert torch.equal(out, torch.rand(4, generator=twin))


def test_work_of_another_thread_is_not_recorded():
    x, other = torch.zeros(3), torch.zeros(3)
    inside, done = threading.Event(), threading.Event()
    seen = {}

    def work():
        inside.wait(10)
        other.add_(1)
        seen["value"] = other.tolist()  # a host read, free to do here
        seen["capturing"] = is_capturing()
        done.set()

    def fn():
        inside.set()
        assert done.wait(10)
        x.add_(1)

    thread = threading.Thread(target=work)
    thread.start()
    tape, _ = captured(fn)
    thread.join()
    tape.replay()
    assert seen == {"value": [1, 1, 1], "capturing": False}
    assert other.tolist() == [1, 1, 1]
    assert x.tolist() == [2, 2, 2]


# --- Memory ---------------------------------------------------------------------------------


def test_the_tape_keeps_its_tensors_alive():
    def build():
        x, y = torch.randn(1000), torch.randn(1000)
        tape, out = captured(lambda: (x + y) * 2)
        return tape, out, (x + y) * 2

    tape, out, expected = build()
    gc.collect()
    _overwritten = [torch.full((1000,), 9.0) for _ in range(20)]
    out.zero_()
    tape.replay()
    assert torch.equal(out, expected)


def test_close_releases_what_the_tape_holds():
    class Marked(list):
        pass

    x = torch.zeros(2)
    tape = captured(lambda: Marked([x + 1]))[0]
    output, step = weakref.ref(tape.replay()), weakref.ref(tape._steps[0])
    assert output() is not None
    tape.close()
    tape.close()
    gc.collect()
    assert output() is None
    assert step() is None


def test_ten_thousand_replays_take_no_more_memory():
    x = torch.randn(256)
    tape, _ = captured(lambda: F.layer_norm(x.relu() + 1, (256,)).topk(3))

    def resident_bytes():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    for _ in range(500):
        tape.replay()
    gc.collect()
    objects, before = len(gc.get_objects()), resident_bytes()
    for _ in range(10_000):
        tape.replay()
    gc.collect()
    assert len(gc.get_objects()) - objects < 100
    assert resident_bytes() - before < 4 << 20


# --- Misuse ---------------------------------------------------------------------------------


def test_replay_before_capture_says_to_capture():
    with pytest.raises(CaptureError, match=r"Tape\.replay: the tape is empty.*Call capture"):
        Tape().replay()


def test_a_second_capture_says_to_make_a_new_tape():
    tape, _ = captured(lambda: None)
    with pytest.raises(CaptureError, match=r"captured already.*Make a new Tape"):
        tape.capture(lambda: None)


def test_a_closed_tape_neither_replays_nor_captures():
    tape, _ = captured(lambda: None)
    tape.close()
    with pytest.raises(CaptureError, match="closed"):
        tape.replay()
    with pytest.raises(CaptureError, match=r"closed.*Make a new Tape"):
        tape.capture(lambda: None)


def test_capture_inside_capture_is_refused():
    with pytest.raises(CaptureError, match=r"Tape\.capture: was called inside a capture"):
        captured(lambda: Tape().capture(lambda: None))
    assert not is_capturing()


def test_replay_inside_capture_is_refused():
    tape, _ = captured(lambda: torch.zeros(2) + 1)
    with pytest.raises(CaptureError, match=r"Tape\.replay: was called inside a capture"):
        captured(tape.replay)


def test_fn_must_be_callable():
    with pytest.raises(ArgumentTypeError, match=r"Tape\.capture: fn got 3 \(int\)"):
        Tape().capture(3)


def test_an_output_that_autograd_tracks_is_refused():
    weight = nn.Parameter(torch.ones(3))
    tape = Tape()
    with pytest.raises(CaptureError, match=r"torch\.no_grad\(\) or torch\.inference_mode\(\)"):
        tape.capture(lambda: {"y": weight * 2})
    with torch.no_grad():
        tape.capture(lambda: {"y": weight * 2})


def test_a_parameter_handed_through_is_no_tracked_output():
    weight = nn.Parameter(torch.ones(3))
    tape, out = captured(lambda: weight)
    assert tape.replay() is out is weight


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_of_fn_propagates_and_leaves_the_tape_reusable(error):
    x = torch.zeros(3)

    def fails():
        x.add_(1)
        assert is_capturing()
        raise error

    tape = Tape()
    with pytest.raises(error):
        tape.capture(fails)
    assert not is_capturing()
    assert x.sum().item() == 3  # host reads are free again
    with pytest.raises(CaptureError, match="empty"):
        tape.replay()
    tape.capture(lambda: x.mul_(2))
    assert tape.replay().tolist() == [4, 4, 4]


def test_an_error_in_a_replay_propagates_and_leaves_the_tape_usable():
    table, index = torch.arange(4), torch.tensor([1])
    tape, out = captured(lambda: table.index_select(0, index))
    index.fill_(9)
    with pytest.raises(IndexError):
        tape.replay()
    index.fill_(2)
    assert tape.replay() is out
    assert out.tolist() == [2]


# --- What autograd does around a call ---------------------------------------------------------


@pytest.mark.parametrize("grad", [torch.no_grad, torch.enable_grad])
def test_calls_whose_result_autograd_keeps_may_be_captured(grad):
    weight = nn.Parameter(torch.tensor([-1.0, 2.0]))
    tape, out = captured(lambda: weight.relu().exp().detach(), grad)
    with torch.no_grad():
        weight.neg_()
    tape.replay()
    assert torch.equal(out, weight.detach().relu().exp())


def test_a_view_as_another_dtype_may_be_captured(mode):
    data = torch.zeros(8, dtype=torch.uint8)
    tape, out = captured(lambda: data.view(torch.float32) + 1, mode)
    data.copy_(torch.tensor([2.0, 3.0]).view(torch.uint8))
    tape.replay()
    assert out.tolist() == [3, 4]
