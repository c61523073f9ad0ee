"""Which size is chosen, and how what was accepted is followed."""

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwcore.errors import ArgumentTypeError, ArgumentValueError
from hwcore.speculative import TreeSizer

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
    sizer = TreeSizer(costs)
    for seed in range(3):
        run(sizer, lambda rank: 0.6 if rank < 5 else 0.2, 1500, seed)
        assert sizer.size == 16
        run(sizer, lambda rank: 0.01, 600, seed)
        assert sizer.size == 1


def test_sizes_do_not_flap_between_equals():
    sizer = TreeSizer({1: 1.0, 4: 1.2, 8: 1.32})
    chosen = run(sizer, lambda rank: 0.5 if rank < 4 else 0.062, 2000)
    changes = sum(a != b for a, b in itertools.pairwise(chosen[100:]))
    assert changes <= 20


@pytest.mark.parametrize("costs", [{1: 1.0, 4: 1.5, 16: 3.0}, {1: 1.0, 2: 1.01}, {1: 1.0, 8: 30.0}])
def test_what_does_not_pay_costs_little(costs):
    """Probes of larger trees take two hundredths of the time at most, however dear they are."""
    sizer = TreeSizer(costs)
    chosen = run(sizer, lambda rank: 0.0, 4000)[200:]
    assert sizer.size == 1
    assert sum(costs[size] for size in chosen) / len(chosen) <= 1.02
    assert len(set(chosen)) == len(costs)


def test_without_probes_none_are_made():
    chosen = run(TreeSizer({1: 1.0, 4: 1.5}, probe_share=0.0), lambda rank: 0.0, 2000)
    assert set(chosen[200:]) == {1}


def test_a_larger_tree_than_the_one_in_use_is_tried_too():
    """Where the ranks beyond had been worth little, and by now are worth much."""
    sizer = TreeSizer({1: 1.0, 4: 1.1, 16: 1.6})
    run(sizer, lambda rank: 0.6 if rank < 4 else 0.0, 400)
    assert sizer.size == 4
    run(sizer, lambda rank: 0.6, 4000)
    assert sizer.size == 16


def test_batches_of_several_sizes_cost_differently_and_are_accepted_alike():
    """At 1 request nodes are free; at 8, and beyond, they are not."""
    sizer = TreeSizer({1: {1: 1.0, 8: 1.1}, 8: {1: 1.0, 8: 4.0}}, probe_share=0.0)
    for _ in range(100):
        sizer.learn_batch([[1, 2], [1], [], [1, 5]], 8)
    assert sizer.expected(8) == pytest.approx(1 + (2 + 1 + 0 + 2) / 4, abs=0.05)
    assert [sizer.choose(bs) for bs in (1, 2, 8, 9, 500)] == [8, 1, 1, 1, 1]
    assert sizer.choose(1) == 8  # what is in use elsewhere does not count
    assert sizer.break_even(1) == {1: 1.0, 8: 1.1}
    assert sizer.break_even(3) == {1: 1.0, 8: 4.0}


def test_a_step_of_many_requests_weighs_no_more_than_the_steps_before():
    """The memory is of steps: one batch does not wipe out what a hundred have shown."""
    sizer = TreeSizer({1: 1.0, 2: 1.0})
    for _ in range(300):
        sizer.learn_batch([[1]] * 64, 2)
    sizer.learn_batch([[]] * 64, 2)
    assert sizer.expected(2) == pytest.approx(1.98, abs=0.005)


def test_kinds_of_drafts_are_told_apart():
    sizer = TreeSizer({1: 1.0, 4: 1.5})
    for _ in range(100):
        sizer.learn([1, 2, 3], 4, kind="long match")
        sizer.learn([], 4, kind="short match")
    assert sizer.expected(4, kind="long match") == pytest.approx(4.0, abs=0.2)
    assert sizer.expected(4, kind="short match") == pytest.approx(1.0, abs=0.2)
    assert sizer.expected(4, kind="unheard of") == TreeSizer({1: 1.0, 4: 1.5}).expected(4)
    assert sizer.choose(kind="long match") == 4
    assert sizer.choose(kind="short match") == 1


def test_the_drafters_own_chances_take_the_place_of_the_prior():
    sizer = TreeSizer({1: 1.0, 4: 1.5, 8: 1.6})
    assert sizer.expected(8, chances=[1.0, 0.5, 0.25]) == 1.75  # no node beyond
    assert sizer.choose(chances=[1.0, 0.9, 0.8, 0.7]) == 4
    assert sizer.choose(chances=[1.0, 0.1]) == 1
    assert sizer.choose(chances=[1.0]) == 1
    for _ in range(400):
        sizer.learn([1], 4)
    assert sizer.expected(4, chances=[1.0, 0.1, 0.9]) == pytest.approx(2.0, abs=0.01)


@settings(deadline=None)
@given(
    costs=st.dictionaries(st.integers(2, 9), st.floats(0.5, 8.0), max_size=4),
    paths=st.lists(st.lists(st.integers(0, 12), max_size=5), max_size=20),
)
def test_without_a_margin_it_is_the_best_of_all_sizes(costs, paths):
    """In Python's plainest: the mean of what was seen, the later the weightier."""
    costs, memory, prior = {1: 1.0} | costs, 0.9, 0.5
    sizer = TreeSizer(costs, memory=memory, prior=prior, margin=1.0, probe_share=0.0)
    for path in paths:
        sizer.learn(path, max(costs))
    tokens = 1.0
    speeds = {1: 1.0}
    for rank in range(1, max(costs)):
        weight = 4.0 * memory ** len(paths)
        trials, hits = weight, weight * prior ** math.sqrt(rank)
        for age, path in enumerate(reversed(paths)):
            trials += memory**age
            hits += memory**age * (rank in path)
        tokens += hits / trials
        if rank + 1 in costs:
            speeds[rank + 1] = tokens / costs[rank + 1]
            assert sizer.expected(rank + 1) == pytest.approx(tokens)
    assert speeds[sizer.choose()] == pytest.approx(max(speeds.values()))


def test_each_batch_size_and_kind_has_a_size_in_use_of_its_own():
    """What another promises less than the margin more than keeps the one in use where it is."""
    costs = {1: 1.0, 4: 1.0}
    sizer = TreeSizer({1: costs, 8: costs}, margin=1.5, probe_share=0.0)
    much, little = [1.0, 0.9], [1.0, 0.2]
    assert sizer.choose(1, chances=much) == 4
    assert sizer.choose(1, chances=little) == 4  # stays
    assert sizer.choose(8, chances=little) == 1  # was never there
    assert sizer.choose(1, kind="other", chances=little) == 1


def test_a_size_in_use_that_is_worse_than_no_drafts_is_left_whatever_the_margin():
    sizer = TreeSizer({1: 1.0, 2: 1.25, 4: 1.65}, margin=1.5, probe_share=0.0)
    assert sizer.choose(chances=[1.0, 0.9, 0.9, 0.9]) == 4
    assert sizer.choose(chances=[1.0, 0.4, 0.2, 0.1]) == 4  # 1.03, against 1.12 with 2
    assert sizer.choose(chances=[1.0, 0.4, 0.1, 0.1]) == 2  # 0.97
    assert sizer.choose(chances=[1.0, 0.2]) == 1


def test_break_even_is_the_cost_in_steps_without_drafts():
    assert TreeSizer({1: 0.02, 4: 0.03, 8: 0.05}).break_even() == pytest.approx(
        {1: 1.0, 4: 1.5, 8: 2.5}
    )


def test_the_same_observations_choose_the_same_sizes():
    first, second = (run(TreeSizer({1: 1.0, 4: 1.2, 8: 1.5}), falling(0.6), 300) for _ in "12")
    assert first == second


BAD = [
    (lambda: TreeSizer({}), ArgumentValueError, r"sizes got \[\]"),
    (lambda: TreeSizer({4: 1.0}), ArgumentValueError, r"sizes got \[4\] .*the first 1"),
    (lambda: TreeSizer(None), ArgumentTypeError, "costs got None .*a mapping of seconds"),
    (lambda: TreeSizer({1: "a"}), ArgumentTypeError, r"costs\[1\] got 'a'"),
    (lambda: TreeSizer({1: 1.0, "4": 2.0}), ArgumentTypeError, "a tree size got '4'"),
    (lambda: TreeSizer({1: 1.0}, prior="a"), ArgumentTypeError, "prior got 'a'"),
    (
        lambda: TreeSizer({1: 1.0}, prior_weight=math.inf),
        ArgumentValueError,
        "prior_weight got inf",
    ),
    (lambda: TreeSizer({1: 0.0}), ArgumentValueError, r"costs\[1\] got 0.0"),
    (lambda: TreeSizer({1: float("nan")}), ArgumentValueError, r"costs\[1\] got nan"),
    (lambda: TreeSizer({1: 1.0, 2.5: 1.0}), ArgumentTypeError, "a tree size got 2.5"),
    (lambda: TreeSizer({1: 1.0}, memory=0.0), ArgumentValueError, "memory got 0.0"),
    (lambda: TreeSizer({1: 1.0}, prior_weight=0.0), ArgumentValueError, "prior_weight got 0.0"),
    (lambda: TreeSizer({1: 1.0}, margin=0.9), ArgumentValueError, "margin got 0.9"),
    (lambda: TreeSizer({1: 1.0}, prior=1.5), ArgumentValueError, "prior got 1.5"),
    (lambda: TreeSizer({1: 1.0}, probe_share=1.0), ArgumentValueError, "probe_share got 1.0"),
    (lambda: TreeSizer({8: {4: 1.0}}), ArgumentValueError, r"sizes got \[4\] .*the first 1"),
    (lambda: TreeSizer({8: {1: 0.0}}), ArgumentValueError, r"costs\[8\]\[1\] got 0.0"),
    (lambda: TreeSizer({0: {1: 1.0}}), ArgumentValueError, "a batch size got 0"),
    (lambda: TreeSizer({1: {1: 1.0}, 2: 1.0}), ArgumentTypeError, "costs got"),
    (lambda: TreeSizer({8: {1: 1.0}}).choose(), ArgumentTypeError, "bs got None .*an int"),
    (lambda: TreeSizer({8: {1: 1.0}}).choose(0), ArgumentValueError, "bs got 0"),
    (lambda: TreeSizer({8: {1: 1.0}}).break_even(), ArgumentTypeError, "bs got None"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
