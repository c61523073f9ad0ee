"""What a step costs by the size of its trees: measured once, and kept."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import statistics
import tempfile
import time
from typing import TYPE_CHECKING, Any, overload

from hwcore import _env
from hwcore._checks import check_size
from hwcore.errors import ArgumentTypeError, ArgumentValueError, describe

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

__all__ = ["check_sizes", "measure_costs"]

_log = logging.getLogger(__name__)

_FORMAT = 2  # of the file


@overload
def measure_costs(
    step: Callable[[int], object],
    sizes: Sequence[int],
    *,
    rounds: int = 7,
    key: Mapping[str, Any] | None = None,
    cache: Path | None = None,
) -> dict[int, float]: ...


@overload
def measure_costs(
    step: Callable[[int, int], object],
    sizes: Sequence[int],
    *,
    batch_sizes: Sequence[int],
    rounds: int = 7,
    key: Mapping[str, Any] | None = None,
    cache: Path | None = None,
) -> dict[int, dict[int, float]]: ...


def measure_costs(
    step: Callable[..., object],
    sizes: Sequence[int],
    *,
    batch_sizes: Sequence[int] | None = None,
    rounds: int = 7,
    key: Mapping[str, Any] | None = None,
    cache: Path | None = None,
) -> dict[int, float] | dict[int, dict[int, float]]:
    """Measure the seconds of a step by tree size, and by batch size if there are several.

    Called once, before serving, for the sizes that graphs are captured for.

    Rounds go through all sizes in turn, so that what disturbs the machine disturbs them alike;
    medians count. One round goes ahead unmeasured: first calls set up what later ones use.

    Parameters
    ----------
    step : callable
        Runs a whole step and waits for it: drafting, forward, verify and commit, of as many nodes
        as it is told; with ``batch_sizes`` it is told how many requests, then how many nodes.
        Size 1 is decoding without drafts.
    sizes : sequence of int
        Ascending, the first 1.
    batch_sizes : sequence of int, optional
        Ascending, at least 1.
    rounds : int
        At least 1.
    key : mapping of str to plain values, optional
        What the figures depend on: model, device, dtype, context, threads. With it they are kept
        and found again; without, they are measured at each call.
    cache : Path, optional
        The file to keep them in; by default one for each ``key``, in ``tree-costs`` of hwcore's
        cache (``HWCORE_CACHE``, else ``~/.cache/hwcore``). Figures of something else, and a file
        that cannot be read, are measured anew, which a warning says.

    Returns
    -------
    dict of int to float, or dict of int to that
        Seconds by tree size, or by batch size and tree size; for :class:`TreeSizer`.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        If ``sizes``, ``batch_sizes``, ``rounds`` or ``key`` is not as said, or there is a ``cache``
        and no ``key``.
    """
    where = "measure_costs"
    check_sizes(where, sizes)
    _check_batch_sizes(where, batch_sizes)
    check_size(where, "rounds", rounds, 1, "Pass how often to measure each size")
    if cache is not None and key is None:
        expected, fix = "what the figures depend on, to keep them", "Name model and device at least"
        raise ArgumentTypeError(describe(where, "key", key, expected, fix))
    points = [(size,) for size in sizes]
    if batch_sizes is not None:
        points = [(bs, size) for bs in batch_sizes for size in sizes]  # type: ignore[misc]
    about: dict[str, Any] = {}
    file = cache
    if key is not None:
        about, file = _identify(where, key, points, cache)
    found = _read(file, about, len(points)) if file is not None else None
    if found is None:
        found = _measure(step, points, rounds)
        if file is not None:
            _write(file, {**about, "seconds": found})
    if batch_sizes is None:
        return dict(zip(sizes, found, strict=True))
    width, costs = len(sizes), {}
    for number, bs in enumerate(batch_sizes):
        costs[bs] = dict(zip(sizes, found[number * width :][:width], strict=True))
    return costs


def _measure(
    step: Callable[..., object], points: Sequence[tuple[int, ...]], rounds: int
) -> list[float]:
    seconds: dict[tuple[int, ...], list[float]] = {point: [] for point in points}
    for number in range(rounds + 1):
        for point in points:
            began = time.perf_counter()
            step(*point)
            if number:
                seconds[point].append(time.perf_counter() - began)
    return [statistics.median(times) for times in seconds.values()]


def check_sizes(where: str, sizes: Sequence[int]) -> None:
    """Raise unless these are sizes of trees: ascending, the first 1."""
    for size in sizes:
        check_size(where, "a tree size", size, 1, "Count the root as well")
    if not sizes or sizes[0] != 1 or list(sizes) != sorted(set(sizes)):
        expected, fix = "ascending sizes, the first 1", "Size 1 is decoding without drafts"
        raise ArgumentValueError(describe(where, "sizes", list(sizes), expected, fix))


def _check_batch_sizes(where: str, batch_sizes: Sequence[int] | None) -> None:
    if batch_sizes is None:
        return
    for bs in batch_sizes:
        check_size(where, "a batch size", bs, 1, "Count the requests")
    if not batch_sizes or list(batch_sizes) != sorted(set(batch_sizes)):
        got, expected = list(batch_sizes), "ascending batch sizes, one at least"
        fix = "Pass those that graphs are captured for"
        raise ArgumentValueError(describe(where, "batch_sizes", got, expected, fix))


def _identify(
    where: str, key: Mapping[str, Any], points: Sequence[tuple[int, ...]], file: Path | None
) -> tuple[dict[str, Any], Path]:
    """Return what a file of these figures says of itself, and which file that is."""
    about = {"format": _FORMAT, "points": points, "key": dict(key)}
    try:
        text = json.dumps(about, sort_keys=True)
    except TypeError as error:
        expected, fix = "strings, numbers, and lists and dicts of them", "Name what it depends on"
        raise ArgumentTypeError(describe(where, "key", key, expected, fix)) from error
    name = hashlib.sha256(text.encode()).hexdigest()[:16]
    return json.loads(text), file or _env.cache_folder() / "tree-costs" / f"{name}.json"


def _read(cache: Path, about: dict[str, Any], count: int) -> list[float] | None:
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
        sound = kept == about and len(seconds) == count
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
