"""How large a tree to verify: what a forward costs against what a tree should bring."""

from __future__ import annotations

import json
import logging
import math
import os
import statistics
import tempfile
import time
from typing import TYPE_CHECKING, Any

from hwcore._checks import check_size
from hwcore.errors import ArgumentTypeError, ArgumentValueError, describe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

__all__ = ["TreeSizer", "measure_costs"]

_log = logging.getLogger(__name__)

_FORMAT = 1  # of the file


def measure_costs(
    step: Callable[[int], object],
    sizes: Sequence[int],
    *,
    rounds: int = 7,
    cache: Path | None = None,
    key: Mapping[str, Any] | None = None,
) -> dict[int, float]:
    """Measure the seconds of a step by tree size.

    Called once, before serving, for each batch size that sizes are chosen for.

    Rounds go through all sizes in turn, so that what disturbs the machine disturbs them alike;
    medians count. One round goes ahead unmeasured.

    Parameters
    ----------
    step : callable
        Runs a whole step with trees of so many nodes and waits for it: drafting, forward, verify
        and commit. Size 1 is decoding without drafts.
    sizes : sequence of int
        Ascending, the first 1.
    rounds : int
        At least 1.
    cache : Path, optional
        A file to keep the figures in. Those of another ``key`` or other sizes, and a file that
        cannot be read, are measured anew, which a warning says.
    key : mapping of str to plain values, optional
        What the figures depend on: model, device, dtype, batch size, threads.

    Returns
    -------
    dict of int to float
        Seconds, in the order of ``sizes``.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        If ``sizes``, ``rounds`` or ``key`` is not as said.
    """
    where = "measure_costs"
    _check_sizes(where, sizes)
    check_size(where, "rounds", rounds, 1, "Pass how often to measure each size")
    about = {"format": _FORMAT, "sizes": list(sizes), "key": dict(key or {})}
    try:
        about = json.loads(json.dumps(about, sort_keys=True))
    except TypeError as error:
        expected, fix = "strings, numbers, and lists and dicts of them", "Name what it depends on"
        raise ArgumentTypeError(describe(where, "key", key, expected, fix)) from error
    if cache is not None and (kept := _read(cache, about)) is not None:
        return dict(zip(sizes, kept, strict=True))
    seconds: dict[int, list[float]] = {size: [] for size in sizes}
    for number in range(rounds + 1):
        for size in sizes:
            began = time.perf_counter()
            step(size)
            if number:
                seconds[size].append(time.perf_counter() - began)
    costs = {size: statistics.median(times) for size, times in seconds.items()}
    if cache is not None:
        _write(cache, {**about, "seconds": list(costs.values())})
    return costs


class TreeSizer:
    """Chooses ``num_draft_tokens`` for a batch: the size that should give most tokens a second.

    It learns from what was accepted how likely the node of each rank is to be on the path. Nodes
    are ranked by their scores, so that the first ranks of a large tree are the smaller trees, and
    one tree teaches about them all. The tokens to expect of a tree are one and these chances.

    >>> sizer = TreeSizer(measure_costs(step, (1, 4, 8, 16)))
    >>> size = sizer.choose()
    >>> sizer.learn(accepted_nodes, size)

    Parameters
    ----------
    costs : mapping of int to float
        Seconds of a step by tree size; 1, decoding without drafts, among them.
    prior : float
        Chance of a node before anything was seen: of rank ``r`` it is ``prior ** sqrt(r)``.
    memory : float
        Weight that an observation keeps with each later one, in (0, 1]: what lets it follow a text
        that changes.
    margin : float
        What a tree must promise over the size in use: the best of many noisy estimates flatters
        itself, and sizes should not flap. Going back to no drafts needs none.
    probe_every : int
        After so many steps without drafts one is drafted to see whether that still is right.

    Attributes
    ----------
    size : int
        What was chosen last.
    """

    def __init__(
        self,
        costs: Mapping[int, float],
        *,
        prior: float = 0.6,
        memory: float = 0.98,
        margin: float = 1.05,
        probe_every: int = 64,
    ) -> None:
        where = "TreeSizer"
        _check_sizes(where, sorted(costs))
        for size, seconds in costs.items():
            if not math.isfinite(seconds) or seconds <= 0:
                expected, fix = "seconds, greater than 0", "Pass what measure_costs returned"
                raise ArgumentValueError(describe(where, f"costs[{size}]", seconds, expected, fix))
        for name, value, low, high in (
            ("prior", prior, 0.0, 1.0),
            ("memory", memory, 0.0, 1.0),
            ("margin", margin, 1.0, math.inf),
        ):
            if not low <= value <= high or (name == "memory" and value == 0):
                expected = f"a number in [{low}, {high}]"
                fix = "Leave it out for the default"
                raise ArgumentValueError(describe(where, name, value, expected, fix))
        check_size(where, "probe_every", probe_every, 1, "Pass a number of steps")
        self.costs = {size: costs[size] for size in sorted(costs)}
        self.size = 1
        self._memory, self._margin, self._probe_every = memory, margin, probe_every
        ranks = range(max(costs))
        # The prior weighs as much as a handful of observations.
        self._trials = [_PRIOR_WEIGHT] * len(ranks)
        self._hits = [_PRIOR_WEIGHT * prior ** math.sqrt(rank) for rank in ranks]
        self._plain_steps = 0

    def expected(self, size: int) -> float:
        """Return the tokens to expect of a step with a tree of so many nodes."""
        pairs = zip(self._hits[1:size], self._trials[1:size], strict=True)
        return 1.0 + math.fsum(hits / trials for hits, trials in pairs)

    def break_even(self) -> dict[int, float]:
        """Return how many tokens a step each size must bring to be as fast as no drafts."""
        return {size: seconds / self.costs[1] for size, seconds in self.costs.items()}

    def choose(self) -> int:
        """Return the size for the next step; 1: without drafts."""
        speeds = {size: self.expected(size) / cost for size, cost in self.costs.items()}
        best = max(speeds, key=speeds.__getitem__)  # of equals the smallest
        stays = speeds[best] <= self._margin * speeds[self.size]
        if best > 1 and stays and (self.size == 1 or speeds[self.size] > speeds[1]):
            best = self.size
        self.size = best
        if best > 1:
            self._plain_steps = 0
            return best
        self._plain_steps += 1
        if self._plain_steps < self._probe_every or len(self.costs) == 1:
            return 1
        self._plain_steps = 0
        # The cheapest that tells anything, a step.
        return min((size for size in self.costs if size > 1), key=self.costs.__getitem__)

    def learn(self, accepted: Iterable[int], size: int) -> None:
        """Take what a verified tree showed.

        Parameters
        ----------
        accepted : iterable of int
            Ranks of the nodes on the accepted path (``DraftResults.ranks``); the root's, 0, may be
            among them.
        size : int
            Nodes that the tree had.
        """
        on_path = set(accepted)
        for rank in range(1, min(size, len(self._hits))):
            self._hits[rank] = self._memory * self._hits[rank] + (rank in on_path)
            self._trials[rank] = self._memory * self._trials[rank] + 1.0


_PRIOR_WEIGHT = 4.0


def _check_sizes(where: str, sizes: Sequence[int]) -> None:
    for size in sizes:
        check_size(where, "a tree size", size, 1, "Count the root as well")
    if not sizes or sizes[0] != 1 or list(sizes) != sorted(set(sizes)):
        expected, fix = "ascending sizes, the first 1", "Size 1 is decoding without drafts"
        raise ArgumentValueError(describe(where, "sizes", list(sizes), expected, fix))


def _read(cache: Path, about: dict[str, Any]) -> list[float] | None:
    try:
        text = cache.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        _log.warning("hwcore: measured costs in %s cannot be read (%s): measuring", cache, error)
        return None
    try:
        kept = json.loads(text)
        seconds = kept.pop("seconds")
        sound = kept == about and len(seconds) == len(about["sizes"])
        if sound and all(isinstance(s, float) and 0 < s < math.inf for s in seconds):
            return [float(s) for s in seconds]
        reason = "they are of something else"
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        reason = repr(error)
    _log.warning("hwcore: measured costs in %s are of no use (%s): measuring", cache, reason)
    return None


def _write(cache: Path, content: dict[str, Any]) -> None:
    """Write the file whole or not at all; that it could not be kept is no reason to stop."""
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=cache.parent, prefix=f".{cache.name}-")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content, file)
        os.replace(name, cache)
    except OSError as error:
        _log.warning("hwcore: measured costs cannot be kept in %s: %s", cache, error)
