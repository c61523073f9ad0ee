"""Graphs: what capture does once and replay again, into the same addresses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from hwcore.testing.conformance.kit import conforms
from hwcore.testing.conformance.late import host_goes_on
from hwcore.types import ReplayBatch

if TYPE_CHECKING:
    from collections.abc import Callable

    from hwcore.testing.conformance.kit import Kit
    from hwcore.testing.conformance.late import LateWrite
    from hwcore.types import Stream

_MANY_GRAPHS = 24


class _RaisedInTestError(Exception):
    pass


class Graphs:
    # --- Capture ---

    @conforms("graph_capture", needs="graphs")
    def test_capture_calls_the_function_once(self, kit: Kit) -> None:
        x, calls = kit.tensor([1.0]), []

        def step() -> torch.Tensor:
            calls.append(1)
            return x + 1

        _capture(kit, step)
        kit.same("calls of fn", len(calls), 1, "for fn runs once", "Call fn once")

    @conforms("graph_capture", needs="graphs")
    def test_capture_records_the_work_and_does_it_only_by_quirk(self, kit: Kit) -> None:
        counter = kit.tensor([0.0])
        _capture(kit, lambda: counter.add_(1))
        executes = kit.has_quirk("capture_executes")
        why = f"{'with' if executes else 'without'} the quirk `capture_executes`"
        fix = "Only record the work while capturing, or declare the quirk"
        got = kit.raw.read(counter)
        expected = torch.tensor([1.0 if executes else 0.0])
        kit.same("a counter that fn increments", got, expected, why, fix)

    @conforms("graph_capture", needs="graphs")
    def test_capture_runs_on_the_stream_given_and_restores(self, kit: Kit) -> None:
        before, stream, x = kit.hw.current_stream(), kit.stream(), kit.tensor([1.0])
        seen: list[Stream] = []

        def step() -> torch.Tensor:
            seen.append(kit.hw.current_stream())
            return x + 1

        _capture(kit, step, stream=stream)
        fix = "Capture on `stream`, and make the former one current again"
        kit.same("the current stream of fn", seen[0], stream, "the stream given", fix)
        after = kit.hw.current_stream()
        kit.same("the current stream after it", after, before, "the one from before", fix)

    @conforms("graph_capture", needs="graphs")
    def test_capture_needs_no_stream(self, kit: Kit) -> None:
        before, x = kit.hw.current_stream(), kit.tensor([1.0])
        graph = kit.hw.create_graph()
        out = kit.hw.graph_capture(graph, lambda: x + 1)
        kit.raw.settle()
        after = kit.hw.current_stream()
        fix = "Take a side stream of your own where none is given"
        kit.same("the current stream after it", after, before, "the one from before", fix)
        x.fill_(5.0)
        kit.hw.graph_replay(graph)
        kit.same("a replay's result", kit.raw.read(out), torch.tensor([6.0]), "its value", fix)

    @conforms("graph_capture", needs="graphs")
    def test_capture_returns_what_the_function_returned(self, kit: Kit) -> None:
        x = kit.tensor([1.0])
        _, outputs = _capture(kit, lambda: (x + 1, [x * 2, None], {"a": (x * 3,)}, 5, "text"))
        fix = "Return the outputs of fn as they are"
        got = _structure(outputs)
        expected = "(Tensor, [Tensor, None], {'a': (Tensor,)}, 5, 'text')"
        kit.same("the form of the outputs", got, expected, "as fn returned them", fix)

    @conforms("graph_capture", needs="graphs")
    def test_an_exception_of_the_function_leaves_stream_and_graph_as_before(self, kit: Kit) -> None:
        before, x = kit.hw.current_stream(), kit.tensor([1.0])
        graph = kit.hw.create_graph()

        def fails() -> None:
            x.add(1)
            message = "raised by fn"
            raise _RaisedInTestError(message)

        got: object = "no exception"
        try:
            kit.hw.graph_capture(graph, fails, kit.hw.graph_pool(), kit.stream())
        except _RaisedInTestError as error:
            got = error
        fix = "Let the exception of fn pass"
        raised = isinstance(got, _RaisedInTestError)
        kit.that(raised, "the caller", got, "the exception that fn raised", fix)
        fix = "Restore the stream in a `finally`"
        after = kit.hw.current_stream()
        kit.same("the current stream after it", after, before, "the one from before", fix)
        capturing = kit.hw.is_capturing()
        fix = "End the capture in a `finally`"
        kit.that(not capturing, "is_capturing() after it", capturing, "False", fix)
        out = kit.hw.graph_capture(graph, lambda: x + 1, kit.hw.graph_pool(), kit.stream())
        kit.hw.graph_replay(graph)
        fix = "Leave the graph empty, for another capture"
        got = kit.raw.read(out)
        kit.same("a second capture's result", got, torch.tensor([2.0]), "its value", fix)

    @conforms("graph_capture", needs="graphs")
    def test_a_host_read_while_capturing_is_an_error(self, kit: Kit) -> None:
        x, read = kit.tensor([3.0]), []
        graph = kit.hw.create_graph()
        try:
            kit.hw.graph_capture(graph, lambda: read.append(x.item()), None, kit.stream())
        except Exception:  # noqa: BLE001 - whatever the device says
            read.clear()
        fix = "Raise: the value would be frozen, or is not there yet"
        kit.that(not read, "x.item() in fn", read, "an exception", fix)
        kit.same("the device after it", kit.raw.read(x + 1).item(), 4.0, "a working one", fix)

    @conforms("is_capturing", needs="graphs")
    def test_is_capturing_is_true_within_a_capture_only(self, kit: Kit) -> None:
        x, seen = kit.tensor([1.0]), []

        def step() -> torch.Tensor:
            seen.append(kit.hw.is_capturing())
            return x + 1

        fix = "Ask the device about the calling thread's current stream"
        got = kit.hw.is_capturing()
        kit.that(not got, "before a capture", got, "False", fix)
        _capture(kit, step)
        kit.that(seen == [True], "within a capture", seen, "[True]", fix)
        got = kit.hw.is_capturing()
        kit.that(not got, "after a capture", got, "False", fix)

    @conforms("is_capturing", needs="graphs")
    def test_is_capturing_is_about_the_calling_thread(self, kit: Kit) -> None:
        x, idle, seen = kit.tensor([1.0]), kit.stream(), []

        def ask() -> bool:
            with kit.raw.on(idle):
                return kit.hw.is_capturing()

        def step() -> torch.Tensor:
            seen.append(kit.in_thread(ask))
            return x + 1

        _capture(kit, step)
        fix = "Ask the device about the calling thread's current stream"
        kit.same("in another thread, within a capture", seen, [False], "for it captures none", fix)

    @conforms("create_graph", needs="graphs")
    def test_every_graph_holds_its_own_work(self, kit: Kit) -> None:
        empty = [kit.hw.create_graph() for _ in range(2)]
        kit.that(empty[0] is not empty[1], "a second graph", empty[1], "another", "Make a new one")
        x = kit.tensor([3.0])
        first, one = _capture(kit, lambda: x + 1)
        second, ten = _capture(kit, lambda: x * 10)
        for value in (4.0, 5.0):
            x.fill_(value)
            for graph in (first, second):
                kit.hw.graph_replay(graph)
            got = torch.cat([kit.raw.read(one), kit.raw.read(ten)])
            expected = torch.tensor([value + 1, value * 10])
            kit.same("two graphs' results", got, expected, "each its own", "Make a new graph")

    @conforms("graph_pool", needs="graphs")
    def test_graphs_that_share_a_pool_replay_in_the_order_of_capture(self, kit: Kit) -> None:
        pool, stream, x = kit.hw.graph_pool(), kit.stream(), kit.tensor([1.0])
        graphs = []
        for factor in (1.0, 2.0, 3.0):

            def step(factor: float = factor) -> torch.Tensor:
                return (x * factor + 1) * 2

            graphs.append((factor, *_capture(kit, step, pool, stream)))
        for value in (1.0, 6.0):
            x.fill_(value)
            for factor, graph, out in graphs:
                kit.hw.graph_replay(graph)
                got, expected = kit.raw.read(out), torch.tensor([(value * factor + 1) * 2])
                fix = "Return a pool that graphs may share, or None"
                kit.same("a result", got, expected, "from the inputs of this replay", fix)

    @conforms("graph_capture", needs="graphs")
    def test_many_graphs_each_on_a_stream_of_its_own(self, kit: Kit) -> None:
        x = kit.tensor([1.0])
        made: list[tuple[int, Any, torch.Tensor]] = []
        limited = kit.has_quirk("capture_stream_limit")
        try:
            for number in range(_MANY_GRAPHS):
                graph, out = _capture(kit, lambda n=number: x + n, stream=kit.stream())
                made.append((number, graph, out))
        except RuntimeError as error:
            expected = f"{_MANY_GRAPHS} captures, or the quirk `capture_stream_limit`"
            said = f"{error!r} in capture {len(made) + 1}"
            kit.that(limited and bool(made), "capturing", said, expected, "Declare the quirk")
        x.fill_(5.0)
        for number, graph, out in made:
            kit.hw.graph_replay(graph)
            own = torch.tensor([5.0 + number])
            fix = "Keep the graphs apart"
            kit.same(f"graph {number}", kit.raw.read(out), own, "its own result", fix)

    # --- Replay ---

    @conforms("graph_replay", needs="graphs")
    def test_replay_reads_the_inputs_of_now(self, kit: Kit) -> None:
        x = kit.tensor([1.0, 2.0])
        graph, out = _capture(kit, lambda: x * 2 + 1)
        for value in (3.0, -4.0):
            x.fill_(value)
            kit.hw.graph_replay(graph)
            expected = torch.full((2,), value * 2 + 1)
            fix = "Run the captured work on what its inputs hold now"
            kit.same("an output", kit.raw.read(out), expected, "from the new inputs", fix)

    @conforms("graph_replay", needs="graphs")
    def test_replay_writes_into_the_outputs_of_capture(self, kit: Kit) -> None:
        x = kit.tensor([1.0])
        graph, outputs = _capture(kit, lambda: {"a": x + 1, "b": [x * 2]})
        a, b = outputs["a"], outputs["b"][0]
        addresses = a.data_ptr(), b.data_ptr()
        x.fill_(10.0)
        kit.hw.graph_replay(graph)
        fix = "Let replay write to the addresses that capture returned"
        got = torch.cat([kit.raw.read(a), kit.raw.read(b)])
        kit.same("the outputs of capture", got, torch.tensor([11.0, 20.0]), "replayed", fix)
        after = a.data_ptr(), b.data_ptr()
        kit.same("their addresses", after, addresses, "unchanged", fix)

    @conforms("graph_replay", needs="graphs")
    def test_replay_runs_the_work_once_and_not_the_function(self, kit: Kit) -> None:
        counter, calls = kit.tensor([0.0]), []

        def step() -> torch.Tensor:
            calls.append(1)
            return counter.add_(1)

        graph, _ = _capture(kit, step)
        counter.zero_()
        captured = len(calls)
        for _ in range(2):
            kit.hw.graph_replay(graph)
        got = kit.raw.read(counter)
        fix = "Replay the recorded work, once a call"
        kit.same("a counter after two replays", got, torch.tensor([2.0]), "one for each", fix)
        kit.same("calls of fn by them", len(calls) - captured, 0, "for fn is not run again", fix)

    @conforms("graph_replay", needs="graphs")
    def test_replay_runs_on_the_current_stream(self, kit: Kit) -> None:
        stream = kit.stream()
        _replay_behind_work(kit, stream, stream)

    @conforms("graph_replay", needs="graphs")
    def test_replay_runs_on_another_stream_than_capture_did(self, kit: Kit) -> None:
        _replay_behind_work(kit, kit.stream(), kit.stream())

    @conforms("graph_replay", needs=("graphs", "async_streams"))
    def test_the_host_does_not_wait_in_graph_replay(self, kit: Kit) -> None:
        x = kit.tensor([1.0])
        graph, _ = _capture(kit, lambda: x + 1)

        def call(late: LateWrite) -> None:
            with kit.raw.on(late.stream):
                kit.hw.graph_replay(graph)

        host_goes_on(kit, call)

    @conforms("graph_replay", needs="graphs")
    def test_replay_takes_buffers_and_batch(self, kit: Kit) -> None:
        x = kit.tensor([1.0, 1.0])
        graph, out = _capture(kit, lambda: x + 1)
        x.fill_(2.0)
        batch = ReplayBatch((2, 1), (5,), (5, 1), "decode", plan_stream_active=True)
        kit.hw.graph_replay(graph, {"x": x}, batch)
        fix = "Ignore what the device has no use for"
        kit.same("an output", kit.raw.read(out), torch.full((2,), 3.0), "replayed", fix)

    @conforms("plan_stream_policy", needs="graphs")
    def test_what_is_recomputed_after_the_join_reaches_the_graph(self, kit: Kit) -> None:
        for name in sorted(kit.hw.plan_stream_policy().recompute_after_join):
            buffer, recomputed = kit.tensor([1.0]), kit.tensor([9.0])
            graph, out = _capture(kit, lambda buffer=buffer: buffer + 1)
            batch = ReplayBatch(
                (1, 1), (5,), (5,), plan_stream_active=True, recomputed={name: recomputed}
            )
            kit.hw.graph_replay(graph, {name: buffer}, batch)
            fix = "Copy batch.recomputed into buffers before the replay"
            got, expected = kit.raw.read(out), torch.tensor([10.0])
            why = f"from the recomputed `{name}`"
            kit.same("an output", got, expected, why, fix, hook="graph_replay")

    @conforms("plan_stream_policy")
    def test_the_plan_stream_policy_is_the_same_every_time(self, kit: Kit) -> None:
        first, second = kit.hw.plan_stream_policy(), kit.hw.plan_stream_policy()
        fix = "Let it look at nothing that changes: the core asks once"
        kit.same("a second answer", second, first, "the first answer", fix)


def _replay_behind_work(kit: Kit, captured_on: Stream, stream: Stream) -> None:
    """Replay in a stream behind slow work that the graph's result depends on."""
    x, fresh = kit.tensor([1.0]), kit.tensor([7.0])
    graph, out = _capture(kit, lambda: x + 1, stream=captured_on)
    with kit.raw.on(stream):
        kit.raw.stall(stream)
        x.copy_(fresh)
        kit.hw.graph_replay(graph)
    got = kit.raw.read(out, stream)
    fix = "Replay on the current stream, behind the work now in it"
    why = "from the input written before it in the same stream"
    kit.same("an output", got, torch.tensor([8.0]), why, fix)


def _structure(outputs: object) -> str:
    """Return the repr of nested outputs, with every tensor in it as ``Tensor``."""
    if isinstance(outputs, torch.Tensor):
        return "Tensor"
    if isinstance(outputs, dict):
        return "{" + ", ".join(f"{k!r}: {_structure(v)}" for k, v in outputs.items()) + "}"
    if isinstance(outputs, list):
        return "[" + ", ".join(map(_structure, outputs)) + "]"
    if isinstance(outputs, tuple):
        comma = "," if len(outputs) == 1 else ""
        return "(" + ", ".join(map(_structure, outputs)) + comma + ")"
    return repr(outputs)


def _capture(
    kit: Kit, fn: Callable[..., Any], pool: object = None, stream: Stream | None = None
) -> tuple[Any, Any]:
    """Capture in a new graph, on a side stream as devices demand; return graph and outputs."""
    graph = kit.hw.create_graph()
    kit.raw.settle()
    outputs = kit.hw.graph_capture(graph, fn, pool, stream or kit.stream())
    kit.raw.settle()
    return graph, outputs
