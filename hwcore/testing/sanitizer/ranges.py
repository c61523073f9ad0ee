"""Which bytes of a storage an access touches, and whether two accesses touch the same ones.

A strided view touches runs of bytes at regular distances. Its layout is normalised to a first
byte, the length of a run, and the distances at which runs repeat, so that equal sets of bytes
mostly have equal spans: a transposed matrix is one run, a column is one run and one distance.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["Region", "Span", "covers", "overlap", "rows_of", "span_of"]

Dims = tuple[tuple[int, int], ...]
"""(distance in bytes, number of runs) of each level of repetition, nearest first."""

SEARCH_LIMIT = 20_000
"""Steps after which two layouts whose distances share no structure are taken to overlap."""


class Span(NamedTuple):
    """The bytes of one strided view.

    Attributes
    ----------
    lo, hi : int
        The bytes lie in [lo, hi).
    run : int
        Bytes in a row at each position.
    dims : tuple
        How the runs repeat; empty: one run, all of [lo, hi).
    """

    lo: int
    hi: int
    run: int
    dims: Dims


Region = tuple[Span, ...]
"""What an access touches: one span, or several in ascending order where only some rows count."""


def span_of(offset: int, sizes: Sequence[int], strides: Sequence[int], itemsize: int) -> Span:
    """Return the bytes of a view with at least one element.

    Parameters
    ----------
    offset : int
        Storage offset, in elements.
    sizes, strides
        As torch gives them; strides in elements, none negative.
    itemsize : int
        Bytes of an element.
    """
    run, dims = _normalised(tuple(sizes), tuple(strides), itemsize)
    lo = offset * itemsize
    return Span(lo, lo + run + _reach(dims), run, dims)


def rows_of(
    offset: int, sizes: Sequence[int], strides: Sequence[int], itemsize: int, rows: Iterable[int]
) -> Region:
    """Return the bytes of some rows (indices of the first dimension) of a view."""
    groups: list[list[int]] = []
    for row in sorted(set(rows)):
        if groups and row == groups[-1][1]:
            groups[-1][1] += 1
        else:
            groups.append([row, row + 1])
    spans = [
        span_of(offset + start * strides[0], (stop - start, *sizes[1:]), strides, itemsize)
        for start, stop in groups
    ]
    return tuple(sorted(spans))


def overlap(a: Region, b: Region) -> bool:
    """Say whether two regions of one storage share a byte.

    Exact, except that layouts with distances that share no structure are searched for at most
    :data:`SEARCH_LIMIT` steps and then said to overlap.
    """
    if len(a) == len(b) == 1:
        return _spans_meet(a[0], b[0])
    start = 0
    for one in a:
        while start < len(b) and b[start].hi <= one.lo:
            start += 1
        for other in b[start:]:
            if other.lo >= one.hi:
                break
            if _spans_meet(one, other):
                return True
    return False


def covers(a: Region, b: Region) -> bool:
    """Say whether ``a`` surely holds every byte of ``b``. False may mean that it is unknown."""
    if a == b:
        return True
    if len(a) > 1 or a[0].dims:
        return False
    return a[0].lo <= b[0].lo and a[0].hi >= max(span.hi for span in b)


def _spans_meet(a: Span, b: Span) -> bool:
    if a.hi <= b.lo or b.hi <= a.lo:
        return False
    if not (a.dims or b.dims):
        return True
    return _layouts_meet(a.lo - b.lo, a.run, a.dims, b.run, b.dims)


@functools.lru_cache(maxsize=4096)
def _layouts_meet(distance: int, run_a: int, dims_a: Dims, run_b: int, dims_b: Dims) -> bool:
    """Say whether a run of a and a run of b share a byte.

    A run of a starts ``distance + sum(stride * i) - sum(stride * j)`` after one of b, and they
    share a byte if that is above ``-run_a`` and below ``run_b``. Counting each j from its other
    end turns the difference into one sum of multiples, in which equal strides are one term.
    """
    base = distance - _reach(dims_b)
    terms = _merged(sorted(dims_a + dims_b))
    return _Search().reaches(terms, 1 - run_a - base, run_b - 1 - base)


class _Search:
    """Looks for a sum of multiples in a window."""

    def __init__(self) -> None:
        self.steps = 0

    def reaches(self, terms: Dims, low: int, high: int) -> bool:
        """Say whether ``sum(stride * x)``, each x in [0, count), falls into [low, high]."""
        if high < 0 or low > _reach(terms):
            return False
        if low <= 0:
            return True
        *inner, (stride, count) = terms
        step = _common_divisor(terms)
        if high // step * step < low:
            return False
        rest = tuple(inner)
        first = max(0, -((_reach(rest) - low) // stride))
        for x in range(first, min(count - 1, high // stride) + 1):
            self.steps += 1
            if self.steps > SEARCH_LIMIT or self.reaches(rest, low - stride * x, high - stride * x):
                return True
        return False


@functools.lru_cache(maxsize=4096)
def _normalised(
    sizes: tuple[int, ...], strides: tuple[int, ...], itemsize: int
) -> tuple[int, Dims]:
    run = itemsize
    dims: list[tuple[int, int]] = []
    pairs = zip(sizes, strides, strict=True)
    for stride, size in sorted((st * itemsize, n) for n, st in pairs if n > 1 and st):
        if not dims and stride <= run:  # the next run starts within this one or right behind it
            run += (size - 1) * stride
        else:
            dims.append((stride, size))
    return run, _merged(dims)


def _merged(dims: Iterable[tuple[int, int]]) -> Dims:
    """Join repetitions that continue each other; strides grow from one to the next."""
    merged: list[tuple[int, int]] = []
    for stride, count in dims:
        if merged:
            inner, inner_count = merged[-1]
            if stride % inner == 0 and stride <= inner * inner_count:
                merged[-1] = (inner, inner_count + (count - 1) * (stride // inner))
                continue
        merged.append((stride, count))
    return tuple(merged)


def _reach(dims: Dims) -> int:
    return sum([stride * (count - 1) for stride, count in dims])


def _common_divisor(dims: Dims) -> int:
    return math.gcd(*(stride for stride, _ in dims))
