"""``scripts/on_device``: every step is run and told of, whatever becomes of it."""

from __future__ import annotations

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from scripts import gpu_python
from scripts.on_device import __main__ as script
from scripts.on_device import facts, plans
from scripts.on_device.page import page
from scripts.on_device.steps import (
    NothingRanError,
    Result,
    Step,
    bench_counts,
    kit_counts,
    pytest_counts,
    run,
)

ROOT = pathlib.Path(__file__).parents[2]


def step(code="pass", name="a", **options):
    return Step(name, ("-c", code), **{"limit_s": 30, **options})


# --- A step ---------------------------------------------------------------------------------------


def test_one_that_ends_well_has_passed(tmp_path):
    done = run(step("print('hello')"), tmp_path)
    assert (done.outcome, done.counts) == ("passed", "")
    assert 0 < done.seconds < 30
    assert (tmp_path / "a.log").read_text() == "hello\n"


def test_one_that_fails_says_its_status(tmp_path):
    done = run(step("import sys; sys.exit(7)"), tmp_path)
    assert (done.outcome, done.counts) == ("failed", "exit status 7")


def test_one_that_hangs_is_ended_with_what_it_started(tmp_path):
    code = (
        "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(child.pid))\n"
        "time.sleep(60)"
    )
    done = run(step(code, limit_s=2), tmp_path)
    assert (done.outcome, done.counts) == ("out of time", "ended after 2 s")
    assert done.seconds < 30
    assert not _runs(int((tmp_path / "pid").read_text()))


def _runs(pid):
    """Whether a process runs; one that was killed may wait for its new parent for a moment."""
    for _ in range(50):
        try:
            os.kill(pid, signal.SIG_DFL)
        except ProcessLookupError:
            return False
        if pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return False
        time.sleep(0.1)
    return True


def test_one_whose_input_is_missing_is_not_run_and_says_why(tmp_path):
    left = step(f"open({str(tmp_path / 'ran')!r}, 'w')", missing=lambda out: "no model: bring it")
    done = run(left, tmp_path)
    assert (done.outcome, done.counts, done.seconds) == ("not run", "no model: bring it", None)
    assert not (tmp_path / "ran").exists()


def test_one_that_ends_well_and_leaves_no_result_has_failed(tmp_path):
    done = run(step(counts=pytest_counts), tmp_path)
    assert done.outcome == "failed"
    assert "exit status 0; no result: FileNotFoundError" in done.counts


def test_the_results_of_an_earlier_run_are_not_taken_for_its_own(tmp_path):
    (tmp_path / "a.result").write_text(json.dumps({"toy": [{"not_measured": ""}]}))
    (tmp_path / "a").mkdir()
    (tmp_path / "a/tokens.json").write_text("[1]")
    assert run(step(counts=bench_counts), tmp_path).outcome == "failed"
    assert not (tmp_path / "a").exists()


def test_the_device_serves_only_what_the_cpu_has_served(tmp_path, monkeypatch):
    monkeypatch.setattr(plans, "_no_model", lambda: "")
    on_cpu, serving = (s for s in plans.tests("acme") if s.name.startswith("serving"))
    assert serving.missing(tmp_path) == "the cpu gave no tokens to compare with"
    (tmp_path / on_cpu.name).mkdir()
    (tmp_path / on_cpu.name / "tokens.json").write_text("{}")
    assert serving.missing(tmp_path) == ""
    assert f"{{out}}/{on_cpu.name}/tokens.json" in serving.command
    monkeypatch.setattr(plans, "_no_model", lambda: "no model")
    assert on_cpu.missing(tmp_path) == serving.missing(tmp_path) == "no model"


def test_one_that_could_measure_nothing_is_not_run(tmp_path):
    code = "import sys; open(sys.argv[1], 'w').write('{\"toy\": \"needs an accelerator\"}')"
    toy = Step("a", ("-c", code, "{result}"), 30, bench_counts, done="ran")
    assert run(toy, tmp_path).outcome == "not run"
    assert run(toy, tmp_path).counts == "needs an accelerator"


def test_its_variables_and_folder_are_what_it_says(tmp_path):
    code = "import os, sys; print(os.environ['HWCORE_BACKEND'], os.getcwd(), sys.argv[1])"
    run(Step("a", ("-c", code, "{out}/x"), 30, environ={"HWCORE_BACKEND": "sim"}), tmp_path)
    assert (tmp_path / "a.log").read_text() == f"sim {ROOT} {tmp_path}/x\n"


# --- What is counted ------------------------------------------------------------------------------


def test_tests_are_counted_from_a_junit_file(tmp_path):
    file = tmp_path / "f"
    suite = '<testsuite tests="9" failures="1" errors="2" skipped="3"/>'
    file.write_text(f"<testsuites>{suite}</testsuites>")
    assert pytest_counts(file) == "3 passed, 3 failed, 3 skipped"


@pytest.mark.parametrize("skipped", [0, 4])
def test_a_run_in_which_no_test_ran_is_none(tmp_path, skipped):
    file = tmp_path / "f"
    file.write_text(f'<testsuites><testsuite tests="{skipped}" skipped="{skipped}"/></testsuites>')
    with pytest.raises(ValueError, match="no test ran"):
        pytest_counts(file)


def test_the_kits_report_is_counted_with_the_features_that_it_skipped(tmp_path):
    groups = [{"passed": 2, "failed": 0, "skipped": 1}, {"passed": 3, "failed": 1, "skipped": 0}]
    features = [{"name": "float8", "tests": ["a"]}]
    report = {"error": None, "groups": groups, "features_skipped": features}
    (tmp_path / "f").write_text(json.dumps(report))
    assert kit_counts(tmp_path / "f") == "5 passed, 1 failed, 1 skipped (float8 1)"


def test_the_kits_error_is_no_count(tmp_path):
    (tmp_path / "f").write_text(json.dumps({"error": "some tests did not run", "groups": []}))
    with pytest.raises(ValueError, match="some tests did not run"):
        kit_counts(tmp_path / "f")


def test_rows_are_counted_that_have_a_figure(tmp_path):
    rows = [{"not_measured": ""}, {"not_measured": "no Triton"}]
    (tmp_path / "f").write_text(json.dumps({"toy": rows}))
    assert bench_counts(tmp_path / "f") == "1 of 2 rows measured"
    (tmp_path / "f").write_text(json.dumps({"toy": "needs an accelerator"}))
    with pytest.raises(NothingRanError, match="needs an accelerator"):
        bench_counts(tmp_path / "f")


# --- The whole run --------------------------------------------------------------------------------


@pytest.fixture
def main(tmp_path, monkeypatch):
    """Runs given steps; returns the status and the page."""

    def start(steps, *arguments):
        monkeypatch.setattr(plans, "steps_of", lambda *_: steps)
        monkeypatch.setattr(script, "_about", lambda *_: dict.fromkeys(facts.NAMES, "known"))
        places = ["--results", str(tmp_path / "docs"), "--build", str(tmp_path / "build")]
        status = script.main(["tests", "--backend", "acme", *places, *arguments])
        return status, (tmp_path / "docs/acme-tests.md").read_text()

    return start


FAILS, MISSES = "import sys; sys.exit(1)", {"missing": lambda out: "no model"}


@pytest.mark.parametrize(
    ("steps", "status"),
    [
        ([step()], 0),
        ([step(), step(name="b", **MISSES)], 3),
        ([step(FAILS), step(name="b", **MISSES)], 1),
        ([step("import time; time.sleep(60)", limit_s=0.5), step(name="b")], 1),
    ],
)
def test_the_status_tells_failed_and_not_run_from_passed(main, steps, status):
    assert main(steps)[0] == status


def test_it_goes_on_after_a_step_that_failed(main):
    _, text = main([step(FAILS), step(name="b"), step(name="c", **MISSES)])
    assert "| a | **failed** | exit status 1 |" in text
    assert "| b | passed |" in text
    assert "| c | **not run** | no model |" in text


def test_the_end_of_what_failed_is_shown(main, capfd):
    main([step("print('why ' + 'it failed'); " + FAILS)])
    assert "why it failed" in capfd.readouterr().out


def test_a_step_that_is_left_out_is_not_run(main):
    status, text = main([step(), step(name="b")], "--only", "b")
    assert status == 3
    assert "| a | **not run** | left out with --only |" in text


def test_the_page_is_there_after_each_step(main, tmp_path):
    looks = f"print(open({str(tmp_path / 'docs/acme-tests.md')!r}).read())"
    main([step(), step(looks, name="b"), step(name="c")])
    seen = (tmp_path / "build/acme/b.log").read_text()
    assert "| a | passed |" in seen
    assert "| c | **not run** |" in seen


def test_without_a_repository_the_commit_must_be_given(main, monkeypatch, capfd):
    monkeypatch.setattr(facts, "commit", lambda: "")
    with pytest.raises(SystemExit, match="2"):
        main([step()])
    assert "pass --commit" in capfd.readouterr().err
    assert "| commit | abc123 |" in main([step()], "--commit", "abc123")[1]


def test_a_backend_that_cannot_run_here_is_named_with_the_probes_reason(site):
    site.add(
        "acme",
        """
        @hwcore.hookimpl
        def probe(self):
            return Availability(False, "there is no /dev/acme0", "Load the acme driver")
        """,
    )
    results = str(site.folder / "docs")
    arguments = ["tests", "--backend", "acme", "--results", results, "--commit", "abc123"]
    done = site.execute("-m", "scripts.on_device", *arguments)
    assert done.returncode == 2
    assert "there is no /dev/acme0. Load the acme driver" in done.stderr
    assert "Traceback" not in done.stderr
    assert not pathlib.Path(results).exists()


def test_the_header_says_where_it_ran(hw):
    about = facts.of(hw.info.name) | {"commit": facts.commit(), "date": facts.today()}
    assert list(about) == list(facts.NAMES)
    assert all(value for name, value in about.items() if name != "commit")
    assert f"`{hw.info.name}`" in about["backend"]
    assert ("simulated" in about["backend"]) == (hw.info.name == "sim")
    assert re.match(r"[0-9a-f]{40}|$", about["commit"])


# --- The pages ------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cuda", "hip"])
@pytest.mark.parametrize("kind", ["tests", "benchmarks"])
def test_a_page_without_results_is_what_the_script_writes(backend, kind):
    text = (ROOT / f"docs/results/{backend}-{kind}.md").read_text()
    empty = page(kind, backend, None, [Result(s, "not run") for s in plans.steps_of(kind, backend)])
    if "Nothing was measured yet" in text:
        assert text == empty, "run make empty-results"
    else:
        # A run on the device, this very one perhaps, has filled it.
        assert text.startswith(empty.partition("**")[0])
        assert "| commit | not measured |" not in text


def row(what, value, target, **more):
    known = {"subject": "toy", "unit": "x", "at_most": True, "not_measured": "", "detail": "1 s"}
    return {**known, "what": what, "value": value, "target": target, **more}


def test_a_figure_is_reached_missed_or_not_measured():
    first, *_ = plans.targets()
    rows = [
        row(first.what, 0.5, 1.0),
        row("missed", 2.0, 1.0),
        row("at least", 2.0, 1.0, at_most=False),
        row("left out", None, 1.0, not_measured="no Triton"),
    ]
    text = page("benchmarks", "acme", dict.fromkeys(facts.NAMES, "known"), [], rows)
    assert f"| {first.what} | ≤ 1 x | 0.5 x | yes |" in text
    assert "| toy: missed | ≤ 1 x | 2 x | **no** |" in text
    assert "| toy: at least | ≥ 1 x | 2 x | yes |" in text
    assert "| toy: left out | ≤ 1 x | not measured |  |" in text
    assert "- left out: no Triton" in text


# --- What the device's Python needs ---------------------------------------------------------------

BROUGHT = {"torch", "numpy", "triton"}  # by the device's own Python
UNUSED = {"hf-xet"}  # downloads models; nothing is downloaded


def required():
    lines = (ROOT / "gpu-requirements.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_the_wheels_are_pinned_and_ask_for_nothing_that_is_not_among_them():
    names = {canonicalize_name(name) for name in required()}
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    assert names <= {canonicalize_name(pin.partition("==")[0]) for pin in pins}
    for name in names - {"editables"}:  # it asks for nothing, and is only where wheels went
        wanted = map(Requirement, metadata.requires(name) or [])
        lacking = {
            canonicalize_name(it.name)
            for it in wanted
            if it.marker is None or it.marker.evaluate({"extra": ""})
        }
        assert lacking <= names | BROUGHT | UNUSED, name


def test_the_demo_and_its_tests_do_without_the_library_of_pictures():
    code = "import sys; sys.modules['matplotlib'] = None; import examples.serving.report"
    more = "examples.serving.__main__, examples.eagle_head.evaluate, examples.eagle_head.train"
    done = subprocess.run([sys.executable, "-c", f"{code}, {more}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_packages_that_are_missing_are_named_with_what_brings_them(tmp_path):
    (tmp_path / "names").write_text("# a comment\n\npluggy\nno-such-package-here\n")
    problem = gpu_python.packages_problem(tmp_path / "names")
    assert "lacks no-such-package-here." in problem
    assert "make gpu-wheels GPU_PYTHON_VERSION=3." in problem
    (tmp_path / "names").write_text("pluggy\n")
    assert gpu_python.packages_problem(tmp_path / "names") == ""


@pytest.mark.parametrize(
    ("version", "fine"), [("2.8.1", False), ("2.9.0", True), ("3.0.0+cu140", True), ("main", False)]
)
def test_torch_is_2_9_or_later(monkeypatch, version, fine):
    import torch

    monkeypatch.setattr(torch, "__version__", version)
    problem = gpu_python.torch_problem()
    assert (problem == "") == fine
    assert fine or f"has torch {version}; expected 2.9 or later. Install" in problem
