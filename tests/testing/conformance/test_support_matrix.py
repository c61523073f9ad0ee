"""scripts/support_matrix.py: the docs' table of what each backend supports, from reports."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import msgspec
import pytest

from hwcore.testing.conformance import report
from hwcore.testing.conformance.report import BackendFacts, Result, build

SCRIPT = pathlib.Path(__file__).parents[3] / "scripts" / "support_matrix.py"


def reported(folder, name, *, failed=False, **facts):
    """Write a report of three tests and return its file."""
    tests = [
        Result(id="graphs::a", group="graphs", name="a", hook="graph_replay", outcome="passed"),
        Result(
            id="graphs::b",
            group="graphs",
            name="b",
            hook="graph_capture",
            outcome="failed" if failed else "passed",
            quirks=["capture_executes"],
        ),
        Result(
            id="memory::c",
            group="memory",
            name="c",
            hook="memory_info",
            outcome="skipped",
            feature="multi_device",
        ),
    ]
    about = BackendFacts(name=name, distribution=f"hwcore-{name}", version="1.2", **facts)
    file = folder / f"{name}.json"
    file.write_bytes(msgspec.json.encode(build(about, tests, ["memory", "graphs", "kernels"])))
    return file


def written(folder, *files):
    """Run the script; return the page's rows by their first cell."""
    page = folder / "support.md"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, files), "-o", str(page)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    cells = [line.strip("| ").split(" | ") for line in page.read_text().splitlines()]
    return {row[0]: [cell.strip() for cell in row[1:]] for row in cells if len(row) > 1}


def test_each_backend_is_a_column_and_each_group_a_row(tmp_path):
    zeta = reported(tmp_path, "zeta", failed=True, capabilities=["graphs"])
    acme = reported(tmp_path, "acme", quirks=["capture_executes"])
    rows = written(tmp_path, zeta, acme)
    assert rows["backend"] == ["acme", "zeta"]
    assert rows["plugin"] == ["hwcore-acme 1.2", "hwcore-zeta 1.2"]
    assert rows["conforms"] == ["yes", "no"]
    assert rows["graphs"] == ["2 passed (1 adapted)", "1 passed (1 adapted), **1 failed**"]
    assert rows["memory"] == ["0 passed, 1 skipped"] * 2
    assert rows["kernels"] == ["not run"] * 2


def test_capabilities_and_quirks_are_rows(tmp_path):
    file = reported(tmp_path, "acme", capabilities=["graphs"], quirks=["capture_executes"])
    page = tmp_path / "page.md"
    subprocess.run([sys.executable, str(SCRIPT), str(file), "-o", str(page)], check=True)
    text = page.read_text()
    assert "| `graphs` | yes |" in text
    assert "| `triton` |  |" in text
    assert "| `capture_executes` | yes |" in text
    assert "| `fork_unsafe` |  |" in text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "Pass what hwcore conformance --json wrote."),
        ('{"python": 3}', "Pass what hwcore conformance --json wrote."),
        (None, "Pass what hwcore conformance --json wrote."),
    ],
)
def test_what_is_no_report_is_an_error_that_names_the_file(tmp_path, content, said):
    file = tmp_path / "report.json"
    if content is not None:
        file.write_text(content)
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(file), "-o", str(tmp_path / "page.md")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert str(file) in done.stderr
    assert said in done.stderr
    assert not (tmp_path / "page.md").exists()


def test_a_report_of_another_schema_is_refused(tmp_path):
    old = report.refusal("acme", "")
    file = tmp_path / "old.json"
    file.write_bytes(msgspec.json.encode(msgspec.structs.replace(old, schema_version=0)))
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(file)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "schema_version 0; expected 1" in done.stderr
