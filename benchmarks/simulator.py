"""What the simulated device costs: its operators over the CPU's, its start over torch's import."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
import time

import torch

from hwcore.cli.measurement import Row, interleaved, nanoseconds

OPERATORS = {
    "add": "a + a",
    "index": "a[i]",
    "cat": "torch.cat((a, a))",
}


def run(quick: bool = False) -> list[Row]:
    """Return the rows of this subject, or one with a remark where the device cannot be had.

    They are measured in a process of its own: once registered, the device is the process's
    accelerator, which is not what the other subjects measure.
    """
    if importlib.util.find_spec("hwcore_sim") is None:
        return _remark("hwcore-sim is not installed: `pip install hwcore-sim`")
    done = subprocess.run(
        [sys.executable, __file__, *(["--quick"] if quick else [])],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        return _remark(done.stderr.strip().splitlines()[-1])
    return [Row(**row) for row in json.loads(done.stdout)]


def _remark(text: str) -> list[Row]:
    return [Row("the simulated device was not measured", 0.0, "", None, True, text)]


def measure(quick: bool) -> list[Row]:
    """Measure in this process, which the device then belongs to."""
    from hwcore_sim import device

    device.start()
    torch.set_num_threads(1)
    eager = _operators("eager", 5.0, quick)
    return [*eager, *_operators("lazy", None, quick), _start(quick)]


def _operators(policy: str, target: float | None, quick: bool) -> list[Row]:
    """Compare small operators; under lazy the figure is submitting and running together."""
    from hwcore_sim.device import set_drain_policy

    set_drain_policy(policy)
    rounds, calls = (5, 500) if quick else (25, 5_000)
    names = {
        where: {
            "torch": torch,
            "a": torch.randn(16, 64, device=where),
            "i": torch.arange(8, device=where),
        }
        for where in ("cpu", _device_type())
    }
    rows = []
    for name, source in OPERATORS.items():
        medians = interleaved(
            {
                where: lambda source=source, names=given: _seconds(source, names, calls)  # type: ignore[misc]
                for where, given in names.items()
            },
            rounds,
        )
        here, there = medians["cpu"], medians[_device_type()]
        what = f"small {name}, {policy}, over the CPU's"
        rows.append(Row(what, there / here, "x", target, True, nanoseconds(medians)))
    return rows


def _seconds(source: str, names: dict[str, object], calls: int) -> float:
    """Return the seconds of one execution, the wait for the device included."""
    code = compile(f"for _ in range({calls}): {source}", "<benchmark>", "exec")
    started = time.perf_counter()
    exec(code, dict(names))
    torch.accelerator.synchronize()
    return (time.perf_counter() - started) / calls


def _device_type() -> str:
    current = torch.accelerator.current_accelerator()
    assert current is not None
    return current.type


def _start(quick: bool) -> Row:
    """Measure start in fresh processes, the device being built already."""
    code = (
        "import torch, time; started = time.perf_counter(); from hwcore_sim import device; "
        "device.start(); print(time.perf_counter() - started)"
    )

    def once() -> float:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=600
        )
        return float(done.stdout)

    medians = interleaved({"start": once}, 1 if quick else 5)
    what = "start of the built device, beyond importing torch"
    return Row(what, medians["start"], "s", 0.5, True, "median of fresh processes")


if __name__ == "__main__":
    print(json.dumps([dataclasses.asdict(row) for row in measure("--quick" in sys.argv)]))
