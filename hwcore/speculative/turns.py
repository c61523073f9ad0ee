"""Whose turn it is: one batch at a time, and nothing lost of those that fail."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, NoReturn

from hwcore.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    ClosedError,
    HwcoreError,
    describe,
)
from hwcore.speculative.batch import VerifyBatch
from hwcore.speculative.planning import PreparedBatch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from hwcore.overlap import FutureMap

__all__ = ["Turns", "are_in"]


class Turns:
    """Of one worker's batches.

    Attributes
    ----------
    marked : VerifyBatch or None
        The batch that was marked and not prepared yet.
    pending : PreparedBatch or None
        The batch that was prepared and not verified yet.
    vacated : list of int
        Rows that were given back since the last mark; the list of the batch that was marked then.
    closed : bool
    """

    def __init__(self, where: str, relay: FutureMap) -> None:
        self._where, self._relay = where, relay
        self.marked: VerifyBatch | None = None
        self.pending: PreparedBatch | None = None
        self.vacated: list[int] = []
        self.closed = False

    def check_open(self, method: str) -> None:
        """Raise if the worker is closed."""
        if self.closed:
            fix = "Make a new one"
            self._misuse(method, "a closed worker", "an open one", fix, ClosedError)

    def check_free(self, method: str) -> None:
        """Raise if a batch is under way already."""
        self.check_open(method)
        if self.pending is not None:
            got, fix = "a batch while another is prepared", "Call verify() or abandon() first"
            self._misuse(method, got, "one at a time", fix)

    def check_marked(self, method: str, batch: object) -> None:
        """Raise if another batch than this was marked."""
        if self.marked is not None and self.marked is not batch:
            got, fix = "another batch than mark()", "Pass the one that was marked"
            self._misuse(method, got, "the same", fix)

    def take(self, method: str, prepared: object) -> PreparedBatch:
        """Return the batch that was prepared last, whose turn is over then; raise if it is not."""
        self.check_open(method)
        where = f"{self._where}.{method}"
        expected = "the batch of the last prepare(), not verified yet"
        if not isinstance(prepared, PreparedBatch):
            fix = "Pass what prepare() returned"
            raise ArgumentTypeError(describe(where, "prepared", prepared, expected, fix))
        if prepared is not self.pending:
            fix = "Prepare the batch again"
            raise ArgumentValueError(describe(where, "prepared", prepared, expected, fix))
        self.pending = None
        return prepared

    @contextlib.contextmanager
    def putting_back(self, batch: object, vacated: Sequence[int] = ()) -> Iterator[None]:
        """Put back what was resolved for a batch, if what follows fails."""
        try:
            yield
        except Exception as error:
            self.marked = None
            try:
                self.put_back(batch, vacated)
            except HwcoreError as second:
                error.add_note(f"What was resolved for the batch could not be put back: {second}")
            raise

    def put_back(self, batch: object, vacated: Sequence[int]) -> None:
        """Stash what was resolved for a batch, for rows that are still its own."""
        if isinstance(batch, VerifyBatch) and batch.relayed is not None:
            gone = are_in(batch.rows, vacated)
            self._relay.stash(
                batch.rows if gone is None else batch.rows.masked_fill(gone, 0), batch.relayed
            )

    def _misuse(
        self,
        method: str,
        got: str,
        expected: str,
        fix: str,
        kind: type[HwcoreError] = ArgumentValueError,
    ) -> NoReturn:
        message = f"{self._where}.{method}: the call got {got}; expected {expected}. {fix}."
        raise kind(message)


def are_in(rows: Tensor, vacated: Sequence[int]) -> Tensor | None:
    """Return which rows are among the vacated, ``[bs]``; None if there are none of those."""
    gone: Tensor | None = None
    for row in vacated:  # few; as numbers they need no copy from the host
        gone = rows.eq(row) if gone is None else gone | rows.eq(row)
    return gone
