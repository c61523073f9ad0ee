"""What every file in benchmarks/ measures with: interleaved rounds in one process, medians, ratios.

A figure is a ratio against a peer or a limit that ran in the same rounds, for the machine's speed
drifts by more than most differences worth finding.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import statistics
import timeit
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["NotMeasuredError", "Row", "Target", "interleaved", "nanoseconds", "statements"]


class NotMeasuredError(Exception):
    """Raised by a subject that cannot be measured here; the message says why."""


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
    target : float or None
        The figure to reach; None for one that is given for information.
    at_most : bool
        True: at most ``target``; False: at least.
    detail : str
        The medians behind the figure.
    not_measured : str
        Why there is no figure; empty where there is one.
    """

    what: str
    value: float
    unit: str
    target: float | None
    at_most: bool
    detail: str
    not_measured: str = ""

    @property
    def reached(self) -> bool:
        """Whether the figure meets its target."""
        if self.not_measured:
            return False
        if self.target is None:
            return True
        return self.value <= self.target if self.at_most else self.value >= self.target

    @property
    def missed(self) -> bool:
        """Whether there is a figure, and it does not meet its target."""
        return not (self.not_measured or self.reached)

    def as_simulated(self) -> Row:
        """Return the line of a device that is simulated: its figure is none."""
        if self.not_measured:
            return self
        reason = f"simulated, which says nothing of any device: {self.figure} ({self.detail})"
        return dataclasses.replace(self, value=math.nan, not_measured=reason)

    @property
    def figure(self) -> str:
        """The figure with its unit, as text."""
        return "not measured" if self.not_measured else f"{self.value:.3g} {self.unit}"

    @property
    def wanted(self) -> str:
        """The target as text."""
        sign = "≤" if self.at_most else "≥"
        return "none" if self.target is None else f"{sign} {self.target:g} {self.unit}"


@dataclasses.dataclass(frozen=True)
class Target:
    """A line of a benchmark's table before it is measured; of a subject's ``TARGETS``.

    Attributes
    ----------
    what, unit, at_most
        As in :class:`Row`.
    value : float or None
        The row's ``target``.
    """

    what: str
    value: float | None
    unit: str = "x"
    at_most: bool = True

    def row(self, value: float, detail: str) -> Row:
        """Return the line with its figure."""
        return Row(self.what, value, self.unit, self.value, self.at_most, detail)

    def not_measured(self, reason: str) -> Row:
        """Return the line without a figure, and why."""
        return Row(self.what, math.nan, self.unit, self.value, self.at_most, "", reason)


def interleaved(
    subjects: Mapping[str, Callable[[], float]], rounds: int, warm_up: int = 1
) -> dict[str, float]:
    """Return each subject's median over rounds in which all of them take turns.

    A subject makes one measurement and returns it, in seconds.
    """
    seen: dict[str, list[float]] = {name: [] for name in subjects}
    for done in range(warm_up + rounds):
        gc.collect()
        for name, measure in subjects.items():
            seconds = measure()
            if done >= warm_up:
                seen[name].append(seconds)
    return {name: statistics.median(values) for name, values in seen.items()}


def statements(
    sources: Mapping[str, str], names: Mapping[str, Any], rounds: int, calls: int
) -> dict[str, float]:
    """Return the median seconds of one execution of each Python statement, interleaved.

    The statements are compiled into the timing loop, so that no call is added to them; the cost
    of the empty loop is taken off.
    """
    timers = {name: timeit.Timer(source, globals=dict(names)) for name, source in sources.items()}
    timers["(empty)"] = timeit.Timer("pass")
    medians = interleaved(
        {name: lambda timer=timer: timer.timeit(calls) / calls for name, timer in timers.items()},  # type: ignore[misc]
        rounds,
    )
    empty = medians.pop("(empty)")
    return {name: max(seconds - empty, 1e-10) for name, seconds in medians.items()}


def nanoseconds(medians: Mapping[str, float]) -> str:
    """Return medians as text, in nanoseconds."""
    return ", ".join(f"{name} {seconds * 1e9:.0f} ns" for name, seconds in medians.items())
