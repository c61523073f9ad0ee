import itertools
import json
import logging
import random

import pytest

from hwcore.errors import ArgumentTypeError, ArgumentValueError
from hwcore.speculative import TreeSizer, measure_costs

SIZES = (1, 4, 8, 16)
MEMORY_BOUND = dict.fromkeys(SIZES, 1.0)
COMPUTE_BOUND = {size: float(size) for size in SIZES}


def run(sizer, chance, steps, seed=0):
    """Steps on a text on whose path the node of rank r is with ``chance(r)``; the sizes chosen."""
    numbers, chosen = random.Random(seed), []
    for _ in range(steps):
        size = sizer.choose()
        chosen.append(size)
        if size > 1:
            sizer.learn([r for r in range(1, size) if numbers.random() < chance(r)], size)
    return chosen


def falling(first):
    return lambda rank: first / rank


def test_where_nodes_are_free_the_largest_tree_is_best():
    assert run(TreeSizer(MEMORY_BOUND), falling(0.5), 50)[-1] == 16


def test_where_nodes_cost_what_steps_cost_there_are_no_drafts():
    chosen = run(TreeSizer(COMPUTE_BOUND), falling(0.5), 200)
    assert chosen[-1] == 1
    assert sum(size > 1 for size in chosen) <= 4  # probes


def test_the_size_in_between_that_gives_most_a_second():
    costs = {1: 1.0, 4: 1.1, 8: 1.9, 16: 2.6}
    sizer = TreeSizer(costs)
    assert run(sizer, lambda rank: 0.7 if rank < 4 else 0.05, 300)[-1] == 4
    assert sizer.expected(4) == pytest.approx(1 + 3 * 0.7, abs=0.3)
    assert sizer.expected(1) == 1.0


def test_one_tree_teaches_about_the_smaller_ones():
    sizer = TreeSizer(dict.fromkeys(SIZES, 1.0))
    for _ in range(400):
        sizer.learn([0, 1, 2, 9], 16)
    assert sizer.expected(4) == pytest.approx(3.0, abs=0.01)
    assert sizer.expected(8) == pytest.approx(3.0, abs=0.01)
    assert sizer.expected(16) == pytest.approx(4.0, abs=0.01)


def test_a_text_that_changes_is_followed_both_ways():
    costs = {1: 1.0, 4: 1.4, 16: 2.0}
    sizer = TreeSizer(costs, probe_every=16)
    assert run(sizer, lambda rank: 0.6 if rank < 5 else 0.2, 200)[-1] == 16
    assert set(run(sizer, lambda rank: 0.01, 600)[-15:]) <= {1, 4}
    assert sizer.size == 1
    run(sizer, lambda rank: 0.6 if rank < 5 else 0.2, 3000, seed=1)
    assert sizer.size == 16


def test_sizes_do_not_flap_between_equals():
    sizer = TreeSizer({1: 1.0, 4: 1.2, 8: 1.32})
    chosen = run(sizer, lambda rank: 0.5 if rank < 4 else 0.062, 2000)
    changes = sum(a != b for a, b in itertools.pairwise(chosen[100:]))
    assert changes <= 20


def test_what_does_not_pay_costs_little():
    """A probe in 64 steps, of the cheapest tree."""
    sizer = TreeSizer({1: 1.0, 4: 1.5, 16: 3.0})
    chosen = run(sizer, lambda rank: 0.0, 2000)
    spent = sum(sizer.costs[size] for size in chosen[200:])
    assert spent / len(chosen[200:]) < 1.03


def test_break_even_is_the_cost_in_steps_without_drafts():
    assert TreeSizer({1: 0.02, 4: 0.03, 8: 0.05}).break_even() == pytest.approx(
        {1: 1.0, 4: 1.5, 8: 2.5}
    )


def test_the_same_observations_choose_the_same_sizes():
    first, second = (run(TreeSizer({1: 1.0, 4: 1.2, 8: 1.5}), falling(0.6), 300) for _ in "12")
    assert first == second


def test_sizes_are_measured_in_turn_and_the_first_round_is_not_counted():
    seen = []
    costs = measure_costs(seen.append, (1, 2, 8), rounds=3)
    assert seen == [1, 2, 8] * 4
    assert list(costs) == [1, 2, 8]
    assert all(seconds > 0 for seconds in costs.values())


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
        measure_costs(seen.append, (1, 4), cache=file)
    assert seen
    assert "measuring" in caplog.text
    assert json.loads(file.read_text())["sizes"] == [1, 4]


@pytest.mark.parametrize("seconds", [[1.0], [1.0, -2.0], [1.0, "2"], [1.0, float("inf")], None])
def test_figures_that_cannot_be_are_measured_anew(seconds, tmp_path, caplog):
    file, seen = tmp_path / "costs.json", []
    measure_costs(lambda size: None, (1, 4), cache=file)
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "seconds": seconds}))
    measure_costs(seen.append, (1, 4), cache=file)
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
    costs = measure_costs(lambda size: None, (1, 4), cache=tmp_path / "taken" / "costs.json")
    assert list(costs) == [1, 4]
    assert "cannot be kept" in caplog.text


BAD = [
    (lambda: TreeSizer({}), ArgumentValueError, r"sizes got \[\]"),
    (lambda: TreeSizer({4: 1.0}), ArgumentValueError, r"sizes got \[4\] .*the first 1"),
    (lambda: TreeSizer({1: 0.0}), ArgumentValueError, r"costs\[1\] got 0.0"),
    (lambda: TreeSizer({1: float("nan")}), ArgumentValueError, r"costs\[1\] got nan"),
    (lambda: TreeSizer({1: 1.0, 2.5: 1.0}), ArgumentTypeError, "a tree size got 2.5"),
    (lambda: TreeSizer({1: 1.0}, memory=0.0), ArgumentValueError, "memory got 0.0"),
    (lambda: TreeSizer({1: 1.0}, margin=0.9), ArgumentValueError, "margin got 0.9"),
    (lambda: TreeSizer({1: 1.0}, prior=1.5), ArgumentValueError, "prior got 1.5"),
    (lambda: TreeSizer({1: 1.0}, probe_every=0), ArgumentValueError, "probe_every got 0"),
    (lambda: measure_costs(print, (4, 1)), ArgumentValueError, r"sizes got \[4, 1\]"),
    (lambda: measure_costs(print, (1, 4), rounds=0), ArgumentValueError, "rounds got 0"),
    (lambda: measure_costs(print, (1,), key={"a": {1}}), ArgumentTypeError, "key got"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
