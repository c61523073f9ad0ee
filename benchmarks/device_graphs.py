"""What GraphRunner adds to a graph's replay on a device: host time over the bare graph's own.

By the host's clock around each call alone, its median, for a replay is launched and not waited for:
what is in flight is drained, unmeasured, before the device's queue can fill up. The graph is of one
call, a decode step's inputs go into it, and the runner looks at the addresses of as many tensors
as a model's layer has.
"""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

import torch

from hwcore.cli.device_clock import accelerator
from hwcore.cli.measurement import Row, Target, interleaved
from hwcore.graphs import BATCH, TOKENS, GraphRunner, Slot

if TYPE_CHECKING:
    from collections.abc import Callable

    from hwcore.backend import Backend

ON_DEVICE = True
REPLAY = Target("`GraphRunner.replay` over the bare graph's replay, 8 of 8 requests", 15.0, "µs")
PADDED = Target("`GraphRunner.replay` over the bare graph's replay, 5 of 8 requests", 15.0, "µs")
STEP = Target("prepare and replay over bare copies and replay, 8 of 8 requests", None, "µs")
TARGETS = [REPLAY, PADDED, STEP]

_BUCKET = (8, 1)
_IN_FLIGHT = 16  # steps: far from what a device's queue holds
_SLOTS = {
    "input_ids": Slot(torch.int64, (TOKENS,)),
    "positions": Slot(torch.int64, (TOKENS,)),
    "out_cache_loc": Slot(torch.int64, (TOKENS,)),
    "seq_lens": Slot(torch.int64, (BATCH,), fill=1),
    "req_pool_indices": Slot(torch.int64, (BATCH,)),
    "mrope_positions": Slot(torch.int64, (3, TOKENS)),
}


def forward(
    input_ids: torch.Tensor,
    positions: torch.Tensor,
    out_cache_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    req_pool_indices: torch.Tensor,
    mrope_positions: torch.Tensor,
) -> torch.Tensor:
    """Add two inputs: a graph of one call, so that what is around it is what is measured."""
    return input_ids + positions


def run(quick: bool = False) -> list[Row]:
    """Return the rows of this subject."""
    hw = accelerator()
    rounds = (3, 10) if quick else (21, 40)
    with torch.no_grad():
        full, padded = _measure(hw, 8, *rounds), _measure(hw, 5, *rounds)
    return [
        *(_added(target, times) for target, times in ((REPLAY, full), (PADDED, padded))),
        STEP.row(
            1e6 * (full["whole step"] - full["copies and bare"]),
            ", ".join(f"{name} {1e6 * full[name]:.1f} µs" for name in full if name != "bare"),
        ),
    ]


def _added(target: Target, times: dict[str, float]) -> Row:
    detail = f"{1e6 * times['replay']:.1f} and {1e6 * times['bare']:.1f} µs of the host"
    return target.row(1e6 * (times["replay"] - times["bare"]), detail)


def _measure(hw: Backend, size: int, rounds: int, batches: int) -> dict[str, float]:
    """Return the host's seconds of a replay and of a whole step, and of the same by hand."""
    device = hw.device()
    static = {"weights": [torch.zeros(8, device=device) for _ in range(9)]}
    inputs = {
        name: torch.zeros(slot.shape_for(size, _BUCKET[1]), dtype=slot.dtype, device=device)
        for name, slot in _SLOTS.items()
    }
    lens = (7,) * size
    with GraphRunner(
        forward, _SLOTS, [_BUCKET], backend=hw, static=static, progress=False
    ) as runner:
        runner.capture()
        graph = runner._set.graphs[_BUCKET].graph
        bare = getattr(graph, "native", None) or graph
        pairs = [(runner.buffers.rows(_BUCKET, size).real[n], given) for n, given in inputs.items()]

        def prepare() -> object:
            return runner.prepare(inputs, lens)

        def by_hand(_: object) -> None:
            for slot, given in pairs:
                slot.copy_(given)
            bare.replay()

        steps: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
            "replay": (prepare, runner.replay),
            "bare": (prepare, lambda _: bare.replay()),
            "whole step": (lambda: None, lambda _: runner.replay(runner.prepare(inputs, lens))),
            "copies and bare": (lambda: None, by_hand),
        }
        timed = {name: _timer(hw, *step, batches) for name, step in steps.items()}
        return interleaved(timed, rounds)


def _timer(
    hw: Backend,
    before: Callable[[], Any],
    call: Callable[[Any], object],
    batches: int,
) -> Callable[[], float]:
    """Return a measurement: the median of some calls, each after what is not measured."""

    def measure() -> float:
        seconds = []
        for _ in range(batches):
            hw.synchronize()
            for _ in range(_IN_FLIGHT):
                given = before()
                begun = time.perf_counter()
                call(given)
                seconds.append(time.perf_counter() - begun)
        return statistics.median(seconds)

    return measure
