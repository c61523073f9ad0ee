"""What every file in benchmarks/ measures with: interleaved rounds in one process, medians, ratios.

A figure is a ratio against a peer or a limit that ran in the same rounds, for the machine's speed
drifts by more than most differences worth finding.
"""

from __future__ import annotations

import dataclasses
import gc
import statistics
import timeit
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["Row", "interleaved", "nanoseconds", "statements"]


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
    """

    what: str
    value: float
    unit: str
    target: float | None
    at_most: bool
    detail: str

    @property
    def reached(self) -> bool:
        """Whether the figure meets its target."""
        if self.target is None:
            return True
        return self.value <= self.target if self.at_most else self.value >= self.target


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
