"""Who runs in the next step: first the prefills, then everyone decodes, as memory allows."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from examples.serving.request import Batch

if TYPE_CHECKING:
    from examples.serving.kv_pool import KVPool
    from examples.serving.request import Request


class Scheduler:
    """Chooses each step's requests from what the host knows, which may be a step old.

    With overlap a step is chosen before the tokens of the last one are known. So memory is taken
    for the most that the steps in flight can emit, and an answer is taken to be complete once they
    must complete it, one token each.

    Parameters
    ----------
    pool : KVPool
    emits : int
        Tokens that a decode step gives a request at most.
    reach : int
        Slots beyond a request's entries that a decode step writes to, at least ``emits``.
    chunk : int
        Tokens of a prefill step.
    """

    def __init__(self, pool: KVPool, emits: int, reach: int, chunk: int) -> None:
        self._pool, self._emits, self._reach, self._chunk = pool, emits, reach, chunk
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # oldest first
        self._vacated: list[int] = []
        self._prefilling: Request | None = None

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises
        ------
        ValueError
            If it could not run even alone.
        """
        # For a decode step while another is in flight; or, with all tokens but one, to be admitted
        # again after a retraction.
        most = len(request.prompt) + request.count - 2 + self._emits + self._reach
        room = min(self._pool.num_slots - 1, self._pool.max_context)
        if not request.prompt or request.count < 1 or most > room:
            message = (
                f"Scheduler.add: request `{request.name}` has {len(request.prompt)} prompt tokens "
                f"and wants {request.count}; expected at least one of each, and {most} entries "
                f"within {room}. Shorten it, or make the pool or max_context larger."
            )
            raise ValueError(message)
        self.waiting.append(request)

    @property
    def busy(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self.waiting or self.running or self._prefilling)

    def schedule(self, now: int) -> Batch | None:
        """Return the batch of step ``now``; None where all that is left is to wait."""
        request = self._prefilling or self._admit(now)
        return self._decode() if request is None else self._prefill(request)

    def vacated(self) -> list[int]:
        """Return the rows that were given back since the last call."""
        rows, self._vacated = self._vacated, []
        return rows

    def finish(self, request: Request) -> None:
        """Let go of a request whose answer is complete."""
        if request.row:
            self.running.remove(request)
            self._leave(request)
        else:  # retracted while its last token was on its way
            self.waiting.remove(request)

    def _admit(self, now: int) -> Request | None:
        """Give the first request that waits a row, and slots for its text."""
        ready = (r for r in self.waiting if r.arrival <= now)
        request = next(ready, None)
        # One that was retracted comes back with all its tokens, not before.
        if request is None or request.in_flight or not self._pool.free_rows:
            return None
        # Room for a decode step as well: to be retracted at once would be work for nothing.
        if len(self._pool.free_slots) < len(request.prompt) + len(request.tokens) + self._reach:
            return None
        self.waiting.remove(request)
        request.row = self._pool.free_rows.pop()
        self._prefilling = request
        return request

    def _prefill(self, request: Request) -> Batch:
        text, start = request.prompt + request.tokens, request.entries
        chunk = text[start : start + self._chunk]
        request.entries += len(chunk)
        following = text[request.entries : request.entries + 1]
        slots = self._take(request, len(text))
        batch = Batch([request], chunk, following, start, not following, slots)
        if batch.emits:
            request.in_flight += 1
            self.running.append(request)
            self._prefilling = None
        return batch

    def _decode(self) -> Batch | None:
        batch = Batch([])
        for request in list(self.running):
            if not request.row or len(request.tokens) + request.in_flight >= request.count:
                continue  # retracted just now; or all its tokens are on their way
            # The newest token has no entry yet; each step in flight may add `emits`.
            entries = len(request.prompt) + len(request.tokens) - 1
            need = entries + request.in_flight * self._emits + self._reach
            while request.row and need - len(request.slots) > len(self._pool.free_slots):
                self._retract(self.running[-1])  # may be the request itself
            if request.row:
                batch.new_slots += self._take(request, need)
                request.in_flight += 1
                batch.requests.append(request)
        return batch if batch.requests else None

    def _take(self, request: Request, entries: int) -> list[tuple[int, int, int]]:
        """Take slots up to a number of entries; return row, entry and slot of the new ones."""
        first = len(request.slots)
        request.slots += self._pool.take_slots(max(entries - first, 0))
        return [(request.row, at, request.slots[at]) for at in range(first, len(request.slots))]

    def _retract(self, request: Request) -> None:
        """Take a request's memory; it comes back first, and prefills its tokens with its prompt."""
        self.running.remove(request)
        self._leave(request)
        request.retractions += 1
        self.waiting.appendleft(request)

    def _leave(self, request: Request) -> None:
        self._pool.give_back(request.row, request.slots)
        self._vacated.append(request.row)
        request.row, request.slots, request.entries = 0, [], 0
