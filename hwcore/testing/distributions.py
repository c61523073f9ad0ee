"""Whether a sampler samples from the distribution that it should: tests that say how sure they are.

A sampler is right or wrong in distribution only, so a test of it can err both ways. Both are
stated: ``false_alarm`` is the probability that a right sampler is rejected, and :func:`power` the
probability that a sampler at a given distance is found. With fixed seeds a test is deterministic:
it is then an alarm for ever or never, and the figures speak of the choice of seeds.

Distance is total variation: half the sum of the differences of probability, which is the greatest
difference of probability of any event.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Verdict", "chi_square_bound", "chi_square_tail", "judge", "power", "samples_needed"]

FALSE_ALARM = 1e-9
LEAST_EXPECTED = 10.0
"""Counts expected below this are put together: chi-square's tail holds for larger ones."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What counts say of a distribution; true where they are compatible.

    Attributes
    ----------
    samples : int
    cells : int
        Outcomes told apart; rare ones are put together.
    statistic, bound : float
        Chi-square of the counts, and what it exceeds with probability ``false_alarm``.
    impossible : int
        Samples that the distribution gives no mass. One is enough for a rejection.
    distance : float
        Total variation between the sample and the distribution: about ``sqrt(cells / samples)``
        where the sampler is right.
    false_alarm : float
    """

    samples: int
    cells: int
    statistic: float
    bound: float
    impossible: int
    distance: float
    false_alarm: float

    def __bool__(self) -> bool:
        return self.impossible == 0 and self.statistic <= self.bound

    def __str__(self) -> str:
        if self.impossible:
            return f"{self.impossible} of {self.samples} samples have probability 0"
        side = "within" if self else "beyond"
        return (
            f"chi-square {self.statistic:.1f}, {side} {self.bound:.1f} for {self.cells} cells and "
            f"{self.samples} samples (false alarm {self.false_alarm:g}), distance "
            f"{self.distance:.4f}"
        )


def judge(
    counts: Sequence[int] | torch.Tensor,
    expected: Sequence[float] | torch.Tensor,
    *,
    false_alarm: float = FALSE_ALARM,
) -> Verdict:
    """Hold the counts of a sample against the distribution that it should come from.

    Parameters
    ----------
    counts : sequence of int, or integer Tensor
        How often each outcome came; a tensor of any shape.
    expected : sequence of float, or floating Tensor
        Probability of each, in the same order; need not be normalised.
    false_alarm : float
        Probability with which a right sampler is rejected, in (0, 1).
    """
    seen = torch.as_tensor(counts).detach().cpu().to(torch.float64).flatten()
    probs = torch.as_tensor(expected).detach().cpu().to(torch.float64).flatten()
    probs = probs / probs.sum()
    samples = seen.sum()
    impossible = int(seen[probs == 0].sum())
    distance = float((seen / samples - probs).abs().sum()) / 2
    rare = (probs * samples < LEAST_EXPECTED) & (probs > 0)
    common = ~rare & (probs > 0)
    pooled_seen, pooled = seen[common], (probs * samples)[common]
    if rare.any():
        rest = (probs * samples)[rare].sum()
        if rest >= LEAST_EXPECTED or not len(pooled):
            pooled_seen = torch.cat([pooled_seen, seen[rare].sum().view(1)])
            pooled = torch.cat([pooled, rest.view(1)])
        else:  # still too rare for a cell of its own: the least of the others takes it in
            least = pooled.argmin()
            pooled_seen[least] += seen[rare].sum()
            pooled[least] += rest
    statistic = float(((pooled_seen - pooled) ** 2 / pooled).sum())
    return Verdict(
        samples=int(samples),
        cells=len(pooled),
        statistic=statistic,
        bound=chi_square_bound(len(pooled) - 1, false_alarm),
        impossible=impossible,
        distance=distance,
        false_alarm=false_alarm,
    )


def power(samples: int, cells: int, distance: float, *, false_alarm: float = FALSE_ALARM) -> float:
    """Return the probability, at least, with which :func:`judge` finds a sampler that is wrong.

    Parameters
    ----------
    samples, cells : int
        Of the test; cells are what :attr:`Verdict.cells` counts.
    distance : float
        Total variation between what is sampled and what should be, over these cells.

    Notes
    -----
    Chi-square of a wrong sampler is noncentral by ``samples * sum((p' - p)^2 / p)``. That sum is at
    least ``4 * distance^2`` by Cauchy and Schwarz, and power grows with it.
    """
    freedom = cells - 1
    bound = chi_square_bound(freedom, false_alarm)
    half = samples * 4 * distance**2 / 2
    # A Poisson mixture of central chi-squares; terms beyond twelve deviations do not matter.
    spread = 12 * math.sqrt(half) + 30
    found = 0.0
    for index in range(max(0, int(half - spread)), int(half + spread) + 1):
        weight = -half + (index * math.log(half) if half else 0.0) - math.lgamma(index + 1)
        if half or index == 0:
            found += math.exp(weight) * chi_square_tail(bound, freedom + 2 * index)
    return min(found, 1.0)


def samples_needed(
    cells: int, distance: float, *, false_alarm: float = FALSE_ALARM, miss: float = 1e-3
) -> int:
    """Return samples with which a sampler at ``distance`` is missed with probability ``miss``.

    The answer is at most a few per cent above the least that does.
    """
    samples = 1.0
    while power(int(samples), cells, distance, false_alarm=false_alarm) < 1 - miss:
        samples *= 2
    low = samples / 2
    while samples / low > 1.03:
        middle = (low + samples) / 2
        enough = power(int(middle), cells, distance, false_alarm=false_alarm) >= 1 - miss
        low, samples = (low, middle) if enough else (middle, samples)
    return math.ceil(samples)


def chi_square_tail(statistic: float, freedom: int) -> float:
    """Return the probability that chi-square exceeds a value.

    Notes
    -----
    The regularised upper incomplete gamma function of half of both: by its series up to the mean,
    by Legendre's continued fraction beyond, which are accurate to about 1e-13 of the result there.
    """
    if statistic <= 0 or freedom == 0:
        return 1.0 if statistic <= 0 else 0.0
    a, x = freedom / 2, statistic / 2
    front = math.exp(a * math.log(x) - x - math.lgamma(a))
    if x < a + 1:
        term = total = 1 / a
        step = a
        while term > total * 1e-16:
            step += 1
            term *= x / step
            total += term
        return 1 - front * total
    # Lentz's evaluation, from the front.
    b = x + 1 - a
    c, d = math.inf, 1 / b
    value = d
    for n in range(1, 100_000):
        numerator = n * (a - n)
        b += 2
        d = 1 / (b + numerator * d)
        c = b + numerator / c
        value *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return front * value


def chi_square_bound(freedom: int, tail: float) -> float:
    """Return what chi-square exceeds with probability ``tail``; 0 with nothing free to vary."""
    if freedom == 0:
        return 0.0
    low, high = 0.0, freedom + 10.0
    while chi_square_tail(high, freedom) > tail:
        low, high = high, high * 2
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if chi_square_tail(middle, freedom) > tail else (low, middle)
    return high
