"""The tape against eager: what it repeats, what it refuses, and what it leaves alone."""

import copy
import gc
import linecache
import logging
import math
import operator
import pickle
import threading
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hwcore.errors import ArgumentTypeError, CaptureError
from hwcore.graphs.tape import Tape, is_capturing

MODES = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


@pytest.fixture(params=MODES)
def mode(request):
    return MODES[request.param]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def captured(fn, mode=torch.no_grad):
    tape = Tape()
    with mode():
        outputs = tape.capture(fn)
    return tape, outputs


def assert_replays_like_eager(fn, change, *, mode=torch.no_grad, rounds=3):
    """Capture, then compare replays with eager runs of fn on inputs changed each round."""
    tape, outputs = captured(fn, mode)
    for _ in range(rounds):
        change()
        tape.replay()
        got = [leaf.clone() for leaf in tree_leaves(outputs)]
        with mode():
            expected = tree_leaves(fn())
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b)


# --- Results --------------------------------------------------------------------------------


class Decoder(nn.Module):
    """One layer with a KV cache, and the ops that a serving step does around it."""

    def __init__(self, width=32, heads=4, slots=16):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width, bias=False)
        self.heads = heads
        self.register_buffer("keys", torch.zeros(slots, heads, width // heads))
        self.register_buffer("values", torch.zeros(slots, heads, width // heads))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x, where):
        q, k, v = self.qkv(self.norm(x)).view(len(x), 3, self.heads, -1).unbind(1)
        self.keys[where] = k
        self.values.index_put_((where,), v)
        attended = F.scaled_dot_product_attention(
            q.transpose(0, 1), self.keys.transpose(0, 1), self.values.transpose(0, 1)
        )
        hidden = x + self.out(F.silu(attended.transpose(0, 1).flatten(1)))
        self.steps.add_(1)
        top, index = torch.topk(hidden, 3)
        return {
            "hidden": hidden,
            "top": (top, index),
            "sorted": torch.sort(hidden, dim=-1),
            "sum": hidden.softmax(-1).cumsum(-1),
            "token": hidden.argmax(-1),
            "row": self.keys.index_select(0, where),
        }


def decoder(mode):
    layer = Decoder().eval()
    x, where = torch.randn(4, 32), torch.arange(4)
    tape, outputs = captured(lambda: layer(x, where), mode)
    return layer, x, where, tape, outputs


def test_a_decoder_layer_replays_like_eager_on_changed_inputs(mode):
    layer, x, where, tape, outputs = decoder(mode)
    for _ in range(4):
        x.normal_()
        where.copy_(torch.randperm(16)[:4])
        twin = copy.deepcopy(layer)
        tape.replay()
        with mode():
            expected = twin(x, where)
        # Eager may fuse across what the dispatcher sees as several ops.
        torch.testing.assert_close(outputs, expected)
        torch.testing.assert_close(layer.keys, twin.keys)
        torch.testing.assert_close(layer.values, twin.values)


def test_outputs_keep_their_addresses_over_replays(mode):
    _, x, _, tape, outputs = decoder(mode)
    addresses = [t.data_ptr() for t in tree_leaves(outputs)]
    x.normal_()
    again = tape.replay()
    assert again is outputs
    assert [t.data_ptr() for t in tree_leaves(again)] == addresses


def test_external_state_changes_once_each_replay():
    layer, _, _, tape, _ = decoder(torch.no_grad)
    assert layer.steps == 1  # the capture does the work too
    for _ in range(3):
        tape.replay()
    assert layer.steps == 4


def test_in_place_changed_weights_are_seen():
    layer, x, where, tape, outputs = decoder(torch.no_grad)
    with torch.no_grad():
        layer.out.weight.mul_(2)
        tape.replay()
        torch.testing.assert_close(outputs["hidden"], layer(x, where)["hidden"])


def test_fn_runs_once_in_capture_and_never_in_replay():
    calls = []
    tape, _ = captured(lambda: calls.append(1))
    tape.replay()
    assert calls == [1]


def test_outputs_without_tensors_come_back_as_they_were():
    tape, outputs = captured(lambda: {"a": [1, None], "b": "x"})
    assert outputs == {"a": [1, None], "b": "x"}
    assert tape.replay() is outputs


def test_an_input_returned_as_it_is_stays_the_input():
    x = torch.zeros(3)
    tape, out = captured(lambda: x)
    x.add_(1)
    assert tape.replay() is out is x
    assert out.tolist() == [1, 1, 1]


MATRIX = torch.randn(6, 6)
OPS = {
    "add": lambda x: x + 1,
    "mul scalar": lambda x: x * 2.5,
    "true_divide": lambda x: x / (x.abs() + 1),
    "pow": lambda x: x**2,
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "where of constants": lambda x: torch.where(x > 0, 1.0, 0.0),
    "clamp": lambda x: x.clamp(-1, 1),
    "rsqrt": lambda x: torch.rsqrt(x.abs() + 1),
    "silu": F.silu,
    "gelu": F.gelu,
    "softmax": lambda x: x.softmax(-1),
    "log_softmax": lambda x: x.log_softmax(0),
    "layer_norm": lambda x: F.layer_norm(x, (6,)),
    "rms_norm": lambda x: F.rms_norm(x, (6,)),
    "batch_norm": lambda x: F.batch_norm(x, torch.zeros(6), torch.ones(6), training=True),
    "mm": lambda x: x @ MATRIX,
    "bmm": lambda x: x.view(2, 3, 6) @ MATRIX,
    "linear": lambda x: F.linear(x, MATRIX, MATRIX[0]),
    "linear of a strided batch": lambda x: F.linear(x.view(2, 3, 6).transpose(0, 1), MATRIX),
    "addmm": lambda x: torch.addmm(x, x, MATRIX),
    "einsum": lambda x: torch.einsum("ij,kj->ik", x, MATRIX),
    "conv1d": lambda x: F.conv1d(x[None], MATRIX.view(6, 6, 1)),
    "sum": lambda x: x.sum(-1),
    "mean": lambda x: x.mean((0, 1), keepdim=True),
    "max": lambda x: x.max(-1),
    "amax": lambda x: x.amax(0),
    "std": lambda x: x.std(0),
    "argmax": lambda x: x.argmax(-1),
    "topk": lambda x: x.topk(2),
    "sort": lambda x: x.sort(-1, descending=True),
    "cumsum": lambda x: x.cumsum(0),
    "cat": lambda x: torch.cat([x, x + 1], 1),
    "stack": lambda x: torch.stack([x, -x]),
    "gather": lambda x: x.gather(1, x.argsort(-1)),
    "index_select": lambda x: x.index_select(0, x[0].argsort()),
    "integer index": lambda x: x[x[0].argsort(), 1],
    "embedding": lambda x: F.embedding(x[0].argsort(), MATRIX),
    "scatter": lambda x: x.scatter(1, x.argsort(-1), 1.0),
    "masked_fill": lambda x: x.masked_fill(x > 0, 3),
    "tril": torch.tril,
    "clone": lambda x: x.t().clone(memory_format=torch.contiguous_format),
    "to": lambda x: x.to(torch.float64),
    "to bool": lambda x: x.bool(),
    "reshape of a transpose": lambda x: x.t().reshape(-1),
    "contiguous": lambda x: x.t().contiguous(),
    "complex": lambda x: torch.view_as_real(torch.complex(x, -x).conj() * 1j),
    "unbind": lambda x: [row + 1 for row in x.unbind()],
    "split": lambda x: torch.split(x * 2, 2),
    "foreach": lambda x: torch._foreach_add([x, x], 1),
    "nonzero_static": lambda x: torch.nonzero_static(x > 0, size=40),
    "repeat_interleave": lambda x: torch.repeat_interleave(
        x, torch.full((6,), 2), 0, output_size=12
    ),
    "lengths": lambda x: torch.searchsorted(MATRIX[0].sort().values, x),
    "tensor of a tensor": lambda x: torch.asarray(x[0]) + torch.as_tensor(x),
    "new_zeros": lambda x: x.new_zeros(2) + x[0, 0],
    "bool mask filled with a value": lambda x: operator.setitem(y := x + 0, x > 0, 0.0) or y,
    "one-element list index": lambda x: x[[1]],
}


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_op_replays_like_eager_to_the_bit(op, mode):
    x = torch.randn(6, 6)
    assert_replays_like_eager(lambda: op(x), x.normal_, mode=mode)


def in_place_add(x):
    y = x + 0
    y[:, 0].add_(5)
    return y


def in_place_out(x):
    y = torch.empty(0)
    torch.add(x, 1, out=y)
    return y * 2


def in_place_transpose(x):
    y = x * 2
    y.t_()
    z = y + 1
    y.t_().squeeze_()
    return z, y - 1


def mutates_and_returns(x):
    mean, var = torch.zeros(6), torch.ones(6)
    args = (mean, var, True, 0.1, 1e-5)
    return torch.ops.aten._native_batch_norm_legit(x, None, None, *args), mean + 0, var + 0


def constant_overwritten(x):
    count = torch.tensor([1.0, 2.0])
    count.add_(x[0, :2])
    return count


def zeros_overwritten(x):
    total = torch.zeros(6)
    for row in x:
        total += row
    return total


def uninitialised_filled(x):
    out = x.new_empty(2, 6)
    out[0] = x[0]
    out[1].fill_(7)
    return out


def data_swapped(x):
    y = x + 1
    z = y * 2
    y.data = x + 5
    return z, y * 2


PROGRAMS = [
    in_place_add,
    in_place_out,
    in_place_transpose,
    mutates_and_returns,
    constant_overwritten,
    zeros_overwritten,
    uninitialised_filled,
    data_swapped,
]


@pytest.mark.parametrize("program", PROGRAMS)
def test_program_with_writes_replays_like_eager(program, mode):
    x = torch.randn(6, 6)
    assert_replays_like_eager(lambda: program(x), x.normal_, mode=mode)


def test_a_constant_output_is_restored_after_its_holder_wrote_into_it():
    tape, out = captured(lambda: torch.zeros(3))
    out.fill_(9)
    tape.replay()
    assert out.tolist() == [0, 0, 0]


def test_views_and_uninitialised_allocations_and_unwritten_constants_cost_no_step():
    x = torch.randn(4, 6)

    def fn():
        torch.empty(3), torch.zeros(3), torch.tensor([1]), x.is_contiguous(), x.is_pinned()
        x.view(-1).unsqueeze_(0).t_()
        return x.view(3, 8).t().unbind() + tuple(x[1:].detach().split(1))

    tape, _ = captured(fn)
    assert tape._steps == []


def test_an_undeclared_alias_is_not_copied():
    x = torch.randn(4, 6)
    tape, _ = captured(lambda: torch.ops.aten._unsafe_view(x, [24]))
    assert tape._steps == []


def ops_of_a_replay(tape):
    seen = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Seen():
        tape.replay()
    return seen


def test_a_result_in_host_memory_is_written_in_place_where_the_op_can():
    x = torch.randn(2, 3)
    assert ops_of_a_replay(captured(lambda: x + 1)[0]) == ["aten.add.out"]
    assert ops_of_a_replay(captured(lambda: x.max(-1))[0]) == ["aten.max.dim_max"]


def test_an_overload_that_allocates_and_copies_is_not_used():
    x = torch.randn(2, 3)
    seen = ops_of_a_replay(captured(lambda: F.layer_norm(x, (3,)))[0])
    assert seen[0] == "aten.native_layer_norm.default"


def test_on_a_device_the_captured_op_itself_is_repeated():
    m = torch.empty(3, device="meta")
    seen = ops_of_a_replay(captured(lambda: m + 1)[0])
    assert seen == ["aten.add.Tensor", "aten.copy_.default"]


def test_an_op_without_results_is_repeated():
    fine = torch.tensor(True)
    tape, _ = captured(lambda: torch._assert_async(fine, "not fine"))
    fine.fill_(False)
    with pytest.raises(RuntimeError, match="not fine"):
        tape.replay()


def test_a_profiler_range_is_not_repeated():
    x = torch.zeros(2)

    def fn():
        with torch.profiler.record_function("range"):
            x.add_(1)

    tape, _ = captured(fn)
    tape.replay()
    assert x.tolist() == [2, 2]
    assert len(tape._steps) == 1


def test_a_tensor_subclass_is_recorded_by_the_plain_calls_it_makes():
    class Wrapped(torch.Tensor):
        @staticmethod
        def __new__(cls, inner):
            return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

        def __init__(self, inner):
            self.inner = inner

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            result = func(*(a.inner if isinstance(a, cls) else a for a in args), **(kwargs or {}))
            return result if result.dim() else result.item()

    x = torch.zeros(2)
    wrapped = Wrapped(x)
    tape, out = captured(lambda: wrapped + 1)
    x.fill_(4)
    tape.replay()
    assert out.tolist() == [5, 5]
    with pytest.raises(CaptureError, match=r"the host read aten\._local_scalar_dense"):
        captured(lambda: wrapped.sum())


# --- Random programs ------------------------------------------------------------------------

UNARY = [torch.neg, torch.sigmoid, torch.abs, lambda t: t.t().contiguous(), lambda t: t.clone()]
BINARY = [torch.add, torch.mul, torch.maximum, torch.matmul, lambda a, b: torch.where(a > b, a, b)]
IN_PLACE = [
    lambda a, b: a.add_(b),
    lambda a, b: a.mul_(0.5),
    lambda a, b: a[1].copy_(b[0]),
    lambda a, b: a.masked_fill_(b > 1, 1.0),
    lambda a, b: torch.sub(a, b.clone(), out=a),
    lambda a, b: a.index_add_(0, torch.tensor([0, 2]), b[:2].clone()),
]
VIEWS = [torch.t, lambda t: t.flip(0), lambda t: t.view(4, 4), lambda t: t.roll(1, 0)[:]]
STEPS = st.tuples(
    st.sampled_from(["unary", "binary", "in place", "view"]), *[st.integers(0, 1000)] * 3
)


def run_program(steps, inputs):
    live = list(inputs)
    for kind, which, a, b in steps:
        x, y = live[a % len(live)], live[b % len(live)]
        match kind:
            case "unary":
                live.append(UNARY[which % len(UNARY)](x))
            case "binary":
                live.append(torch.tanh(BINARY[which % len(BINARY)](x, y)))
            case "in place":
                # A copy of the other operand: torch refuses to read what it writes in part.
                IN_PLACE[which % len(IN_PLACE)](x, y.clone())
            case "view":
                view = VIEWS[which % len(VIEWS)]
                live.append(view(x.contiguous() if which % 3 else x.clone()))
    return live


@settings(max_examples=80, deadline=None)
@given(steps=st.lists(STEPS, min_size=1, max_size=12), mode=st.sampled_from(list(MODES)))
def test_random_program_replays_like_eager_to_the_bit(steps, mode):
    torch.manual_seed(1)
    inputs = [torch.randn(4, 4) for _ in range(2)]
    tape, outputs = captured(lambda: run_program(steps, inputs), MODES[mode])
    for _ in range(2):
        for t in inputs:
            t.normal_()
        twins = [t.clone() for t in inputs]
        tape.replay()
        with MODES[mode]():
            expected = run_program(steps, twins)
        assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


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


# --- Refusals -------------------------------------------------------------------------------

X = torch.tensor([1.0, 2.0, 3.0])
MASK = torch.tensor([True, False, True])
ONE = torch.tensor(1)
YES = torch.tensor(True)
RECORD = logging.LogRecord("", logging.INFO, "", 0, "%s", (X,), None)
READS = {
    "item": lambda: X[0].item(),
    "tolist": lambda: X.tolist(),
    "tolist of a scalar": lambda: ONE.tolist(),
    "numpy": lambda: X.numpy(),
    "numpy, forced": lambda: X.numpy(force=True),
    "np.array": lambda: np.array(X),
    "np.asarray": lambda: np.asarray(X),
    "numpy ufunc": lambda: np.add(X, 1),
    "np.from_dlpack": lambda: np.from_dlpack(X),
    "__dlpack__": lambda: X.__dlpack__(),
    "torch.from_dlpack": lambda: torch.from_dlpack(X),
    "bool": lambda: bool(YES),
    "if": lambda: 1 if YES else 0,
    "and": lambda: YES and 1,
    "assert": lambda: operator.not_(YES),
    "int": lambda: int(ONE),
    "float": lambda: float(ONE),
    "complex": lambda: complex(ONE),
    "math": lambda: math.sqrt(ONE),
    "index": lambda: operator.index(ONE),
    "range": lambda: range(ONE),
    "list index": lambda: [1, 2][ONE],
    "slice": lambda: X[:ONE],
    "select": lambda: X[ONE],
    "size": lambda: torch.zeros(ONE),
    "full": lambda: torch.full((2,), ONE),
    "repeat": lambda: X.repeat(ONE),
    "repr": lambda: repr(X),
    "str": lambda: str(X),
    "format": lambda: f"{X}",
    "format of a scalar": lambda: f"{ONE:d}",
    "logging": lambda: logging.Formatter().format(RECORD),
    "in": lambda: 1 in X,
    "max over items": lambda: max(X),
    "equal": lambda: torch.equal(X, X),
    "allclose": lambda: torch.allclose(X, X),
    "is_nonzero": lambda: ONE.is_nonzero(),
    "torch.is_nonzero": lambda: torch.is_nonzero(ONE),
    "nonzero": lambda: MASK.nonzero(),
    "where of a condition": lambda: torch.where(MASK),
    "argwhere": lambda: torch.argwhere(MASK),
    "bool mask": lambda: X[MASK],
    "uint8 mask": lambda: torch.ops.aten.index.Tensor(X, [MASK.to(torch.uint8)]),
    "list mask": lambda: X[[True, False, True]],
    "write to a bool mask": lambda: operator.setitem(X, MASK, torch.tensor([1.0, 3.0])),
    "masked_select": lambda: X.masked_select(MASK),
    "unique": lambda: torch.unique(X),
    "unique_consecutive": lambda: torch.unique_consecutive(X),
    "bincount": lambda: torch.bincount(torch.tensor([1])),
    "repeat_interleave": lambda: X.repeat_interleave(torch.tensor([1, 2, 3])),
    "tensor of tensors": lambda: torch.tensor([ONE, ONE]),
    "as_tensor of tensors": lambda: torch.as_tensor([[ONE], [ONE]]),
    "new_tensor of tensors": lambda: X.new_tensor([ONE]),
    "asarray of tensors": lambda: torch.asarray([ONE]),
    "new of tensors": lambda: X.new([ONE]),
    "Tensor of tensors": lambda: torch.Tensor([ONE]),
    "tensor_split": lambda: torch.tensor_split(X, torch.tensor([1])),
    "pack_padded_sequence": lambda: nn.utils.rnn.pack_padded_sequence(
        torch.zeros(2, 2), torch.tensor([2, 1])
    ),
    "linalg.inv": lambda: torch.linalg.inv(torch.eye(2)),
    "choose_qparams": lambda: torch._choose_qparams_per_tensor(X),
    "apply_": lambda: X.apply_(abs),
    "map_": lambda: X.map_(X, lambda a, b: a),
    "map2_": lambda: X.map2_(X, X, lambda a, b, c: a),
    "storage list": lambda: X.untyped_storage().tolist(),
    "storage item": lambda: X.untyped_storage()[0],
    "one_hot": lambda: F.one_hot(ONE),
}


# Which of its protocols numpy deprecates is no matter here.
numpy_may_deprecate = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")


def line_of(code):
    number = code.co_firstlineno
    return f"{__file__}:{number}: `{linecache.getline(__file__, number).strip()}`"


@numpy_may_deprecate
@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_host_read_is_refused_with_its_line(read, mode):
    before = X.clone()
    with pytest.raises(CaptureError) as caught:
        captured(read, mode)
    message = str(caught.value)
    assert line_of(read.__code__) in message
    assert message.startswith("Tape.capture: fn made the host read ")
    assert "torch.where" in message
    assert "nonzero_static" in message
    assert torch.equal(X, before)


@numpy_may_deprecate
@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_the_same_read_is_free_outside_a_capture(read):
    before = X.clone()
    read()
    X.copy_(before)


@pytest.mark.parametrize(
    ("read", "op"),
    [
        ("item", "torch.Tensor.item"),
        ("numpy", "torch.Tensor.numpy"),
        ("if", "torch.Tensor.__bool__"),
        ("int", "torch.Tensor.__int__"),
        ("complex", "torch.Tensor.__complex__"),
        ("list index", "torch.Tensor.__index__"),
        ("is_nonzero", "torch.Tensor.is_nonzero"),
        ("slice", "aten._local_scalar_dense.default"),
        ("nonzero", "aten.nonzero.default"),
        ("bool mask", "aten.index.Tensor"),
        ("write to a bool mask", "aten.index_put_.default"),
        ("tensor of tensors", "torch.tensor"),
    ],
)
def test_a_refusal_names_the_op(read, op):
    with pytest.raises(CaptureError, match=rf"the host read {op} at "):
        captured(READS[read])


def test_a_refusal_leaves_the_tape_reusable():
    tape = Tape()
    with pytest.raises(CaptureError):
        tape.capture(READS["item"])
    assert not is_capturing()
    assert tape.capture(lambda: X + 1).tolist() == [2, 3, 4]


def test_a_refusal_names_the_caller_of_a_library_function():
    fn = lambda: copy.deepcopy(X)  # noqa: E731 - its line is what the test looks for
    with pytest.raises(CaptureError) as caught:
        captured(fn)
    assert line_of(fn.__code__) in str(caught.value)


TO_HOST = {
    "cpu": lambda m, x: m.cpu(),
    "to": lambda m, x: m.to("cpu", torch.float64),
    "copy_": lambda m, x: x.copy_(m),
    "setitem": lambda m, x: operator.setitem(x, slice(None), m),
    "foreach": lambda m, x: torch._foreach_copy_([x], [m]),
}


@pytest.mark.parametrize("move", TO_HOST.values(), ids=TO_HOST)
def test_a_copy_from_a_device_to_host_memory_is_refused(move, mode):
    device, host = torch.empty(3, device="meta"), torch.zeros(3)
    with pytest.raises(CaptureError, match=r"fn made aten\.\w+\.\w+ from a device to host memory"):
        captured(lambda: move(device, host), mode)


def test_copies_within_a_device_or_towards_it_are_not_refused():
    device, host = torch.empty(3, device="meta"), torch.zeros(3)
    captured(lambda: (device.copy_(host), host.to("meta"), host.to("cpu", torch.float64)))
    captured(lambda: (device.to(torch.float64), torch.zeros_like(device, device="cpu")))


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.resize_(8),
        lambda x: x.resize_as_(torch.zeros(8)),
        lambda x: x.set_(torch.zeros(8)),
        lambda x: x.set_(torch.zeros(8).untyped_storage()),
    ],
)
def test_a_change_of_storage_is_refused(change):
    x = torch.zeros(4)
    with pytest.raises(CaptureError, match=r"changes a tensor's storage.*Allocate the tensor"):
        captured(lambda: change(x))
    assert x.shape == (4,)


def test_a_fresh_empty_tensor_may_be_resized():
    x = torch.randn(4)

    def fn():
        out = torch.empty(0).resize_(4)
        return out.copy_(x)

    assert_replays_like_eager(fn, x.normal_)


def test_a_storage_may_be_written_as_torch_does_it():
    x, y = torch.zeros(3), torch.ones(3)
    tape, _ = captured(lambda: x.untyped_storage().copy_(y.untyped_storage()))
    y.fill_(5)
    tape.replay()
    assert x.tolist() == [5, 5, 5]


def test_sparse_tensors_are_refused():
    sparse = torch.eye(3).to_sparse()
    with pytest.raises(CaptureError, match=r"torch\.sparse_coo.*to_dense\(\)"):
        captured(lambda: sparse @ torch.ones(3, 1))


def test_pickling_goes_unseen_as_documented():
    captured(lambda: pickle.dumps(X))
