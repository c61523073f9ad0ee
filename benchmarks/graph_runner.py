"""What GraphRunner adds to a graph's replay: prepare and replay over bare copies and replay."""

from __future__ import annotations

import torch

import hwcore
from hwcore.cli.measurement import Row, statements
from hwcore.graphs import BATCH, TOKENS, GraphRunner, Slot

_BUCKET = (8, 1)
_SLOTS = {
    "input_ids": Slot(torch.int64, (TOKENS,)),
    "positions": Slot(torch.int64, (TOKENS,)),
    "out_cache_loc": Slot(torch.int64, (TOKENS,)),
    "seq_lens": Slot(torch.int64, (BATCH,), fill=1),
    "req_pool_indices": Slot(torch.int64, (BATCH,)),
    "mrope_positions": Slot(torch.int64, (3, TOKENS)),
}
_STATIC = 300  # about the parameters of a model of 30 layers


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
    """Return the rows of this subject: the CPU, where host time is all there is."""
    torch.set_num_threads(1)
    rounds, calls = (5, 500) if quick else (41, 3_000)
    with torch.no_grad():
        return [
            _overhead("8 of 8 requests", [8], 2.0, rounds, calls),
            _overhead("5 of 8 requests", [5], 2.0, rounds, calls),
            # Every other step makes padding again, which bare copies leave as it was.
            _overhead("8 and 5 by turns", [8, 5], None, rounds, calls),
            _static(rounds, calls),
        ]


def _overhead(what: str, sizes: list[int], target: float | None, rounds: int, calls: int) -> Row:
    """Compare steps of the runner with what one writes by hand for the same graph."""
    hw = hwcore.load_backend("cpu")
    static = {"weights": [torch.zeros(8) for _ in range(4)]}
    with GraphRunner(forward, _SLOTS, [_BUCKET], backend=hw, static=static) as runner:
        runner.capture()
        batches = [(_inputs(size), [7] * size) for size in sizes]
        names = {
            "runner": runner,
            "batches": batches,
            # By hand too the views of the real rows are made beforehand.
            "copies": [
                [
                    (runner.buffers.rows(_BUCKET, len(lens)).real[name], t)
                    for name, t in given.items()
                ]
                for given, lens in batches
            ],
            "graph": runner._set.graphs[_BUCKET].graph,
        }
        each = "for inputs, lens in batches: "
        medians = statements(
            {
                "runner": each + "runner.replay(runner.prepare(inputs, lens))",
                "prepare": each + "runner.prepare(inputs, lens)",
                "bare": (
                    "for pairs in copies:\n"
                    "    for slot, given in pairs: slot.copy_(given)\n"
                    "    graph.replay()"
                ),
                "replay": "for _ in batches: graph.replay()",
            },
            names,
            rounds,
            calls,
        )
    ratio = medians["runner"] / medians["bare"]
    detail = ", ".join(f"{n} {s / len(sizes) * 1e6:.1f} µs" for n, s in medians.items())
    return Row(f"prepare and replay over bare, {what}", ratio, "x", target, True, detail)


def _static(rounds: int, calls: int) -> Row:
    """Measure the look at the addresses of a model's parameters that each replay takes."""
    hw = hwcore.load_backend("cpu")
    model = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(_STATIC // 2)))
    with GraphRunner(forward, _SLOTS, [_BUCKET], backend=hw, static={"model": model}) as runner:
        runner.capture()
        check = {"check": "addresses.moved()"}
        names = {"addresses": runner._set.static}
        seconds = statements(check, names, rounds, max(1, calls // 20))["check"]
    what = f"look at the addresses of {_STATIC} parameters in {_STATIC // 2} modules"
    return Row(what, seconds * 1e6, "µs", None, True, f"{seconds / _STATIC * 1e9:.0f} ns each")


def _inputs(batch_size: int) -> dict[str, torch.Tensor]:
    return {
        name: torch.zeros(slot.shape_for(batch_size, _BUCKET[1]), dtype=slot.dtype)
        for name, slot in _SLOTS.items()
    }
