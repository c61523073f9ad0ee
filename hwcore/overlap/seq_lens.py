"""The lengths of a map's rows, and their way to the host."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hwcore.fence import StreamFence
from hwcore.kernels import torch_ops

if TYPE_CHECKING:
    from torch import Tensor

    from hwcore.backend import Backend

__all__ = ["SeqLens"]


class SeqLens:
    """Lengths by row; the caller has made the current stream wait for what it passes.

    Parameters
    ----------
    backend : Backend
    rows : int
    limit : int
        Longest batch.
    note_size : int
        Numbers that go to the host together with lengths.
    device : torch.device

    Attributes
    ----------
    fence : StreamFence
        For the lengths and the note.
    lens : Tensor, int64, [rows], device
    note : Tensor, int64, [note_size], device
    """

    def __init__(
        self, backend: Backend, rows: int, limit: int, note_size: int, device: torch.device
    ) -> None:
        self.lens = torch.zeros(rows, dtype=torch.int64, device=device)
        # The note, and behind it lengths of a batch: one copy.
        self._outgoing = torch.zeros(note_size + limit, dtype=torch.int64, device=device)
        self.note = self._outgoing[:note_size]
        self._note_size = note_size
        self._staging = backend.pin_memory(torch.zeros_like(self._outgoing, device="cpu"))
        self._backend = backend
        self._ops = torch_ops(backend)
        self._stream = backend.create_stream(device)
        self._copied = backend.create_event(device)
        self.fence = StreamFence(backend, device, (self.lens, self._outgoing))
        self.nbytes = self.lens.nbytes + self._outgoing.nbytes

    def write(self, targets: Tensor, lens: Tensor) -> None:
        """Write lengths, on the current stream; the caller has ordered it."""
        self._ops.index_copy_(self.lens, 0, targets, lens)

    def read(self, indices: Tensor) -> Tensor:
        """Return lengths in new memory, on the current stream."""
        stream = self._backend.current_stream(self.lens.device)
        self.fence.begin_read(stream)
        try:
            lens: Tensor = self._ops.index_select(self.lens, 0, indices)
            return lens
        finally:
            self.fence.end_read(stream)

    def to_host(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Wait for the last write; return lengths and note, in the host's memory.

        The copy runs on a stream of its own, for the current one may have more to do before it
        would come to it. The lengths are a copy, the note is not.
        """
        backend, copy, size = self._backend, self._stream, self._note_size + indices.numel()
        backend.wait_stream(copy, backend.current_stream(copy.device))  # the indices are its work
        with backend.stream_context(copy):
            self.fence.begin_read(copy)
            outgoing, staging = self._outgoing[:size], self._staging[:size]
            self._ops.index_select(self.lens, 0, indices, out=outgoing[self._note_size :])
            staging.copy_(outgoing, non_blocking=True)
            self.fence.end_read(copy)
            backend.record_event(self._copied, copy)
        backend.synchronize_event(self._copied)
        return staging[self._note_size :].clone(), staging[: self._note_size]
