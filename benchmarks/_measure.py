"""How every benchmark measures: interleaved rounds in one process, medians, ratios.

These figures are ratios against a peer or a limit that ran in the same rounds, for the machine's
speed drifts by more than most differences worth finding.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["Row", "interleaved", "per_call"]


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a benchmark's table.

    Attributes
    ----------
    what : str
        What was measured.
    value : float
        The figure that the target is about: a ratio, or a difference in ``unit``.
    unit : str
        ``"x"`` for a ratio.
    target : float
        The figure to reach.
    at_most : bool
        True: at most ``target``; False: at least.
    detail : str
        The medians behind the figure.
    """

    what: str
    value: float
    unit: str
    target: float
    at_most: bool
    detail: str

    @property
    def reached(self) -> bool:
        """Whether the figure meets its target."""
        return self.value <= self.target if self.at_most else self.value >= self.target


def per_call(function: Callable[[], object], calls: int) -> float:
    """Return the seconds that one call takes, over ``calls`` in a row."""
    rounds = range(calls)
    start = time.perf_counter()
    for _ in rounds:
        function()
    return (time.perf_counter() - start) / calls


def interleaved(
    subjects: Mapping[str, Callable[[], float]], rounds: int, warm_up: int = 1
) -> dict[str, float]:
    """Return each subject's median over rounds in which all of them take turns.

    A subject returns the seconds of one measurement.
    """
    seen: dict[str, list[float]] = {name: [] for name in subjects}
    for done in range(warm_up + rounds):
        for name, measure in subjects.items():
            seconds = measure()
            if done >= warm_up:
                seen[name].append(seconds)
    return {name: statistics.median(values) for name, values in seen.items()}
