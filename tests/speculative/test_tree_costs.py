"""What a step costs by tree size: how it is measured, and how it is kept."""

import json
import logging

import pytest

from hwcore.errors import ArgumentTypeError, ArgumentValueError
from hwcore.speculative import measure_costs

KEY = {"model": "m", "device": "d"}


def test_sizes_are_measured_in_turn_and_the_first_round_is_not_counted():
    seen = []
    costs = measure_costs(seen.append, (1, 2, 8), rounds=3)
    assert seen == [1, 2, 8] * 4
    assert list(costs) == [1, 2, 8]
    assert all(seconds > 0 for seconds in costs.values())


def test_sizes_of_trees_and_batches_are_measured_in_turn():
    seen = []
    costs = measure_costs(
        lambda bs, size: seen.append((bs, size)), (1, 4), batch_sizes=(1, 8), rounds=2
    )
    assert seen == [(1, 1), (1, 4), (8, 1), (8, 4)] * 3
    assert {bs: list(by_size) for bs, by_size in costs.items()} == {1: [1, 4], 8: [1, 4]}


def test_a_median_is_what_counts(monkeypatch):
    """Of the steps of one size; what one of them was disturbed by is left out."""
    clock = 0.0
    monkeypatch.setattr("hwcore.speculative.tree_costs.time.perf_counter", lambda: clock)
    durations = {1: iter([9.0, 1.0, 1.5, 70.0]), 4: iter([9.0, 3.0, 2.0, 2.5])}

    def step(size):
        nonlocal clock
        clock += next(durations[size])

    assert measure_costs(step, (1, 4), rounds=3) == {1: 1.5, 4: 2.5}


def test_each_key_has_a_file_in_the_cache(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("HWCORE_CACHE", str(tmp_path))
    seen, named = [], {"batch_sizes": (1, 2)}

    def step(*point):
        seen.append(point)

    first = [measure_costs(step, (1, 4), key={"model": m}, **named) for m in "ab"]
    count = len(seen)
    assert first == [measure_costs(step, (1, 4), key={"model": m}, **named) for m in "ab"]
    assert len(seen) == count
    assert len(list((tmp_path / "tree-costs").iterdir())) == 2
    measure_costs(step, (1, 4), key={"model": "a"})  # of one batch size: something else
    assert len(seen) > count
    assert not caplog.records


def test_without_a_key_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("HWCORE_CACHE", str(tmp_path))
    measure_costs(lambda size: None, (1, 4))
    assert not list(tmp_path.iterdir())


def test_measured_costs_are_kept(tmp_path, caplog):
    file, seen = tmp_path / "deep" / "costs.json", []
    first = measure_costs(seen.append, (1, 4), cache=file, key={"model": "m", "bs": 8})
    count = len(seen)
    assert measure_costs(seen.append, (1, 4), cache=file, key={"bs": 8, "model": "m"}) == first
    assert len(seen) == count
    assert not caplog.records
    assert [path.name for path in file.parent.iterdir()] == ["costs.json"]


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", '{"seconds": [1.0, 2.0]}', "\x00\xff", "5"],
)
def test_a_file_of_no_use_is_measured_anew_and_said(content, tmp_path, caplog):
    file, seen = tmp_path / "costs.json", []
    file.write_text(content, encoding="latin-1")
    with caplog.at_level(logging.WARNING):
        measure_costs(seen.append, (1, 4), key=KEY, cache=file)
    assert seen
    assert "measuring" in caplog.text
    assert json.loads(file.read_text())["key"] == KEY


@pytest.mark.parametrize("seconds", [[1.0], [1.0, -2.0], [1.0, "2"], [1.0, float("inf")], None])
def test_figures_that_cannot_be_are_measured_anew(seconds, tmp_path, caplog):
    file, seen = tmp_path / "costs.json", []
    measure_costs(lambda size: None, (1, 4), key=KEY, cache=file)
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "seconds": seconds}))
    measure_costs(seen.append, (1, 4), key=KEY, cache=file)
    assert seen


@pytest.mark.parametrize("change", [{"key": {"bs": 2}}, {"sizes": (1, 8)}])
def test_figures_of_something_else_are_measured_anew(change, tmp_path, caplog):
    file, seen = tmp_path / "costs.json", []
    arguments = {"sizes": (1, 4), "key": {"bs": 1}}
    measure_costs(lambda size: None, **arguments, cache=file)
    measure_costs(seen.append, **(arguments | change), cache=file)
    assert seen
    assert "something else" in caplog.text


def test_a_place_that_cannot_be_written_is_said_and_no_reason_to_stop(tmp_path, caplog):
    (tmp_path / "taken").write_text("")
    costs = measure_costs(
        lambda size: None, (1, 4), key=KEY, cache=tmp_path / "taken" / "costs.json"
    )
    assert list(costs) == [1, 4]
    assert "cannot be kept" in caplog.text


BAD = [
    ({"sizes": (4, 1)}, ArgumentValueError, r"sizes got \[4, 1\]"),
    ({"sizes": ()}, ArgumentValueError, r"sizes got \[\]"),
    ({"rounds": 0}, ArgumentValueError, "rounds got 0"),
    ({"key": {"a": {1}}}, ArgumentTypeError, "key got"),
    ({"cache": "x", "key": None}, ArgumentTypeError, "key got None .*what the figures depend on"),
    ({"batch_sizes": ()}, ArgumentValueError, r"batch_sizes got \[\]"),
    ({"batch_sizes": (8, 1)}, ArgumentValueError, r"batch_sizes got \[8, 1\]"),
    ({"batch_sizes": (0, 1)}, ArgumentValueError, "a batch size got 0"),
]


@pytest.mark.parametrize(("changed", "error", "message"), BAD)
def test_bad_input_is_named(changed, error, message):
    arguments = {"sizes": (1, 4)} | changed
    with pytest.raises(error, match="^measure_costs: " + message):
        measure_costs(lambda *point: None, arguments.pop("sizes"), **arguments)
