"""``hwcore bench``: it finds the benchmarks, and its exit status follows their targets."""

from __future__ import annotations

import json
import math
import sys
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from hwcore.cli import device_clock, main, measurement


@pytest.fixture
def subject(tmp_path, monkeypatch):
    """Put one benchmark in a folder of its own, whose figure the test chooses."""

    def put(value, target, at_most=True):
        (tmp_path / "toy.py").write_text(
            f"""'''How big a number is.'''
from hwcore.cli.measurement import Row
def run(quick=False):
    return [Row("a number", {value}, "x", {target}, {at_most}, f"quick {{quick}}")]
"""
        )
        # Not `hwcore.cli.bench`: that is the command of the same name.
        monkeypatch.setattr(sys.modules["hwcore.cli.bench"], "folder", lambda: tmp_path)

    return put


@pytest.mark.parametrize(
    ("value", "target", "at_most", "status"),
    [(1.0, 1.1, True, 0), (1.2, 1.1, True, 1), (1.6, 1.5, False, 0), (1.4, 1.5, False, 1)],
)
def test_exit_status_is_1_when_a_target_is_missed(subject, value, target, at_most, status):
    subject(value, target, at_most)
    result = CliRunner().invoke(main, ["bench", "toy"])
    assert result.exit_code == status, result.output
    assert "How big a number is." in result.output


def test_a_figure_without_target_cannot_be_missed(subject):
    subject(99.0, None)
    assert CliRunner().invoke(main, ["bench", "toy"]).exit_code == 0


def test_quick_is_passed_on(subject):
    subject(1.0, 1.0)
    assert "quick True" in CliRunner().invoke(main, ["bench", "--quick", "toy"]).output


def test_an_unknown_subject_is_named_with_those_that_exist():
    result = CliRunner().invoke(main, ["bench", "speed"])
    assert result.exit_code == 2
    assert "'speed'" in result.output
    assert "dispatch" in result.output


# --- On a device ----------------------------------------------------------------------------------


@pytest.fixture
def on_device(subject, tmp_path, monkeypatch):
    """Run a subject of a device whose target is missed, on a backend that the test describes."""

    def run(*arguments, automatic=True, lacking=None):
        def accelerator():
            if lacking:
                raise measurement.NotMeasuredError(lacking)
            return SimpleNamespace(info=SimpleNamespace(name="acme", automatic=automatic))

        subject(2.0, 1.0)
        with (tmp_path / "toy.py").open("a") as file:
            file.write("ON_DEVICE = True\n")
        monkeypatch.setattr(device_clock, "accelerator", accelerator)
        return CliRunner().invoke(main, ["bench", *arguments, "toy"])

    return run


def test_without_an_accelerator_it_is_neither_reached_nor_missed(on_device):
    result = on_device(lacking="needs an accelerator [sic]")
    assert result.exit_code == 0, result.output
    assert "not measured: needs an accelerator [sic]" in result.output
    assert "2 x" not in result.output


def test_on_a_device_it_counts(on_device):
    result = on_device()
    assert result.exit_code == 1
    assert "on `acme`" in result.output


def test_simulated_it_runs_and_counts_for_nothing(on_device):
    result = on_device(automatic=False)
    assert result.exit_code == 0, result.output
    text = " ".join(result.output.replace("│", " ").split())
    assert "not measured" in text
    assert "simulated, which says nothing of any" in text


def test_the_json_has_each_row_and_no_number_that_is_none(on_device, tmp_path):
    file = tmp_path / "rows.json"
    on_device("--json", str(file))
    (row,) = json.loads(file.read_text())["toy"]
    assert (row["what"], row["value"], row["target"]) == ("a number", 2.0, 1.0)
    assert row["not_measured"] == ""
    on_device("--json", str(file), automatic=False)
    (row,) = json.loads(file.read_text())["toy"]
    assert row["value"] is None
    assert row["not_measured"]
    on_device("--json", str(file), lacking="needs an accelerator")
    assert json.loads(file.read_text()) == {"toy": "needs an accelerator"}


@pytest.mark.parametrize("target", [1.0, None])
def test_what_is_not_measured_is_neither_reached_nor_missed(target):
    row = measurement.Target("a number", target).not_measured("no Triton")
    assert math.isnan(row.value)
    assert (row.reached, row.missed, row.figure) == (False, False, "not measured")
    assert row.as_simulated() == row


# --- Rounds ---------------------------------------------------------------------------------------


def test_medians_are_taken_over_rounds_in_which_subjects_alternate():
    order = []

    def taking(name, seconds):
        values = iter(seconds)
        return lambda: (order.append(name), next(values))[1]

    medians = measurement.interleaved(
        {"a": taking("a", [9, 1, 3, 2]), "b": taking("b", [9, 5, 5, 8])}, rounds=3
    )
    assert medians == {"a": 2, "b": 5}
    assert order == ["a", "b"] * 4, "one warm-up round, which does not count"
