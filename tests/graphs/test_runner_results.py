"""GraphRunner: what comes out of a replay is what the function gives, without the padding."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hwcore.errors import CaptureError
from hwcore.graphs import BATCH, TOKENS, Slot

from ._steps import BUCKETS, Step, inputs, lens, runner_of, same, simple

CASES = [(n, width) for size, width in BUCKETS for n in {0, 1, size - 1, size}]


@pytest.fixture(scope="module")
def captured(hw):
    step = Step(hw.device())
    with runner_of(hw, step) as runner:
        yield runner, step


def eager(step, given):
    """Return what a step gives on the same cache, leaving that as it is."""
    with torch.no_grad():
        kept, step.cache = step.cache, step.cache.clone()
        outputs = step(**given)
        outputs, cache = copy.deepcopy(outputs), step.cache
        step.cache = kept
    return outputs, cache


@pytest.mark.parametrize(("batch_size", "width"), sorted(set(CASES)))
def test_a_padded_replay_gives_what_eager_gives(hw, captured, batch_size, width):
    runner, step = captured
    given = inputs(batch_size, width, hw.device(), seed=batch_size)
    expected, cache = eager(step, given)
    prepared = runner.prepare(given, lens(batch_size), width)
    same(runner.replay(prepared), expected)
    assert torch.equal(step.cache[1:].cpu(), cache[1:].cpu()), "padding wrote to row 0 alone"


@settings(
    max_examples=40,
    deadline=None,
    # The runner is meant to be used again and again; the seed fixture has nothing to do with it.
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(st.tuples(st.sampled_from(CASES), st.integers(0, 99)), min_size=2, max_size=12))
def test_any_sequence_of_batches_gives_what_eager_gives(hw, captured, batches):
    runner, step = captured
    for (batch_size, width), seed in batches:
        tensors = inputs(batch_size, width, hw.device(), seed)
        expected, cache = eager(step, tensors)
        same(runner.run(tensors, lens(batch_size), width), expected)
        assert torch.equal(step.cache[1:].cpu(), cache[1:].cpu())
    step.cache.zero_()


def test_padding_is_computed_from_the_fill_whatever_came_before(hw):
    seen = torch.zeros(4, device=hw.device())
    slots = {"x": Slot(torch.float32, (BATCH,), fill=100.0)}

    def fn(x):
        seen.copy_(x)
        return x * 2

    with runner_of(hw, fn, slots, [(4, 1)]) as runner:
        for values in ([1.0, 2.0, 3.0, 4.0], [5.0], [], [6.0, 7.0]):
            x = torch.tensor(values, device=hw.device())
            out = runner.run({"x": x}, lens(len(values)))
            assert out.tolist() == [2 * value for value in values]
            assert seen.tolist() == values + [100.0] * (4 - len(values))


def test_padding_is_clean_after_a_function_that_writes_its_inputs(hw):
    slots = {"x": Slot(torch.float32, (BATCH,), fill=100.0)}

    with runner_of(hw, lambda x: x.add_(1).clone(), slots, [(4, 1)]) as runner:
        for _ in range(3):
            x = torch.tensor([1.0, 2.0], device=hw.device())
            assert runner.run({"x": x}, lens(2)).tolist() == [2, 3]
            assert runner.buffers.views((4, 1))["x"].tolist() == [2, 3, 101, 101]
            assert x.tolist() == [1, 2]


def test_a_function_that_writes_its_inputs_is_found_in_inference_mode_too(hw):
    slots = {"x": Slot(torch.float32, (BATCH,), fill=100.0)}
    with (
        torch.inference_mode(),
        runner_of(hw, lambda x: x.add_(1).clone(), slots, [(4, 1)]) as runner,
    ):
        for _ in range(3):
            runner.run({"x": torch.ones(2, device=hw.device())}, lens(2))
            assert runner.buffers.views((4, 1))["x"].tolist() == [2, 2, 101, 101]


# --- Outputs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form",
    [
        lambda x: x,
        lambda x: (x, x),
        lambda x: [x, (x, None)],
        lambda x: {"a": x, "b": {"c": [x]}},
        lambda x: (1, "text", None, x),
        lambda x: None,
    ],
)
def test_outputs_keep_their_containers(hw, form):
    slots = {"x": Slot(torch.float32, (BATCH,))}
    with runner_of(hw, lambda x: form(x * 2), slots, [(4, 1)]) as runner:
        got = runner.run({"x": torch.ones(3, device=hw.device())}, lens(3))
        assert str(got) == str(form(torch.full((3,), 2.0, device=hw.device())))


def test_containers_are_the_callers_own(hw, captured):
    runner, _ = captured
    given = inputs(2, 1, hw.device())
    runner.run(given, lens(2)).clear()
    assert runner.run(given, lens(2)).keys() == {"logits", "best"}


def test_outputs_are_views_of_what_the_graph_writes(hw):
    with simple(hw) as runner:
        x = torch.ones(3, device=hw.device())
        first = runner.run({"x": x}, lens(3))
        again = runner.run({"x": x * 4}, lens(3))
        assert first.data_ptr() == again.data_ptr()
        assert first.tolist() == [8, 8, 8], "as documented: a replay takes back what came before"


def test_a_replay_of_another_bucket_may_take_outputs_back_where_graphs_share_memory(hw):
    """Why outputs are said to hold until the next replay of any bucket, and not of their own."""

    def fn(x):
        for _ in range(3):
            x = x + 1  # by turns in two places of the pool
        return x

    slots = {"x": Slot(torch.float32, (BATCH, 256))}
    with runner_of(hw, fn, slots, [(8, 1), (7, 1)]) as runner:
        small = runner.run({"x": torch.zeros(7, 256, device=hw.device())}, lens(7))
        assert (small == 3).all()
        runner.run({"x": torch.full((8, 256), 90.0, device=hw.device())}, lens(8))
        assert bool((small == 3).all()) is (hw.info.name != "sim")


@pytest.mark.parametrize("width", [1, 3])
def test_outputs_of_tokens_are_cut_to_the_real_tokens(hw, width):
    slots = {"x": Slot(torch.float32, (TOKENS,))}
    with runner_of(hw, lambda x: x[:, None] * 2, slots, [(4, width)]) as runner:
        x = torch.arange(2.0 * width, device=hw.device())
        out = runner.run({"x": x}, lens(2), width)
        assert out.shape == (2 * width, 1)
        assert torch.equal(out[:, 0].cpu(), x.cpu() * 2)


@pytest.mark.parametrize(
    ("fn", "part"),
    [
        (lambda x: x.sum(), "`outputs` of shape []"),
        (lambda x: {"a": [x * 1, x.expand(3, 4) * 1]}, "`outputs['a'][1]` of shape [3, 4]"),
        (lambda x: x, "`outputs` in the memory of an input"),
        (lambda x: (x * 1, x[:2]), "`outputs[1]` in the memory of an input"),
    ],
)
def test_outputs_whose_padding_cannot_be_cut_off_are_refused_at_capture(hw, fn, part):
    slots = {"x": Slot(torch.float32, (BATCH,))}
    with pytest.raises(CaptureError, match=r"bucket \(4, 1\)") as caught:
        runner_of(hw, fn, slots, [(4, 1)])
    assert part in str(caught.value.__cause__ or caught.value)


@dataclasses.dataclass
class Unregistered:
    logits: torch.Tensor


@pytest.mark.parametrize(
    ("fn", "part"),
    [
        (lambda x: Unregistered(x * 2), "`outputs`, Unregistered(logits=tensor("),
        (lambda x: {"a": {x * 2}}, "`outputs['a']`, {tensor("),
        (lambda x: [x * 2, bytearray(b"x")], "`outputs[1]`, bytearray(b'x') (bytearray)"),
        (lambda x: (part for part in [x]), "(generator)"),
    ],
)
def test_what_may_hold_a_tensor_that_nobody_sees_is_refused_at_capture(hw, fn, part):
    slots = {"x": Slot(torch.float32, (BATCH,))}
    with pytest.raises(CaptureError, match=r"bucket \(4, 1\)") as caught:
        runner_of(hw, fn, slots, [(4, 1)])
    assert part in str(caught.value.__cause__)
    assert "register the class with torch.utils._pytree" in str(caught.value.__cause__)


def test_what_a_row_belongs_to_is_what_it_belongs_to_in_all_buckets(hw):
    slots = {"x": Slot(torch.float32, (BATCH,)), "t": Slot(torch.float32, (TOKENS,))}

    def fn(x, t):  # of the bucket (2, 2) four rows could be tokens, of (4, 1) requests as well
        return {"requests": x * 2, "tokens": t * 2}

    with runner_of(hw, fn, slots, [(4, 1), (2, 2), (1, 4)]) as runner:
        for width in (1, 2, 4):
            given = {
                "x": torch.ones(1, device=hw.device()),
                "t": torch.arange(1.0 * width, device=hw.device()),
            }
            out = runner.run(given, lens(1), width)
            assert out["requests"].tolist() == [2]
            assert out["tokens"].tolist() == [2 * token for token in range(width)]


def test_outputs_of_which_buckets_say_different_things_are_refused(hw):
    slots = {"x": Slot(torch.float32, (BATCH,)), "t": Slot(torch.float32, (TOKENS,))}
    with pytest.raises(CaptureError, match=r"of shape \[4, 2\] for bucket .* \[4, 4\] for bucket"):
        runner_of(hw, lambda x, t: torch.stack([x] * 4), slots, [(4, 1), (2, 3)])
    with pytest.raises(CaptureError, match=r"outputs\['b'\].* Return None for what a bucket lacks"):
        runner_of(hw, lambda x, t: {"a" if len(x) > 2 else "b": x * 2}, slots, [(4, 1), (2, 1)])


@pytest.mark.parametrize("form", [lambda x: x * 2, lambda x: {"out": x * 2}], ids=["alone", "dict"])
def test_what_a_caller_does_to_an_output_does_not_come_back(hw, form):
    slots = {"x": Slot(torch.float32, (BATCH,))}

    def got(out):
        return out if isinstance(out, torch.Tensor) else out["out"]

    weight = torch.ones(2, device=hw.device(), requires_grad=True)
    with runner_of(hw, form, slots, [(4, 1)]) as runner:
        one = {"x": torch.tensor([1.0, 2.0], device=hw.device())}
        two = {"x": torch.tensor([3.0, 4.0], device=hw.device())}
        got(runner.run(one, lens(2))).unsqueeze_(0)
        assert got(runner.run(one, lens(2))).shape == (2,)
        out = got(runner.run(one, lens(2)))
        out.data = out.data + 1
        assert got(runner.run(two, lens(2))).tolist() == [6, 8]
        got(runner.run(one, lens(2))).mul_(weight)
        assert not got(runner.run(two, lens(2))).requires_grad


def test_a_function_may_use_parameters_that_require_grad(hw):
    weight = torch.nn.Parameter(torch.tensor([3.0], device=hw.device()))
    slots = {"x": Slot(torch.float32, (BATCH,))}
    with runner_of(hw, lambda x: x * weight, slots, [(2, 1)]) as runner:
        for size in (1, 3):  # replayed, and eagerly
            x = torch.ones(size, device=hw.device())
            out = runner.run({"x": x}, lens(size), or_eager=True)
            assert out.tolist() == [3] * size
            assert not out.requires_grad


# --- Eager ----------------------------------------------------------------------------------------


def test_eagerly_too_a_function_writes_into_copies(hw):
    slots = {"x": Slot(torch.float32, (BATCH,))}
    with runner_of(hw, lambda x: x.add_(1).clone(), slots, [(2, 1)]) as runner:
        for size in (2, 3):  # replayed, and eagerly
            x = torch.ones(size, device=hw.device())
            assert runner.run({"x": x}, lens(size), or_eager=True).tolist() == [2] * size
            assert x.tolist() == [1] * size


def test_a_batch_without_a_graph_runs_eagerly_only_where_asked(hw, captured):
    runner, step = captured
    given = inputs(9, 1, hw.device())
    calls = len(step.calls)
    expected, _ = eager(step, given)
    same(runner.run(given, lens(9), or_eager=True), expected)
    assert step.calls[calls:] == [(9, 1)] * 2, "with the real rows alone"


def test_a_batch_with_a_graph_is_replayed_though_eager_is_allowed(hw, captured):
    runner, step = captured
    given = inputs(3, 1, hw.device())
    expected, _ = eager(step, given)
    calls = len(step.calls)
    same(runner.run(given, lens(3), or_eager=True), expected)
    assert len(step.calls) == calls


def test_eagerly_host_inputs_come_to_the_device(hw, captured):
    runner, step = captured
    given = inputs(5, 4)
    expected, _ = eager(step, {name: t.to(hw.device()) for name, t in given.items()})
    same(runner.run(given, lens(5), 4, or_eager=True), expected)
