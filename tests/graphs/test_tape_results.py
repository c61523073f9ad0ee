"""What a replay of a tape computes: what eager does, to the bit, into the same addresses."""

import copy
import functools
import operator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hwcore.errors import CaptureError

from ._tapes import MODES, assert_replays_like_eager, captured


@pytest.fixture(autouse=True)
def _on_the_device(hw):
    """Put every tensor that does not say where on the device of the run."""
    torch.set_default_device(hw.device())
    matrix()  # not in a capture, where it would be drawn again by each replay
    yield
    torch.set_default_device(None)


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


@functools.cache
def matrix():
    return torch.randn(6, 6)


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
    "mm": lambda x: x @ matrix(),
    "bmm": lambda x: x.view(2, 3, 6) @ matrix(),
    "linear": lambda x: F.linear(x, matrix(), matrix()[0]),
    "linear of a strided batch": lambda x: F.linear(x.view(2, 3, 6).transpose(0, 1), matrix()),
    "addmm": lambda x: torch.addmm(x, x, matrix()),
    "einsum": lambda x: torch.einsum("ij,kj->ik", x, matrix()),
    "conv1d": lambda x: F.conv1d(x[None], matrix().view(6, 6, 1)),
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
    "embedding": lambda x: F.embedding(x[0].argsort(), matrix()),
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
    "lengths": lambda x: torch.searchsorted(matrix()[0].sort().values, x),
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
    x = torch.randn(2, 3, device="cpu")
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


def test_an_op_without_results_is_repeated(hw):
    fine = torch.tensor(True)
    tape, _ = captured(lambda: torch._assert_async(fine, "not fine"))
    fine.fill_(False)
    with pytest.raises(RuntimeError, match="not fine"):  # noqa: PT012 - a device says it later
        tape.replay()
        hw.synchronize()


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
