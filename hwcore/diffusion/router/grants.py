"""Which slots a worker grants to the router."""

from __future__ import annotations

import collections
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hwcore.diffusion.messages import Slot
    from hwcore.diffusion.router.todo import Slots

__all__ = ["Grants"]

_WANTED = 4096


class Grants:
    """A stock of slots, of the sizes that were used last, and what was asked for beside it.

    Parameters
    ----------
    slots : Slots
    sizes : sequence of int
        The stock in the beginning.
    """

    def __init__(self, slots: Slots, sizes: Sequence[int]) -> None:
        self.slots = slots
        self._sizes: collections.deque[int] = collections.deque(sizes, maxlen=len(sizes))
        self._wanted: collections.deque[int] = collections.deque()

    def want(self, size_bytes: int) -> None:
        """Take note of a size that the router wants."""
        if size_bytes not in self._wanted and len(self._wanted) < _WANTED:
            self._wanted.append(size_bytes)

    def forget_wanted(self) -> None:
        """Know of no size that is wanted: the router begins anew."""
        self._wanted.clear()

    def used(self, size_bytes: int) -> None:
        """Take note of a slot that a job has taken: the stock gets one like it."""
        self._sizes.append(size_bytes)

    def made(self) -> list[Slot]:
        """Return new slots, as many as there is room for.

        First what the router wants, in the order in which it asked: a large slot is not put off by
        small ones.
        """
        granted: list[Slot] = []
        while self._wanted:
            slot = self.slots.grant(self._wanted[0])
            if slot is None:
                return granted
            granted.append(slot)
            self._wanted.popleft()
        missing = collections.Counter(self._sizes)
        missing.subtract(slot.size_bytes for slot in self.slots.granted())
        slots = map(self.slots.grant, missing.elements())
        return granted + [slot for slot in slots if slot is not None]
