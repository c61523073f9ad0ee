"""The graph runner: what the core's padded replay needs of a backend, all of it together."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hwcore.graphs import BATCH, TOKENS, GraphRunner, Slot
from hwcore.testing.conformance.kit import conforms
from hwcore.testing.conformance.late import host_goes_on

if TYPE_CHECKING:
    from hwcore.testing.conformance.kit import Kit
    from hwcore.testing.conformance.late import LateWrite

_BUCKETS = [(1, 1), (2, 1), (4, 1), (2, 3)]
_WAIT = "Make later work of the waiting stream wait for the event"
_SLOTS = {
    "x": Slot(torch.float32, (TOKENS,), fill=100.0),
    "positions": Slot(torch.int64, (3, TOKENS), fill=-1),
    "scale": Slot(torch.float32, (BATCH,), fill=5.0),
}


class GraphRunners:
    @conforms("graph_replay", needs="graphs")
    def test_a_padded_replay_gives_what_the_function_gives(self, kit: Kit) -> None:
        with _runner(kit) as runner:
            for size, width in ((4, 1), (3, 1), (2, 3), (1, 3), (1, 1), (2, 1), (4, 1)):
                inputs, expected = _batch(kit, size, width)
                got = runner.run(inputs, (7,) * size, width)
                fix = "Replay the captured work on what its inputs hold now"
                for name, part in expected.items():
                    what = f"output `{name}` of {size} requests of {width} tokens"
                    kit.same(what, kit.raw.read(got[name]), part, "from the real rows", fix)

    @conforms("graph_pool", needs="graphs")
    def test_graphs_of_all_buckets_replay_in_any_order(self, kit: Kit) -> None:
        with _runner(kit) as runner:
            for number in (3, 0, 2, 1, 2, 0, 3):
                size, width = _BUCKETS[number]
                inputs, expected = _batch(kit, size, width)
                got = kit.raw.read(runner.run(inputs, (7,) * size, width)["sum"])
                fix = "Return a pool that graphs may share, or None"
                kit.same("an output", got, expected["sum"], "whichever graph ran before", fix)

    @conforms("graph_replay", needs="graphs")
    def test_padding_holds_its_fill_when_the_graph_runs(self, kit: Kit) -> None:
        seen = kit.tensor([0.0] * 4)

        def step(x: torch.Tensor) -> torch.Tensor:
            seen.copy_(x)
            return x * 2

        slots = {"x": _SLOTS["x"]}
        with GraphRunner(step, slots, [(4, 1)], backend=kit.hw, device=kit.device) as runner:
            runner.capture()
            for size in (4, 2, 3, 0):
                runner.run({"x": kit.tensor([1.0] * size)}, (7,) * size)
                expected = torch.tensor([1.0] * size + [100.0] * (4 - size))
                fix = "Run the work of one stream in its order"
                kit.same("what the graph read", kit.raw.read(seen), expected, "padded", fix)

    @conforms("wait_event", needs="graphs")
    def test_a_replay_waits_for_inputs_prepared_on_another_stream(self, kit: Kit) -> None:
        untrusted = kit.hw.plan_stream_policy().recompute_after_join
        with _runner(kit) as runner:
            plan, main = kit.stream(), kit.stream()
            inputs, expected = _batch(kit, 3)
            with kit.raw.on(plan):
                kit.raw.stall(plan)
                prepared = runner.prepare(inputs, (7,) * 3)
            with kit.raw.on(main):
                again = {name: inputs[name] for name in untrusted & inputs.keys()}
                got = runner.replay(prepared, again)["sum"]
            why = "from inputs that another stream copied in, late"
            kit.same("an output", kit.raw.read(got, main), expected["sum"], why, _WAIT)

    @conforms("wait_event", needs="graphs")
    def test_inputs_of_a_replay_in_flight_are_not_overwritten(self, kit: Kit) -> None:
        with _runner(kit) as runner:
            plan, main = kit.stream(), kit.stream()
            (inputs, expected), (following, _) = _batch(kit, 3), _batch(kit, 3, add=50)
            with kit.raw.on(main):
                prepared = runner.prepare(inputs, (7,) * 3)
                kit.raw.settle()
                kit.raw.stall(main)
                got = runner.replay(prepared)["sum"]
            with kit.raw.on(plan):
                runner.prepare(following, (7,) * 3)
            plan.synchronize()
            why = "from its own inputs, while the next batch's were copied in on another stream"
            kit.same("an output", kit.raw.read(got, main), expected["sum"], why, _WAIT)

    @conforms("graph_replay", needs=("graphs", "async_streams"))
    def test_the_host_waits_in_neither_prepare_nor_replay(self, kit: Kit) -> None:
        with _runner(kit) as runner:
            inputs, _ = _batch(kit, 3)
            runner.run(inputs, (7,) * 3)

            def call(late: LateWrite) -> None:
                with kit.raw.on(late.stream):
                    runner.run(inputs, (7,) * 3)

            host_goes_on(kit, call)

    @conforms("create_graph", needs="graphs")
    def test_graphs_are_captured_again_after_they_were_released(self, kit: Kit) -> None:
        with _runner(kit) as runner:
            inputs, expected = _batch(kit, 3)
            for _ in range(3):
                runner.recapture()
                got = kit.raw.read(runner.run(inputs, (7,) * 3)["sum"])
                kit.same("an output", got, expected["sum"], "from a new graph", "Make new graphs")


def _runner(kit: Kit) -> GraphRunner:
    """Return a runner that replays; if it does not, no other hook is to be blamed for it."""
    runner = GraphRunner(_step, _SLOTS, _BUCKETS, backend=kit.hw, device=kit.device)
    runner.capture()
    for add in (0, 20):
        inputs, expected = _batch(kit, 2, add=add)
        got = kit.raw.read(runner.run(inputs, (7,) * 2)["sum"])
        fix = "Replay the captured work on what its inputs hold now"
        what = "the first replays' output"
        kit.same(what, got, expected["sum"], "from their inputs", fix, hook="graph_replay")
    return runner


def _step(x: torch.Tensor, positions: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
    """Compute what is exact on any device: a value a token, and one a request."""
    tokens = x + positions.sum(0)
    per_request = tokens.view(scale.shape[0], -1)
    return {"sum": tokens, "scaled": per_request.sum(1) * scale}


def _batch(
    kit: Kit, size: int, width: int = 1, add: int = 0
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return inputs on the device, and what the step gives for them on the host."""
    count = size * width
    positions = [[add + 10 * row + column for column in range(count)] for row in range(3)]
    inputs = {
        "x": kit.tensor([add + 1.5 * n for n in range(count)]),
        "positions": kit.tensor(positions, torch.int64),
        "scale": kit.tensor([n + 2.0 for n in range(size)]),
    }
    return inputs, _step(**{name: tensor.cpu() for name, tensor in inputs.items()})
