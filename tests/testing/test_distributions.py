import math

import pytest
import torch

from hwcore.testing.distributions import (
    chi_square_bound,
    chi_square_tail,
    judge,
    power,
    samples_needed,
)


@pytest.mark.parametrize(
    ("freedom", "tail", "bound"),
    [  # from printed tables
        (1, 0.05, 3.841),
        (1, 0.001, 10.828),
        (2, 0.01, 9.210),
        (5, 0.95, 1.145),
        (10, 0.05, 18.307),
        (10, 0.99, 2.558),
        (30, 0.001, 59.703),
        (100, 0.05, 124.342),
        (100, 0.995, 67.328),
        (1000, 0.05, 1074.679),
    ],
)
def test_bounds_are_those_of_the_tables(freedom, tail, bound):
    assert chi_square_bound(freedom, tail) == pytest.approx(bound, abs=6e-4)


@pytest.mark.parametrize("statistic", [1e-9, 0.3, 1, 7, 60, 500])
def test_tails_that_have_a_closed_form(statistic):
    """Of 2 degrees an exponential's, of 1 a normal's, of 4 by parts."""
    half = statistic / 2
    assert chi_square_tail(statistic, 2) == pytest.approx(math.exp(-half), rel=1e-11)
    assert chi_square_tail(statistic, 1) == pytest.approx(math.erfc(math.sqrt(half)), rel=1e-11)
    assert chi_square_tail(statistic, 4) == pytest.approx(math.exp(-half) * (1 + half), rel=1e-11)


@pytest.mark.parametrize("freedom", [1, 2, 7, 63, 4096])
@pytest.mark.parametrize("tail", [1e-12, 1e-6, 0.3, 0.999])
def test_the_bound_is_where_the_tail_is(freedom, tail):
    assert chi_square_tail(chi_square_bound(freedom, tail), freedom) == pytest.approx(tail)


def sampled(probs, n, seed):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.multinomial(torch.tensor(probs), n, replacement=True, generator=generator)
    return drawn.bincount(minlength=len(probs))


PROBS = [0.4, 0.3, 0.2, 0.05, 0.04, 0.00999, 0.00001]


def test_false_alarms_are_as_frequent_as_stated():
    alarms = sum(not judge(sampled(PROBS, 2000, k), PROBS, false_alarm=0.05) for k in range(2000))
    assert 60 <= alarms <= 140


@pytest.mark.parametrize("distance", [0.02, 0.03, 0.05])
def test_a_wrong_sampler_is_found_at_least_as_often_as_stated(distance):
    wrong = [0.4 + distance, 0.3 - distance, *PROBS[2:]]
    found = sum(
        not judge(sampled(wrong, 2000, seed), PROBS, false_alarm=0.05) for seed in range(1000)
    )
    stated = power(2000, 6, distance, false_alarm=0.05)
    assert found / 1000 > stated - 0.05


def test_power_is_tight_where_the_difference_is_spread_like_the_distribution():
    """Half of the mass scaled up, half down: there Cauchy and Schwarz's bound is reached."""
    probs, distance = [0.125] * 8, 0.05
    wrong = [0.125 * (1 + 2 * distance)] * 4 + [0.125 * (1 - 2 * distance)] * 4
    found = sum(
        not judge(sampled(wrong, 1200, seed), probs, false_alarm=0.05) for seed in range(1000)
    )
    assert found / 1000 == pytest.approx(power(1200, 8, distance, false_alarm=0.05), abs=0.06)


def test_power_without_a_difference_is_the_false_alarm():
    assert power(1000, 8, 0.0, false_alarm=0.01) == pytest.approx(0.01)


@pytest.mark.parametrize(("cells", "distance"), [(2, 0.1), (8, 0.02), (100, 0.05), (500, 0.01)])
def test_samples_needed_is_close_to_the_least(cells, distance):
    n = samples_needed(cells, distance, false_alarm=1e-6, miss=1e-3)
    assert power(n, cells, distance, false_alarm=1e-6) >= 1 - 1e-3
    assert power(int(n * 0.95), cells, distance, false_alarm=1e-6) < 1 - 1e-3


def test_one_impossible_sample_is_enough():
    verdict = judge([5000, 4999, 1], [0.5, 0.5, 0.0])
    assert not verdict
    assert verdict.impossible == 1
    assert str(verdict) == "1 of 10000 samples have probability 0"


def test_rare_outcomes_are_put_together():
    verdict = judge([9960, 10, 10, 10, 10], [0.996, 0.0004, 0.0008, 0.0014, 0.0014])
    assert verdict.cells == 4
    assert verdict
    # Too rare even together: the least of the others takes them.
    assert judge([9980, 15, 5], [0.998, 0.0015, 0.0005]).cells == 2


def test_a_certain_outcome_is_compatible_with_itself_alone():
    assert judge([100, 0], [1.0, 0.0])
    assert not judge([99, 1], [1.0, 0.0])


def test_the_verdict_says_how_sure_it_is():
    assert str(judge([60, 40], [0.5, 0.5], false_alarm=0.01)) == (
        "chi-square 4.0, within 6.6 for 2 cells and 100 samples (false alarm 0.01), distance 0.1000"
    )
    assert "beyond" in str(judge([80, 20], [0.5, 0.5], false_alarm=0.01))
