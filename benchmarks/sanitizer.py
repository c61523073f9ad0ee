"""What the race sanitizer costs per op, over the plain op of the same rounds.

On the simulated device, each op run at once (drain policy ``eager``), for a device's own time would
hide the sanitizer's. On cpu for information: there is less under an op to hide behind.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

from hwcore import discovery
from hwcore.cli.measurement import Row, interleaved

if TYPE_CHECKING:
    from collections.abc import Callable

TARGET = 20

OPS = {
    "add": "x + y",
    "add in place": "x.add_(y)",
    "add to a column beside another stream's": "column.add_(1)",
    "gather rows": "x[rows]",
    "cat": "torch.cat([x, y])",
    "read back": "x[0, 0].item()",
}


def run(quick: bool = False) -> list[Row]:
    """Return the rows of this subject."""
    rounds, calls = (3, 300) if quick else (15, 2000)
    installed = {entry.name for entry in discovery.declared("hwcore.backends")}
    rows = []
    if "sim" in installed:
        rows += _measured("sim", rounds, calls, TARGET)
    else:
        missing = "hwcore-sim is not installed: pip install hwcore-sim"
        rows.append(Row(f"sim: not measured, {missing}", float("nan"), "x", TARGET, True, ""))
    return rows + _measured("cpu", rounds, calls, None)


def _measured(backend: str, rounds: int, calls: int, target: float | None) -> list[Row]:
    """Measure in a process of its own: a process runs one backend."""
    done = subprocess.run(
        [sys.executable, __file__, backend, str(rounds), str(calls)],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    if done.returncode:
        message = f"the measurement on {backend} failed: {done.stderr.strip()}"
        raise RuntimeError(message)
    rows = []
    for name, (plain, watched) in json.loads(done.stdout).items():
        detail = f"{watched * 1e6:.1f} us, plain {plain * 1e6:.1f} us"
        rows.append(Row(f"{backend}: {name}", watched / plain, "x", target, True, detail))
    return rows


def _measure(name: str, rounds: int, calls: int) -> dict[str, tuple[float, float]]:
    """Return for each op the medians of plain and watched seconds, in the process for it."""
    import timeit

    import torch

    import hwcore
    from hwcore.testing.sanitizer import Sanitizer

    torch.set_num_threads(1)
    backend = hwcore.use(name)
    if name == "sim":
        from hwcore_sim import device

        device.set_drain_policy("eager")
    x, y = (torch.ones(8, 8, device=backend.device()) for _ in range(2))
    table = torch.ones(8, 8, device=backend.device())
    side = backend.create_stream()
    names = {
        "torch": torch,
        "x": x,
        "y": y,
        "column": table[:, 1],
        "rows": torch.tensor([0, 1], device=backend.device()),
    }

    def plain(op: str) -> Callable[[], float]:
        timer = timeit.Timer(OPS[op], globals=names)
        return lambda: timer.timeit(calls) / calls

    def watched(op: str) -> Callable[[], float]:
        measure = plain(op)

        def measure_watched() -> float:
            with Sanitizer(backend):
                with backend.stream_context(side):
                    table[:, 3].add_(1)  # never waited for: each call compares the columns
                seconds = measure()
                backend.synchronize()
            return seconds

        return measure_watched

    subjects = {f"plain {op}": plain(op) for op in OPS}
    subjects |= {f"watched {op}": watched(op) for op in OPS}
    medians = interleaved(subjects, rounds)
    return {op: (medians[f"plain {op}"], medians[f"watched {op}"]) for op in OPS}


if __name__ == "__main__":
    print(json.dumps(_measure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
