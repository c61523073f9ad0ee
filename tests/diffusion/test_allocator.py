"""Best fit over offsets: against a plain list of what is taken, and how little it wastes."""

import random

import hypothesis
import pytest
from hypothesis import strategies as st

from hwcore.diffusion.allocator import RangeAllocator


def ranges(live, alignment):
    return sorted((o, o + -(-size // alignment) * alignment) for o, size in live.items())


def holes(live, size_bytes, alignment):
    """Free ranges, by the list of what is taken."""
    found, end = [], 0
    for start, stop in ranges(live, alignment):
        if start > end:
            found.append((end, start))
        end = stop
    return [*found, (end, size_bytes)] if end < size_bytes else found


@hypothesis.given(
    st.lists(st.one_of(st.integers(1, 700), st.floats(0, 1, exclude_max=True)), max_size=80),
    st.sampled_from([1, 16, 64]),
)
@hypothesis.settings(deadline=None)
def test_it_takes_the_smallest_hole_that_is_large_enough_and_joins_neighbours(steps, alignment):
    """An int allocates so much, a fraction frees the live block at that place."""
    size_bytes = 4096
    allocator, live = RangeAllocator(size_bytes, alignment), {}
    for step in steps:
        if isinstance(step, float):
            if live:
                offset = sorted(live)[int(step * len(live))]
                del live[offset]
                allocator.free(offset)
        else:
            need = -(-step // alignment) * alignment
            fits = [(b - a, a) for a, b in holes(live, size_bytes, alignment) if b - a >= need]
            offset = allocator.allocate(step)
            assert offset == (min(fits)[1] if fits else None)
            if offset is not None:
                live[offset] = step
    free = [b - a for a, b in holes(live, size_bytes, alignment)]
    stats = allocator.stats()
    assert (stats.free_bytes, stats.largest_free_bytes) == (sum(free), max(free, default=0))
    assert (stats.live_blocks, stats.free_blocks) == (len(live), len(free))
    assert stats.asked_bytes == sum(live.values())


def test_freeing_all_leaves_one_block():
    allocator = RangeAllocator(1 << 20)
    offsets = [allocator.allocate(1000) for _ in range(500)]
    random.Random(0).shuffle(offsets)
    for offset in offsets:
        allocator.free(offset)
    assert allocator.stats().free_blocks == 1
    assert allocator.allocate(1 << 20) == 0


def test_a_block_that_is_not_there_cannot_be_freed():
    allocator = RangeAllocator(1 << 20)
    offset = allocator.allocate(100)
    allocator.free(offset)
    for wrong in (offset, 64, -64):
        with pytest.raises(KeyError):
            allocator.free(wrong)
    assert allocator.stats().free_bytes == 1 << 20


def test_what_is_behind_the_last_multiple_of_the_alignment_is_not_used():
    allocator = RangeAllocator(130)
    assert allocator.size_bytes == 128
    assert allocator.allocate(129) is None


def test_a_range_of_nothing_has_no_room():
    assert RangeAllocator(0).allocate(1) is None


@pytest.mark.parametrize(
    "size", [lambda r: r.randint(100 << 10, 30 << 20), lambda r: r.randint(1, 4096)]
)
def test_blocks_take_little_more_than_was_asked_for(size):
    r = random.Random(0)
    allocator = RangeAllocator(1 << 44)
    for _ in range(2000):
        allocator.allocate(size(r))
    assert 1 <= allocator.stats().waste <= 1.05


def test_fragmentation_is_the_share_that_the_largest_hole_lacks():
    allocator = RangeAllocator(640)
    offsets = [allocator.allocate(64) for _ in range(10)]
    assert allocator.stats().fragmentation == 0
    for offset in offsets[::2]:
        allocator.free(offset)
    assert allocator.stats().fragmentation == pytest.approx(0.8)
