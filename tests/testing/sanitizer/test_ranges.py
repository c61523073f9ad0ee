"""Which bytes an access touches: compared with counting them one by one."""

from __future__ import annotations

import itertools
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hwcore.testing.sanitizer import ranges
from hwcore.testing.sanitizer.ranges import covers, overlap, rows_of, span_of

LAYOUTS = st.tuples(
    st.integers(0, 30),  # offset
    st.lists(st.tuples(st.integers(1, 5), st.integers(0, 12)), max_size=3),  # (size, stride)
    st.sampled_from([1, 2, 4]),  # itemsize
)


def region(layout):
    offset, dims, itemsize = layout
    return (span_of(offset, [n for n, _ in dims], [s for _, s in dims], itemsize),)


def bytes_of(layout):
    offset, dims, itemsize = layout
    return {
        (offset + sum(i * s for i, (_, s) in zip(index, dims, strict=True))) * itemsize + byte
        for index in itertools.product(*(range(n) for n, _ in dims))
        for byte in range(itemsize)
    }


def of(tensor):
    return (span_of(tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.itemsize),)


@given(LAYOUTS, LAYOUTS)
def test_two_layouts_overlap_if_they_share_a_byte(a, b):
    assert overlap(region(a), region(b)) == bool(bytes_of(a) & bytes_of(b))


@given(LAYOUTS)
def test_a_span_ends_with_its_last_byte(layout):
    (span,) = region(layout)
    touched = bytes_of(layout)
    assert (span.lo, span.hi) == (min(touched), max(touched) + 1)


@given(LAYOUTS, LAYOUTS)
def test_covering_is_never_claimed_in_vain(a, b):
    if covers(region(a), region(b)):
        assert bytes_of(a) >= bytes_of(b)


@given(
    st.lists(st.integers(0, 7), min_size=1),
    st.lists(st.integers(0, 7), min_size=1),
    st.sampled_from([(12, 1), (4, 1), (1, 8), (3, 20)]),
)
def test_rows_overlap_if_they_share_a_byte(ours, theirs, strides):
    def rows(numbers):
        touched = {4 * (r * strides[0] + c * strides[1]) for r in numbers for c in range(4)}
        return rows_of(0, (8, 4), strides, 4, numbers), touched

    (a, bytes_a), (b, bytes_b) = rows(ours), rows(theirs)
    assert overlap(a, b) == bool(bytes_a & bytes_b)


@given(st.lists(st.integers(0, 7), min_size=1), LAYOUTS)
def test_rows_and_a_view_overlap_if_they_share_a_byte(numbers, view):
    touched = {4 * (r * 12 + c) + byte for r in numbers for c in range(4) for byte in range(4)}
    assert overlap(rows_of(0, (8, 4), (12, 1), 4, numbers), region(view)) == bool(
        touched & bytes_of(view)
    )


TABLE = torch.zeros(6, 8)


@pytest.mark.parametrize(
    ("a", "b", "shared"),
    [
        (TABLE[:, 0], TABLE[:, 1], False),
        (TABLE[:, 0:2], TABLE[:, 1], True),
        (TABLE[::2], TABLE[1::2], False),
        (TABLE.view(-1)[::2], TABLE.view(-1)[1::2], False),
        (TABLE.view(-1)[::3], TABLE.view(-1)[1::2], True),
        (TABLE[:3], TABLE[3:], False),
        (TABLE[:, :4], TABLE[:, 4:], False),
        (TABLE.t(), TABLE[5, 7:], True),
        (TABLE[0].expand(4, 8), TABLE[1], False),
        (TABLE[2:4, 2:4], TABLE[3:5, 4:6], False),
        (TABLE[2:4, 2:4], TABLE[3:5, 3:5], True),
    ],
)
def test_views_of_a_table(a, b, shared):
    assert overlap(of(a), of(b)) is overlap(of(b), of(a)) is shared


def test_a_transposed_matrix_is_one_run():
    assert of(TABLE.t()) == of(TABLE)


def test_halves_of_a_huge_pool_are_told_apart_at_once():
    shape, strides = (1 << 20, 64, 4, 128), (64 * 8 * 128, 8 * 128, 128, 1)
    keys, values = ((span_of(offset, shape, strides, 2),) for offset in (0, 4 * 128))
    before = time.perf_counter()
    assert not overlap(keys, values)
    assert overlap(keys, (span_of(4 * 128 - 1, shape, strides, 2),))
    assert time.perf_counter() - before < 0.1


def test_long_progressions_of_two_strides_are_told_apart_at_once():
    eights, twelves = ((span_of(o, (10**6,), (s,), 1),) for o, s in ((0, 8), (2, 12)))
    assert not overlap(eights, twelves)
    assert overlap(eights, (span_of(4, (10**6,), (12,), 1),))


def test_what_takes_too_long_to_decide_counts_as_overlapping(monkeypatch):
    # Exact: no sum of multiples of 10 and 21 plus 1 hits the other's runs in this window.
    a = (span_of(0, (40,), (210,), 1),)
    b = (span_of(9, (30, 30), (211, 2110), 1),)
    monkeypatch.setattr(ranges, "SEARCH_LIMIT", 10_000_000)
    ranges._layouts_meet.cache_clear()
    exact = overlap(a, b)
    monkeypatch.setattr(ranges, "SEARCH_LIMIT", 0)
    ranges._layouts_meet.cache_clear()
    assert overlap(a, b)
    ranges._layouts_meet.cache_clear()
    assert not exact
