"""``python -m scripts.on_device tests|benchmarks --backend NAME``: run the steps, write the page.

One step after another, each in a process of its own with a time limit; a step that fails keeps none
from running. The page is written after each, so that a run that is cut short leaves what it has.
``make test-gpu`` and ``make bench-gpu`` call it. Exit status: 0 every step passed, or ran; 1 one
failed; 2 the backend cannot run here; 3 none failed, but one was not run.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys

from scripts.on_device import facts, plans
from scripts.on_device.page import page, rows_of
from scripts.on_device.steps import Result, last_lines, run

ROOT = pathlib.Path(__file__).parents[2]

_START_S = 600.0  # a first build may be part of it


def main(arguments: list[str]) -> int:
    """Run what the arguments say and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kind", choices=["tests", "benchmarks"])
    parser.add_argument("--backend", required=True)
    parser.add_argument("--only", action="append", metavar="STEP", help="leave out the others")
    parser.add_argument("--quick", action="store_true", help="benchmarks: to see that they run")
    parser.add_argument("--empty", action="store_true", help="write the page without running")
    parser.add_argument("--results", type=pathlib.Path, default=ROOT / "docs/results")
    parser.add_argument("--build", type=pathlib.Path, default=ROOT / "build/on_device")
    parser.add_argument("--commit", help="what the page says of it, where there is no repository")
    options = parser.parse_args(arguments)
    steps = plans.steps_of(options.kind, options.backend, options.quick)
    names = [step.name for step in steps]
    if unknown := set(options.only or names) - set(names):
        got = ", ".join(sorted(unknown))
        parser.error(f"--only got {got}; expected some of {', '.join(names)}")
    file = options.results / f"{options.backend}-{options.kind}.md"
    results = [Result(step, "not run") for step in steps]
    if options.empty:
        file.write_text(page(options.kind, options.backend, None, results))
        return 0
    commit = options.commit or facts.commit()
    if not commit:
        parser.error(
            "this is no git repository; pass --commit, which a figure means nothing without"
        )
    about = _about(options.backend)
    if about is None:
        return 2
    about |= {"commit": commit, "date": facts.today()}
    if options.quick:
        about["date"] += "; with --quick, so that no figure is one to quote"
    out = (options.build / options.backend).resolve()
    rows = []
    for number, step in enumerate(steps):
        if options.only and step.name not in options.only:
            results[number] = Result(step, "not run", "left out with --only")
            continue
        print(f"==> {step.name}: {step.words()}", flush=True)
        results[number] = done = run(step, out)
        took = "" if done.seconds is None else f" in {done.seconds:.0f} s"
        print(f"    {done.outcome}{took}; {done.counts}", flush=True)
        if done.outcome in ("failed", "out of time"):
            print(last_lines(step, out), flush=True)
        if options.kind == "benchmarks" and done.seconds is not None:
            rows += rows_of(out / f"{step.name}.result")
        options.results.mkdir(parents=True, exist_ok=True)
        file.write_text(page(options.kind, options.backend, about, results, rows))
    outcomes = [result.outcome for result in results]
    print(", ".join(f"{outcomes.count(o)} {o}" for o in dict.fromkeys(outcomes)), f"({file})")
    if {"failed", "out of time"} & set(outcomes):
        return 1
    return 3 if "not run" in outcomes else 0


def _about(backend: str) -> dict[str, str] | None:
    """Return facts for the page; None where the backend cannot run here, which is said."""
    command = [sys.executable, "-m", "scripts.on_device.facts", backend]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=_START_S
        )
    except subprocess.TimeoutExpired:
        print(f"the backend `{backend}` did not start within {_START_S:g} s", file=sys.stderr)
        return None
    if done.returncode:
        print(done.stderr.strip(), file=sys.stderr)
        return None
    known: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return known


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
