"""GraphRunner's calls: what the backend is told, what is refused, and that this costs nothing."""

from __future__ import annotations

import gc
import logging
import types
import weakref

import pytest
import torch

import hwcore
from hwcore.errors import ArgumentTypeError, ArgumentValueError, CaptureError, ClosedError
from hwcore.graphs import BATCH, GraphRunner, Slot
from hwcore.types import PlanStreamPolicy, ReplayBatch

from ._steps import SLOTS, Step, inputs, lens, runner_of, simple
from .test_buffers import broken


class Wary:
    """Hook wrappers of a device like Ascend's: it trusts no mrope positions of a plan stream.

    Its replay copies what was recomputed into the graph's buffers, and updates host values from
    the batch.
    """

    def __init__(self):
        self.replays = []

    @hwcore.hookimpl(wrapper=True)
    def plan_stream_policy(self):
        yield
        return PlanStreamPolicy(recompute_after_join=frozenset({"mrope_positions", "other"}))

    @hwcore.hookimpl(wrapper=True)
    def graph_replay(self, graph, buffers, batch):
        for name, tensor in batch.recomputed.items():
            buffers[name].copy_(tensor)
        self.replays.append((dict(buffers), batch))
        return (yield)


@pytest.fixture
def wary(hw):
    wrappers = Wary()
    hw.register(wrappers)
    yield wrappers
    hw.unregister(wrappers)


# --- What the backend is told ---------------------------------------------------------------------


def test_the_backend_gets_the_batch_with_real_and_padded_lengths(hw, wary):
    with runner_of(hw, pad_seq_len=2) as runner:
        runner.replay(runner.prepare(inputs(3, 1, hw.device()), [5, 6, 7], attention="mla"))
        buffers, batch = wary.replays.pop()
    assert batch == ReplayBatch((4, 1), (5, 6, 7), (5, 6, 7, 2), "mla", False, {})
    assert {name: tuple(view.shape) for name, view in buffers.items()} == {
        name: tuple(slot.shape_for(4, 1)) for name, slot in SLOTS.items()
    }


def test_the_buffers_that_the_backend_gets_are_the_graphs_own(hw, wary):
    with simple(hw) as runner:
        runner.run({"x": torch.ones(3, device=hw.device())}, lens(3))
        buffers, _ = wary.replays.pop()
        assert buffers["x"].data_ptr() == runner.buffers.views((4, 1))["x"].data_ptr()


@pytest.mark.parametrize("how", ["another stream", "the argument"])
def test_what_was_recomputed_reaches_graph_and_backend(hw, wary, how):
    given, fresh = inputs(3, 1, hw.device()), inputs(3, 1, hw.device(), seed=5)
    step, name = Step(hw.device()), "mrope_positions"
    with runner_of(hw, step) as runner:
        stream = hw.create_stream() if how == "another stream" else hw.current_stream()
        with hw.stream_context(stream):
            on_side = how == "the argument"
            prepared = runner.prepare(given, lens(3), plan_stream_active=on_side)
        out = runner.replay(prepared, {name: fresh[name]})
        expected = given["input_ids"] + fresh[name].sum(0)
        assert torch.equal(out["logits"][:, 0].cpu(), expected.to(torch.float32).cpu())
        _, batch = wary.replays.pop()
        assert batch.plan_stream_active
        assert batch.recomputed.keys() == {name}
        padded = batch.recomputed[name]
        assert padded.shape == (3, 4), "as the graph sees it"
        assert torch.equal(padded[:, :3].cpu(), fresh[name].cpu())
        assert padded[:, 3].tolist() == [-1, -1, -1]


def test_what_the_backend_does_not_trust_must_be_recomputed(hw, wary):
    given = inputs(3, 1, hw.device())
    with runner_of(hw) as runner:
        with hw.stream_context(hw.create_stream()):
            prepared = runner.prepare(given, lens(3))
        for recomputed in (None, {"rows": given["rows"]}):
            with pytest.raises(ArgumentValueError, match="mrope_positions among them") as caught:
                runner.replay(prepared, recomputed)
        assert "other" not in str(caught.value), "which is no slot"
        assert wary.replays == []
        runner.replay(prepared, {"mrope_positions": given["mrope_positions"]})
        assert len(wary.replays) == 1


def test_on_one_stream_nothing_need_be_recomputed(hw, wary):
    with runner_of(hw) as runner:
        runner.run(inputs(3, 1, hw.device()), lens(3))
    assert not wary.replays.pop()[1].plan_stream_active


@pytest.mark.parametrize("left_out", list(SLOTS))
def test_what_is_recomputed_need_not_be_prepared(hw, left_out):
    given = inputs(3, 1, hw.device())
    with runner_of(hw) as runner:
        expected = {k: v for k, v in runner.run(given, lens(3)).items() if k == "logits"}
        expected = {"logits": expected["logits"].clone()}
        runner.run(inputs(4, 1, hw.device(), seed=9), lens(4))
        fewer = {name: tensor for name, tensor in given.items() if name != left_out}
        prepared = runner.prepare(fewer, lens(3))
        with pytest.raises(ArgumentValueError, match=f"{left_out} among them, not given"):
            runner.replay(prepared)
        out = runner.replay(prepared, {left_out: given[left_out]})
        assert torch.equal(out["logits"].cpu(), expected["logits"].cpu())


def test_a_batch_of_padding_alone_needs_no_inputs(hw, wary):
    step = Step(hw.device())
    with runner_of(hw, step) as runner:
        runner.run(inputs(1, 1, hw.device()), lens(1))
        with hw.stream_context(hw.create_stream()):
            prepared = runner.prepare({}, ())
        step.cache.zero_()
        out = runner.replay(prepared)
        assert out["logits"].shape == (0, 3)
        assert wary.replays.pop()[1].padded_seq_lens == (1,)
        assert step.cache.tolist() == [1] + [0] * 15, "row 0 takes what padding writes"


def test_a_second_device_has_runners_of_its_own(hw):
    if hw.device_count() < 2:
        pytest.skip("there is one device")
    try:
        hw.set_device(1)
        with simple(hw, device=hw.device(1)) as runner:
            out = runner.run({"x": torch.ones(3, device=hw.device(1))}, lens(3))
            assert out.device == hw.device(1)
            assert out.tolist() == [2, 2, 2]
            with hw.stream_context(hw.create_stream(hw.device(1))):
                prepared = runner.prepare({"x": torch.full((3,), 4.0)}, lens(3))
            assert runner.replay(prepared).tolist() == [8, 8, 8]
            hw.set_device(0)
            stranger = torch.ones(3, device=hw.device(0))
            with pytest.raises(ArgumentTypeError, match=f"on {hw.device(1)} or on the host"):
                runner.prepare({"x": stranger}, lens(3))
    finally:
        hw.set_device(0)


# --- Which batches have a graph -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch_size", "width", "bucket"),
    [(0, 1, (1, 1)), (1, 1, (1, 1)), (3, 1, (4, 1)), (8, 1, (8, 1)), (2, 3, (4, 3))],
)
def test_a_batch_goes_to_the_smallest_bucket_that_takes_it(hw, batch_size, width, bucket):
    with runner_of(hw) as runner:
        assert runner.can_run(batch_size, width)
        assert runner.can_run(batch_size, width).bucket == bucket
        prepared = runner.prepare(inputs(batch_size, width, hw.device()), lens(batch_size), width)
        assert prepared.batch.bucket == bucket
        assert prepared.inputs["rows"].shape == (bucket[0],)
        assert not runner.refusals


def test_a_batch_without_a_graph_is_counted_and_logged_once_a_kind(hw, caplog):
    runner = GraphRunner(Step(hw.device()), SLOTS, [(4, 1), (2, 3)], backend=hw)
    with caplog.at_level(logging.WARNING, "hwcore"):
        early = runner.can_run(1)
        runner.capture()
        large = [runner.can_run(size) for size in (5, 6)]
        wide = [runner.can_run(1, 2), runner.can_run(1, 5), runner.can_run(1, 7)]
    assert not any([early, *large, *wide])
    assert runner.refusals == {"not captured": 1, "batch size": 2, "tokens per request": 3}
    assert "call capture()" in early.reason
    assert large[1].reason == (
        "a batch of 6 requests is larger than the largest bucket for 1 tokens per request, 4"
    )
    assert wide[0].reason == "2 tokens per request have no bucket, only 1, 3 have"
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 3
    assert said[1] == f"no graph replay: {large[0].reason} (said once)"
    runner.close()


@pytest.mark.parametrize(
    ("arguments", "name"),
    [((-1,), "batch_size"), ((True,), "batch_size"), ((1, 0), "tokens_per_request")],
)
def test_can_run_refuses_what_is_no_batch(hw, arguments, name):
    with simple(hw) as runner, pytest.raises(ArgumentValueError, match=rf"`{name}` got"):
        runner.can_run(*arguments)


# --- Refusals, and what they leave ----------------------------------------------------------------


@pytest.fixture
def runner(hw):
    with runner_of(hw) as runner:
        yield runner


@pytest.fixture
def prepared(hw, runner):
    """A batch that is in place, and the check that it is still so."""
    given = inputs(3, 1, hw.device(), seed=3)
    expected = runner.run(given, lens(3))["logits"].clone()
    prepared = runner.prepare(given, lens(3))

    def is_whole():
        out = runner.replay(prepared)["logits"]
        assert torch.equal(out.cpu(), expected.cpu())
        again = runner.run(given, lens(3))["logits"]
        assert torch.equal(again.cpu(), expected.cpu())

    prepared_and = types.SimpleNamespace(batch=prepared, is_whole=is_whole)
    yield prepared_and
    is_whole()


@pytest.mark.parametrize("method", ["prepare", "run"])
@pytest.mark.parametrize("case", list(broken(inputs(3), "cpu")))
def test_a_drifted_input_costs_nothing_of_what_is_prepared(hw, runner, prepared, method, case):
    change, kind, part = broken(inputs(3), runner.buffers.device)[case]
    with pytest.raises(kind) as caught:
        getattr(runner, method)(inputs(3, 1, hw.device()) | change, lens(3))
    assert part in str(caught.value)


@pytest.mark.parametrize("case", list(broken(inputs(3), "cpu")))
def test_eagerly_a_drifted_input_is_refused_alike(hw, case):
    runner = GraphRunner(Step(hw.device()), SLOTS, [(1, 1)], backend=hw)
    change, kind, part = broken(inputs(3), runner.buffers.device)[case]
    with pytest.raises(kind) as caught:
        runner.run(inputs(3, 1, hw.device()) | change, lens(3), or_eager=True)
    assert part in str(caught.value)


def test_eagerly_too_no_input_may_be_left_out(hw, runner):
    given = inputs(9, 1, hw.device())
    del given["scores"]
    with pytest.raises(ArgumentValueError, match="input `scores` got 'nothing'"):
        runner.run(given, lens(9), or_eager=True)


@pytest.mark.parametrize("seq_lens", [None, 3, torch.ones(3), "123", range(3)])
@pytest.mark.parametrize("method", ["prepare", "run"])
def test_lengths_that_are_no_tuple_or_list_are_refused(hw, runner, prepared, method, seq_lens):
    with pytest.raises(ArgumentTypeError, match=rf"GraphRunner.{method}: `seq_lens` got"):
        getattr(runner, method)(inputs(3, 1, hw.device()), seq_lens)


def test_a_batch_that_is_larger_than_the_largest_bucket_is_refused(hw, runner, prepared):
    for method in ("prepare", "run"):
        with pytest.raises(ArgumentValueError, match=rf"^GraphRunner.{method}: .*largest bucket"):
            getattr(runner, method)(inputs(9, 1, hw.device()), lens(9))


def test_a_width_that_was_not_captured_is_refused(hw, runner, prepared):
    with pytest.raises(ArgumentValueError, match="2 tokens per request have no bucket"):
        runner.prepare(inputs(3, 2, hw.device()), lens(3), 2)


def test_recomputed_inputs_are_checked_as_others_are(hw, runner, prepared):
    for name, tensor in {"rows": torch.zeros(4), "row": torch.zeros(3)}.items():
        with pytest.raises(ArgumentTypeError if name == "rows" else ArgumentValueError):
            runner.replay(prepared.batch, {name: tensor})


def test_a_batch_is_replayed_once(hw, runner):
    batch = runner.prepare(inputs(3, 1, hw.device()), lens(3))
    runner.replay(batch)
    with pytest.raises(ArgumentValueError, match="not replayed yet"):
        runner.replay(batch)


def test_a_batch_that_another_took_the_place_of_is_refused(hw, runner):
    given = inputs(3, 1, hw.device())
    first, second = runner.prepare(given, lens(3)), runner.prepare(given, lens(3))
    with pytest.raises(ArgumentValueError, match=r"<hwcore Prepared 3 requests in \(4, 1\)>"):
        runner.replay(first)
    runner.replay(second)


def test_a_batch_of_another_runner_is_refused(hw, runner, prepared):
    with runner_of(hw) as other:
        stranger = other.prepare(inputs(3, 1, hw.device()), lens(3))
        with pytest.raises(ArgumentValueError, match="the latest of prepare"):
            runner.replay(stranger)


@pytest.mark.parametrize("value", [None, 3])
def test_what_is_no_prepared_batch_is_refused(runner, prepared, value):
    with pytest.raises(ArgumentTypeError, match=f"`prepared` got {value}"):
        runner.replay(value)


def test_without_a_capture_there_is_nothing_to_prepare(hw):
    runner = GraphRunner(Step(hw.device()), SLOTS, [(4, 1)], backend=hw)
    for method in ("prepare", "run"):
        with pytest.raises(CaptureError, match="nothing was captured yet"):
            getattr(runner, method)(inputs(3, 1, hw.device()), lens(3))
    with pytest.raises(ArgumentTypeError):
        runner.replay(None)
    runner.run(inputs(3, 1, hw.device()), lens(3), or_eager=True)
    runner.close()


class _DeviceError(Exception):
    pass


def failing(hook):
    def fail():
        raise _DeviceError
        yield

    return types.SimpleNamespace(**{hook: hwcore.hookimpl(wrapper=True)(fail)})


def test_a_replay_that_the_device_refuses_can_be_tried_again(hw, runner, prepared):
    broken = failing("graph_replay")
    hw.register(broken)
    try:
        with pytest.raises(_DeviceError):
            runner.replay(prepared.batch)
    finally:
        hw.unregister(broken)


def test_a_copy_that_fails_leaves_no_half_batch_to_replay(hw, runner, monkeypatch):
    given = inputs(3, 1, hw.device())
    earlier = runner.prepare(given, lens(3))

    def fail(targets, sources):
        for target in targets:
            target.fill_(9)
        raise _DeviceError

    monkeypatch.setattr("hwcore.graphs.buffers._copy_all", fail)
    with pytest.raises(_DeviceError):
        runner.prepare(inputs(4, 1, hw.device()), lens(4))
    monkeypatch.undo()
    with pytest.raises(ArgumentValueError, match="Prepare the batch again"):
        runner.replay(earlier)
    runner.run(given, lens(3))
    for name, view in runner.buffers.views((4, 1)).items():
        padded = view.narrow(SLOTS[name].axis, 3, 1)
        assert (padded == SLOTS[name].fill).all(), "padding is whole again"


# --- The end --------------------------------------------------------------------------------------


def test_a_closed_runner_says_so_whatever_is_called(hw):
    runner = simple(hw)
    x = torch.ones(3, device=hw.device())
    prepared = runner.prepare({"x": x}, lens(3))
    runner.close()
    runner.close()
    calls = [
        ("capture", ()),
        ("recapture", ()),
        ("can_run", (1,)),
        ("prepare", ({"x": x}, lens(3))),
        ("replay", (prepared,)),
    ]
    for method, arguments in calls:
        with pytest.raises(ClosedError, match=rf"^GraphRunner.{method}: .*a closed runner"):
            getattr(runner, method)(*arguments)
    with pytest.raises(ClosedError, match="a closed runner"):
        runner.run({"x": x}, lens(3), or_eager=True)
    assert "closed" in repr(runner)


def test_leaving_the_block_closes_the_runner_after_an_error_too(hw):
    with pytest.raises(_DeviceError), simple(hw) as runner:
        raise _DeviceError
    with pytest.raises(ClosedError, match="a closed runner"):
        runner.can_run(1)


def test_close_releases_graphs_and_buffers(hw):
    runner = runner_of(hw)
    runner.run(inputs(3, 1, hw.device()), lens(3))
    memory = runner.buffers.memory.untyped_storage()  # its views would hold it
    kept = [weakref.ref(memory), weakref.ref(runner._set.graphs[8, 1])]
    del memory
    runner.close()
    gc.collect()
    assert [ref() for ref in kept] == [None, None]


def test_a_closed_runner_gives_the_devices_memory_back(hw):
    if hw.info.name != "sim":
        pytest.skip("the host's allocator keeps no count")
    slots = {"x": Slot(torch.float32, (BATCH, 1000))}

    def use():
        with runner_of(hw, lambda x: (x * 2).sum(1), slots, [(8, 1), (64, 1)]) as runner:
            runner.run({"x": torch.ones(5, 1000, device=hw.device())}, lens(5))

    use()
    gc.collect()
    before = torch.accelerator.memory_allocated()
    for _ in range(3):
        use()
        gc.collect()
        assert torch.accelerator.memory_allocated() == before


def test_the_package_imports_its_names_when_they_are_used(site):
    code = """
        import sys, hwcore.graphs
        print("torch" in sys.modules)
        from hwcore.graphs import *
        print(GraphRunner.__module__, GraphBuffers.__module__)
        print(set(hwcore.graphs.__all__) <= set(dir(hwcore.graphs)))
        try:
            hwcore.graphs.GraphRuner
        except AttributeError as error:
            print(error)
    """
    assert site.run(code).output == [
        "False",
        "hwcore.graphs.runner hwcore.graphs.buffers",
        "True",
        "module 'hwcore.graphs' has no attribute 'GraphRuner'",
    ]
