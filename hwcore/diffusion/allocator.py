"""Best fit over the offsets of one range: the smallest free block that is large enough.

Offsets are numbers; what they address is the caller's. Free blocks are kept in order of (size,
offset), each as one int, in a sorted list of short lists (sortedcontainers), so that nothing takes
time by the number of blocks. Neighbours are found by where a free block starts and ends.
"""

from __future__ import annotations

import dataclasses

from sortedcontainers import SortedList

__all__ = ["AllocatorStats", "RangeAllocator"]

_OFFSET_BITS = 48


@dataclasses.dataclass(frozen=True)
class AllocatorStats:
    """How full a range is.

    Attributes
    ----------
    size_bytes, free_bytes, largest_free_bytes : int
    asked_bytes, taken_bytes : int
        Of live blocks: as they were asked for, and rounded up to the alignment.
    live_blocks, free_blocks : int
    """

    size_bytes: int
    free_bytes: int
    largest_free_bytes: int
    asked_bytes: int
    taken_bytes: int
    live_blocks: int
    free_blocks: int

    @property
    def waste(self) -> float:
        """Bytes taken over bytes asked for; 1 where nothing is."""
        return self.taken_bytes / self.asked_bytes if self.asked_bytes else 1.0

    @property
    def fragmentation(self) -> float:
        """Share of the free bytes that the largest free block does not have; in [0, 1)."""
        return 1 - self.largest_free_bytes / self.free_bytes if self.free_bytes else 0.0


class RangeAllocator:
    """Blocks of the range [0, size_bytes). Not safe for threads: its owner has a lock.

    Parameters
    ----------
    size_bytes : int
        In [0, 2**48); what is behind the last multiple of the alignment is not used.
    alignment : int
        Of offsets; sizes are rounded up to it.
    """

    def __init__(self, size_bytes: int, alignment: int = 64) -> None:
        self.alignment = alignment
        self.size_bytes = size_bytes // alignment * alignment
        self._by_size: SortedList = SortedList()
        self._end_of: dict[int, int] = {}  # free blocks: start to end
        self._start_of: dict[int, int] = {}  # and end to start
        self._live: dict[int, tuple[int, int]] = {}  # offset to bytes taken, bytes asked for
        self._asked = self._taken = 0
        if self.size_bytes:
            self._add(0, self.size_bytes)

    def allocate(self, size_bytes: int) -> int | None:
        """Return the offset of a new block, or None while no free block is large enough.

        ``size_bytes`` is at least 1.
        """
        need = -(-size_bytes // self.alignment) * self.alignment
        place = self._by_size.bisect_left(need << _OFFSET_BITS)
        if place == len(self._by_size):
            return None
        key: int = self._by_size.pop(place)
        offset = key & ((1 << _OFFSET_BITS) - 1)
        end = self._end_of.pop(offset)
        del self._start_of[end]
        if end > offset + need:
            self._add(offset + need, end)
        self._live[offset] = need, size_bytes
        self._taken += need
        self._asked += size_bytes
        return offset

    def free(self, offset: int) -> None:
        """Give a block back; KeyError if there is none."""
        taken, asked = self._live.pop(offset)
        self._taken -= taken
        self._asked -= asked
        start, end = offset, offset + taken
        if (before := self._start_of.get(start)) is not None:
            self._remove(before, start)
            start = before
        if (after := self._end_of.get(end)) is not None:
            self._remove(end, after)
            end = after
        self._add(start, end)

    def stats(self) -> AllocatorStats:
        """Return how full it is."""
        largest = self._by_size[-1] >> _OFFSET_BITS if self._by_size else 0
        free = self.size_bytes - self._taken
        return AllocatorStats(
            self.size_bytes,
            free,
            largest,
            self._asked,
            self._taken,
            len(self._live),
            len(self._by_size),
        )

    def _add(self, start: int, end: int) -> None:
        self._by_size.add((end - start) << _OFFSET_BITS | start)
        self._end_of[start] = end
        self._start_of[end] = start

    def _remove(self, start: int, end: int) -> None:
        self._by_size.remove((end - start) << _OFFSET_BITS | start)
        del self._end_of[start], self._start_of[end]
