"""Steps: a command in a process of its own, with a time limit, and what is known of it after."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
from typing import IO, TYPE_CHECKING, Any, Literal
from xml.etree import ElementTree

from hwcore.probing import kill

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = [
    "NothingRanError",
    "Outcome",
    "Result",
    "Step",
    "bench_counts",
    "kit_counts",
    "last_lines",
    "pytest_counts",
    "run",
]

Outcome = Literal["passed", "ran", "failed", "out of time", "not run"]
"""``passed``: by tests of its own; ``ran``: there is nothing to pass, figures speak."""

ROOT = pathlib.Path(__file__).parents[2]

_SHOWN = 40  # lines of a step that failed


class NothingRanError(Exception):
    """Raised by what counts, where a step ended well and had nothing to do here."""


@dataclasses.dataclass(frozen=True)
class Step:
    """One command.

    Attributes
    ----------
    name : str
    command : tuple of str
        What follows ``python``. ``{out}`` stands for the folder of the run's results, ``{result}``
        and ``{own}`` for this step's own file and folder there, which begin empty.
    limit_s : float
    counts : callable
        Reads the step's file; says in words what was counted.
    missing : callable
        Says what input there is not, and how to bring it; empty where the step can run.
    environ : Mapping of str to str
    fine : tuple of int
        Exit statuses of a step that did what it is for.
    done : {"passed", "ran"}
        What such a step is said to have done.
    """

    name: str
    command: tuple[str, ...]
    limit_s: float
    counts: Callable[[pathlib.Path], str] = lambda file: ""
    missing: Callable[[pathlib.Path], str] = lambda out: ""
    environ: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fine: tuple[int, ...] = (0,)
    done: Literal["passed", "ran"] = "passed"

    def words(self) -> str:
        """Return the command as one types it, without what only this script reads."""
        variables = [f"{name}={value}" for name, value in self.environ.items()]
        own = {"--json", "--junitxml", "{result}"}
        parts = [f"'{part}'" if " " in part else part for part in self.command if part not in own]
        text = " ".join([*variables, "python", *parts])
        return text.replace("{out}", "build").replace("{own}", f"build/{self.name}")


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of a step; ``counts`` is why, where it was not run."""

    step: Step
    outcome: Outcome
    counts: str = ""
    seconds: float | None = None


def run(step: Step, out: pathlib.Path) -> Result:
    """Run a step; whatever it does, the result says so.

    Its output goes to ``<name>.log`` in ``out``. At the limit its process and what that started
    are ended.
    """
    out.mkdir(parents=True, exist_ok=True)
    if reason := step.missing(out):
        return Result(step, "not run", reason)
    file, log, own = (out / f"{step.name}{end}" for end in (".result", ".log", ""))
    # What an earlier run left is not this one's.
    file.unlink(missing_ok=True)
    shutil.rmtree(own, ignore_errors=True)
    command = [sys.executable]
    for part in step.command:
        placed = part.replace("{out}", str(out)).replace("{own}", str(own))
        command.append(placed.replace("{result}", str(file)))
    began = time.monotonic()
    with log.open("wb") as output:
        status = _wait(command, step, output)
    seconds = time.monotonic() - began
    if status is None:
        outcome: Outcome = "out of time"
    else:
        outcome = step.done if status in step.fine else "failed"
    try:
        counts = step.counts(file)
    except NothingRanError as error:
        outcome, counts = "not run" if outcome == step.done else outcome, str(error)
    except (OSError, ValueError, KeyError, ElementTree.ParseError) as error:
        # It says that it did well, and left nothing that shows it.
        outcome = "failed" if outcome == step.done else outcome
        counts = f"no result: {error!r}"
    if outcome == "failed":
        counts = f"exit status {status}{'; ' if counts else ''}{counts}"
    if outcome == "out of time":
        counts = f"ended after {step.limit_s:g} s{'; ' if counts else ''}{counts}"
    return Result(step, outcome, counts, seconds)


def _wait(command: list[str], step: Step, output: IO[bytes]) -> int | None:
    """Run a command; return its exit status, or None where it was ended at the limit."""
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        cwd=ROOT,
        env={**os.environ, **step.environ},
        start_new_session=True,
    )
    try:
        return child.wait(timeout=step.limit_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        kill(child)


def last_lines(step: Step, out: pathlib.Path) -> str:
    """Return the end of a step's output."""
    log = out / f"{step.name}.log"
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    return "\n".join(lines[-_SHOWN:])


# --- What was counted -------------------------------------------------------------------------


def pytest_counts(file: pathlib.Path) -> str:
    """Count the tests in a JUnit file."""
    suite = next(ElementTree.parse(file).getroot().iter("testsuite"))
    names = ("tests", "failures", "errors", "skipped")
    tests, failures, errors, skipped = (int(suite.get(name, 0)) for name in names)
    return _counts(tests - failures - errors - skipped, failures + errors, skipped)


def kit_counts(file: pathlib.Path) -> str:
    """Count the tests in a report of the conformance kit."""
    report: dict[str, Any] = json.loads(file.read_bytes())
    if report["error"]:
        raise ValueError(report["error"])
    parts = ("passed", "failed", "skipped")
    passed, failed, skipped = (sum(g[part] for g in report["groups"]) for part in parts)
    features = [f"{f['name']} {len(f['tests'])}" for f in report["features_skipped"]]
    return _counts(passed, failed, skipped) + (f" ({', '.join(features)})" if features else "")


def _counts(passed: int, failed: int, skipped: int) -> str:
    if not passed + failed:
        message = "no test ran"
        raise ValueError(message)
    return f"{passed} passed, {failed} failed, {skipped} skipped"


def bench_counts(file: pathlib.Path) -> str:
    """Count the targets in what ``hwcore bench --json`` wrote."""
    (rows,) = json.loads(file.read_bytes()).values()
    if isinstance(rows, str):
        raise NothingRanError(rows)
    measured = [row for row in rows if not row["not_measured"]]
    return f"{len(measured)} of {len(rows)} rows measured"
