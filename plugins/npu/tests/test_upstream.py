"""Four changes that one engine had to make for this device, each a hook here.

Each program is right as the plugin answers, and wrong, or ends in an error, with the engine's old
answer put back. Work runs as late as it may.
"""

import contextlib
import types

import pytest
import torch

import hwcore
from hwcore.cpu import CpuEvent, CpuStream
from hwcore.diffusion import DiffusionTransferManager
from hwcore.errors import PluginReturnError
from hwcore.kernels import assert_and_invalidate, gather_rows
from hwcore.overlap import PlanStream
from hwcore.speculative import MropeContext, compute_spec_mrope_positions
from hwcore.testing.loop_engine import LoopEngine
from hwcore.types import CompilePolicy, PlanStreamPolicy, ReplayBatch
from hwcore_npu.plugin import NpuPlugin


@pytest.fixture
def on(hw, monkeypatch):
    """Run a program with some hooks as they were; return its result, or the error it ends in."""

    def run(program, **old):
        from hwcore_sim import device

        with device.drain_policy("lazy"), monkeypatch.context() as patch:
            for hook, function in old.items():
                patch.setattr(hw, hook, function)  # past what is checked at activation
            try:
                return program(hw)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is the finding
                return type(error)

    return run


# --- torch.compile of FutureMap's functions -------------------------------------------------------


def compiled_relay(hw):
    """What a map does between two steps, as functions that an engine compiles."""
    rows = torch.arange(12, device="npu").reshape(4, 3)
    indices = torch.tensor([2, 1], device="npu")
    gather = hwcore.compile(gather_rows, backend=hw, dynamic=True)
    invalidate = hwcore.compile(assert_and_invalidate, backend=hw, dynamic=True)
    read = gather(rows, indices, torch.empty_like(rows[:2]))
    state = torch.zeros(4, 1, dtype=torch.int32, device="npu")
    outcome, state = invalidate(read[:, 0], state, indices, torch.zeros((), device="npu").long())
    return read.tolist(), outcome.item(), state.flatten().tolist()


def test_futuremap_is_not_compiled(on):
    assert on(compiled_relay) == ([[6, 7, 8], [3, 4, 5]], 3, [0, -1, -1, 0])


def test_the_reason_for_it_is_said(hw):
    policy = hw.compile_policy(types.SimpleNamespace(name="gather_rows"))
    assert "needs triton-ascend" in policy.reason


def test_compiled_by_inductor_it_ends_in_an_error(on):
    def compile_policy(request):
        return CompilePolicy(enabled=True, backend="inductor")

    assert issubclass(on(compiled_relay, compile_policy=compile_policy), Exception)


# --- Devices by name, streams and events, in a staged copy ----------------------------------------


def staged_copy(hw):
    """Two batches from the device into a peer's pool, by both ways, and back, on side streams."""
    device = hw.device(0)
    with (
        DiffusionTransferManager(LoopEngine(hw, 4096), hw) as sender,
        DiffusionTransferManager(LoopEngine(hw, 4096), hw) as receiver,
    ):
        there = torch.zeros(2, dtype=torch.int64, device=hw.device_string(0))
        side, other = hw.create_stream(device), hw.create_stream(device)
        read = []
        for number, stages in ((1, True), (2, False)):
            there.fill_(number)
            slot = receiver.grant(sender.size_of(there))
            if stages:
                staged = sender.stage_tensors_async("a batch", there, stream=side)
                seal = sender.push_to_peer(staged, receiver.address, slot, 5)
                staged.free()
            else:
                seal = sender.send_tensors("a batch", there, receiver.address, slot, stream=side)
            receiver.consume(slot)
            loaded = receiver.load_tensors_async(slot, seal, hw.device_string(0), other)
            hw.wait_event(loaded.event)
            read.append(loaded.tree * 10)
            receiver.finish(slot)
        return [str(tensor.device) for tensor in read], torch.stack(read).tolist()


RIGHT = (["npu:0", "npu:0"], [[10, 10], [20, 20]])


def test_a_staged_copy_is_of_this_device(on):
    assert on(staged_copy) == RIGHT


@pytest.mark.parametrize("text", ["cuda:0", "cpu"])
def test_with_the_name_of_another_device_it_is_not(on, text):
    assert on(staged_copy, device_string=lambda index=None: text) != RIGHT


def test_with_the_streams_of_another_device_it_is_not(on):
    assert on(staged_copy, create_stream=lambda device: CpuStream(torch.device("cpu"))) != RIGHT


def test_with_the_events_of_another_device_it_is_not(on):
    assert on(staged_copy, create_event=lambda device: CpuEvent(torch.device("cpu"))) != RIGHT


@pytest.mark.parametrize(
    ("hook", "answer"),
    [
        ("device_string", lambda self, index: "cuda:0"),
        ("create_stream", lambda self, device: CpuStream(torch.device("cpu"))),
    ],
)
def test_a_plugin_that_answers_so_is_refused_when_it_is_activated(hw, hook, answer):
    old = type("Old", (NpuPlugin,), {hook: hwcore.hookimpl(answer)})
    with pytest.raises(PluginReturnError, match=rf"{hook}\(\) .*type `npu`"):
        hwcore.Backend(old())


# --- mrope positions after the join ---------------------------------------------------------------


def planned_positions(hw):
    """Positions planned on the side while the main stream moves what they are made of.

    The plan stream runs at once, and is not told to wait: what SGLang's did.
    """
    from hwcore_sim import device

    deltas = torch.tensor([0, 100], device=hw.device())
    rows = torch.tensor([1], device=hw.device())
    plan = PlanStream(backend=hw, enabled=True)
    hw.synchronize()
    deltas.fill_(200)  # queued, in front of the mark
    with (
        device.drain_policy("eager", plan._stream),
        unordered(hw, plan._stream),
        plan.block(rows) as outputs,
    ):
        outputs["positions"] = torch.tensor([4], device=hw.device())
        outputs["mrope_positions"] = compute_spec_mrope_positions(
            deltas, rows, outputs["positions"], backend=hw
        )
    joined = plan.join(MropeContext(deltas, rows, hw))
    return joined.outputs["mrope_positions"].flatten().tolist()


@contextlib.contextmanager
def unordered(hw, side):
    wait = hw.wait_event
    hw.wait_event = lambda event, stream=None: None if stream == side else wait(event, stream)
    try:
        yield
    finally:
        hw.wait_event = wait


def test_mrope_positions_are_computed_again_after_the_join(on):
    assert on(planned_positions) == [204, 204, 204]


def test_without_it_they_are_those_of_the_plan_stream(on):
    assert on(planned_positions, plan_stream_policy=PlanStreamPolicy) == [104, 104, 104]


# --- mrope positions in the graph's buffer --------------------------------------------------------


def replayed_positions(hw):
    """A graph whose buffer the plan stream filled, replayed with the positions made again."""
    buffer = torch.full((3, 1), 104, device=hw.device())
    graph = hw.create_graph()
    out = hw.graph_capture(graph, lambda: buffer * 1, None, hw.create_stream())
    again = torch.full((3, 1), 204, device=hw.device())
    batch = ReplayBatch(
        (1, 1), (5,), (5,), plan_stream_active=True, recomputed={"mrope_positions": again}
    )
    hw.graph_replay(graph, {"mrope_positions": buffer}, batch)
    return out.flatten().tolist()


def test_a_replay_copies_them_into_the_buffer(on):
    assert on(replayed_positions) == [204, 204, 204]


def test_without_it_the_graph_reads_what_the_plan_stream_wrote(on):
    def graph_replay(graph, buffers, batch):
        graph.native.replay()

    assert on(replayed_positions, graph_replay=graph_replay) == [104, 104, 104]
