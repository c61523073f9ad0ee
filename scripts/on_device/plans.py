"""Which steps there are, for tests and for benchmarks."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import TYPE_CHECKING

from scripts.on_device.steps import Step, bench_counts, kit_counts, pytest_counts

if TYPE_CHECKING:
    from hwcore.cli.measurement import Target

__all__ = ["DEVICE_SUBJECTS", "benchmarks", "steps_of", "targets", "tests"]

ROOT = pathlib.Path(__file__).parents[2]

DEVICE_SUBJECTS = ("device_gather", "device_verification", "device_graphs", "device_serving")

_QUICK_S, _LONG_S = 600.0, 3600.0


def tests(backend: str) -> list[Step]:
    """Return the steps of the tests; the long one comes last, should time run out."""
    pytest = ("-m", "pytest", "--backend", backend, "--junitxml", "{result}")
    kit = ("-m", "hwcore.cli", "conformance", "--backend", backend, "--json", "{result}")
    demo = ("-m", "examples.serving", "--short", "--out")
    same = ("--same-as", "{out}/serving-on-cpu/tokens.json")
    own = pathlib.Path("plugins", backend, "tests")
    plugin = [str(own)] if (ROOT / own).is_dir() else []
    on_cpu = Step(
        "serving-on-cpu",
        (*demo, "{own}"),
        _QUICK_S,
        missing=lambda out: _no_model(),
        environ={"HWCORE_BACKEND": "cpu"},
    )
    return [
        Step("conformance", kit, _QUICK_S * 2, kit_counts),
        Step("sanitizer", (*kit, "-k", "sanitizer"), _QUICK_S, kit_counts),
        Step("races", (*pytest, "tests/races"), _QUICK_S, pytest_counts),
        on_cpu,
        Step(
            "serving",
            (*demo, "{own}", *same),
            _QUICK_S,
            missing=lambda out: _no_model() or _no_tokens(out),
            environ={"HWCORE_BACKEND": backend},
        ),
        Step(
            "suite",
            (*pytest, "-m", "not children and not interpreter", "tests", *plugin),
            _LONG_S,
            pytest_counts,
        ),
    ]


def benchmarks(backend: str, quick: bool = False) -> list[Step]:
    """Return a step for each subject that makes sense on a device."""
    variables = {"HWCORE_BACKEND": backend}
    bench = ("-m", "hwcore.cli", "bench", *(["--quick"] if quick else []), "--json", "{result}")
    plain = [
        _bench(Step(subject, (*bench, subject), _QUICK_S, bench_counts, environ=variables))
        for subject in (*DEVICE_SUBJECTS, "dispatch")
    ]
    speculation = Step(
        "speculation",
        (*bench, "speculation"),
        _QUICK_S * 2,
        bench_counts,
        missing=lambda out: _no_model(),
        environ=variables,
    )
    return [*plain, _bench(speculation)]


def _bench(step: Step) -> Step:
    """Return a step whose status 1 says that a target was missed; its rows are there."""
    return dataclasses.replace(step, fine=(0, 1), done="ran")


def steps_of(kind: str, backend: str, quick: bool = False) -> list[Step]:
    """Return the steps of ``tests`` or ``benchmarks``."""
    return tests(backend) if kind == "tests" else benchmarks(backend, quick)


def targets() -> list[Target]:
    """Return what the benchmarks of devices are held to, in the order of their tables."""
    from hwcore.cli.bench import load

    found: list[Target] = []
    for subject in DEVICE_SUBJECTS:
        found += load(subject).TARGETS
    return found


def _no_model() -> str:
    """Say what the demo lacks; empty where it can run."""
    try:
        from examples.serving import weights
    except ImportError as error:
        return f"{error}; bring what is missing with `make gpu-wheels`"
    return weights.missing()


def _no_tokens(out: pathlib.Path) -> str:
    file = out / "serving-on-cpu/tokens.json"
    try:
        json.loads(file.read_bytes())
    except (OSError, ValueError):
        return "the cpu gave no tokens to compare with"
    return ""
