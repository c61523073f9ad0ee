"""The debug mode of FutureMap: every row is written once and read once, in turn.

Checked on the device, where the rows are, by a few small operations a call and without the host.
Each kind of check leaves one number, negative if it failed; ``fold`` turns the first failure into
a record that stays until the host takes it. (A device's own assertion would lose its message and
end the device's context with it.)
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

import torch

from hwcore.errors import ConsumeOnceError
from hwcore.kernels import assert_and_invalidate, kernel, torch_ops

if TYPE_CHECKING:
    from torch import Tensor

    from hwcore.backend import Backend
    from hwcore.overlap.relay import RelaySpec, Rows

__all__ = ["ConsumeOnce"]

_NEVER = -2  # upper half of the guard of a row never written, or discarded; of a consumed one: -1
_HALF = 1 << 32
_FAR = 1 << 40  # beyond what an index is noted as: marks one that is no row


class Check(enum.IntEnum):
    """What is checked, in the order in which failures of one iteration are told."""

    INDEX = 0
    READ = 1
    UNIQUE = 2
    WRITE = 3


class ConsumeOnce:
    """Watches the rows of one map. Each call belongs to an iteration, by its number.

    Parameters
    ----------
    backend : Backend
        Whose compile policy and kernels count.
    rows : Rows
        With guards; ``pool_size`` rows and the one that padding is written to.
    spec : RelaySpec

    Attributes
    ----------
    record : Tensor, int64, [NUMBERS], device
        The first failure since it was last taken: number, check, iteration; the number is 0 while
        there is none.
    memory : tuple of Tensor
        All that it holds on the device beside the rows.
    """

    NUMBERS = 3

    def __init__(self, backend: Backend, rows: Rows, spec: RelaySpec) -> None:
        # Here, not above: importing this module must ask no backend for its policy.
        from hwcore.compilation import compile as compiled

        device, pool_size = rows.words.device, spec.pool_size
        self._ops = torch_ops(backend)
        self._pool_size = pool_size
        self._guards = rows.views["guard"]
        self._state = rows.state()
        self._flags = self._state[:, 0]
        self._padding, self._trash = self._state[0], self._state[pool_size]
        self._assert_and_invalidate = kernel(backend, assert_and_invalidate)
        own = assert_and_invalidate.__name__ in backend.kernels()
        # No compiler follows work to the host and back, and a kernel is compiled as it is.
        if not self._ops.on_cpu and not own:
            self._assert_and_invalidate = compiled(
                self._assert_and_invalidate, dynamic=True, fullgraph=True, backend=backend
            )
        self._numbers = torch.arange(max(pool_size + 1, spec.batch_limit), device=device)
        self._last = torch.zeros(pool_size + 1, dtype=torch.int64, device=device)
        self._outcomes = torch.zeros(len(Check), dtype=torch.int64, device=device)
        self._outcome = list(self._outcomes.unbind())
        self._checks = torch.arange(len(Check), device=device)
        self._pending: int | None = None  # iteration of outcomes that are not folded
        self.record = torch.zeros(self.NUMBERS, dtype=torch.int64, device=device)
        self.memory = (self._numbers, self._last, self._outcomes, self._checks, self.record)
        self._guards.copy_(self._numbers[: pool_size + 1])
        self._state.fill_(-1)
        self._flags.fill_(_NEVER)
        self._padding.zero_()

    def valid(self, indices: Tensor, iteration: int) -> Tensor:
        """Return the indices, int64, with row 0 for those out of range, which are noted."""
        self._begin(iteration)
        indices = indices.to(torch.int64)
        bad = (indices < 0) | (indices >= self._pool_size)
        told = indices.clamp(-_HALF, _HALF)  # what is further out is noted as that
        self._note(Check.INDEX, torch.where(bad, told - _FAR, 0))
        return indices.masked_fill(bad, 0)

    def read(self, guards: Tensor, indices: Tensor, iteration: int) -> None:
        """Note rows that were empty when they were read, and empty them."""
        if self._pending != iteration:
            self._begin(iteration)
        if indices.dtype is not torch.int64:
            indices = indices.to(torch.int64)
        # An iteration is one read: no earlier outcome is overwritten.
        self._assert_and_invalidate(guards, self._state, indices, self._outcome[Check.READ])
        self._padding.zero_()

    def write(self, targets: Tensor, iteration: int) -> None:
        """Note rows that are still full, or twice in one stash, before they are written."""
        self._begin(iteration)
        # A full row's guard is its number, an empty one's is negative: inverted, the other way.
        self._note(Check.WRITE, ~self._ops.index_select(self._guards, 0, targets))
        order = self._numbers[: targets.shape[0]]
        self._ops.index_copy_(self._last, 0, targets, order)
        last = self._ops.index_select(self._last, 0, targets)
        twice = (last != order) & (targets < self._pool_size)
        self._note(Check.UNIQUE, torch.where(twice, ~targets, 0))

    def written(self, targets: Tensor) -> None:
        """Mark rows full."""
        self._ops.index_fill_(self._flags, 0, targets, 0)
        self._trash.fill_(-1)  # padding is written again and again

    def discard(self, targets: Tensor) -> None:
        """Empty rows, whatever they hold."""
        self._ops.index_fill_(self._state, 0, targets, -1)
        self._ops.index_fill_(self._flags, 0, targets, _NEVER)

    def fold(self) -> None:
        """Put the first failure that is not yet in the record there; on the current stream.

        Called by whatever a step does but its ``resolve``, which is to be fast.
        """
        if self._pending is None:
            return
        failed = torch.where(self._outcomes < 0, self._checks, len(Check) - 1)
        first = self._ops.amin(failed).view(1)
        number = self._ops.index_select(self._outcomes, 0, first)
        found = torch.cat((number, first, first.new_full((1,), self._pending)))
        self.record.copy_(torch.where(self.record[0] < 0, self.record, found))
        self._outcomes.zero_()
        self._pending = None

    def take(self, record: list[int]) -> None:
        """Raise what a copy of the record says, and forget it.

        Raises
        ------
        ConsumeOnceError
        """
        number, check, iteration = record
        if number < 0:
            self.record.zero_()
            raise _error(number, Check(check), iteration)

    def _begin(self, iteration: int) -> None:
        """Let failures of another iteration go into the record first, with their own number."""
        if self._pending != iteration:
            self.fold()
            self._pending = iteration

    def _note(self, check: Check, values: Tensor) -> None:
        outcome = self._outcome[check]
        torch.minimum(outcome, self._ops.amin(values), out=outcome)


def _error(number: int, check: Check, iteration: int) -> ConsumeOnceError:
    if check is Check.READ:
        row, discarded = number % _HALF, number // _HALF == _NEVER
        kind = "read before it was written" if discarded else "read twice"
        fix = "Resolve each row once after its stash, and discard the rows of retracted requests"
    elif check is Check.INDEX:
        row, kind, fix = number + _FAR, "out of range", "Pass rows of the request pool"
    elif check is Check.UNIQUE:
        row, kind, fix = ~number, "in one stash twice", "Stash each row once"
    else:
        row, kind = ~number, "written twice"
        fix = "Resolve a row, or discard it, before it is written again"
    # The token stands for its row.
    return ConsumeOnceError("next_token", row, iteration, kind, fix)
