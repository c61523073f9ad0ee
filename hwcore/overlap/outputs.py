"""The memory that ``resolve`` returns: two pieces in turn, and never one that is still held."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

import torch

from hwcore.overlap.relay import RelayPayload, view_of

if TYPE_CHECKING:
    from torch import Tensor

    from hwcore.backend import Backend
    from hwcore.overlap.relay import Field
    from hwcore.types import Stream

__all__ = ["Batch", "Outputs"]

_log = logging.getLogger("hwcore")
_MANY_SIZES = 512  # batch sizes whose views are kept, some kilobytes each
_use_count = torch._C._storage_Use_Count  # torch's own graph trees decide by it what is alive


class Outputs:
    """Two pieces of memory that are filled in turn.

    Parameters
    ----------
    backend : Backend
    like : Tensor, int64
        Rows of the same length, on the device.
    limit : int
        Rows of a piece.
    fields : list of Field
    """

    def __init__(self, backend: Backend, like: Tensor, limit: int, fields: list[Field]) -> None:
        self._backend = backend
        self._shape = limit, like.shape[1]
        self._device = like.device
        self._fields = fields
        stream = backend.current_stream(self._device)
        self._pieces = [self._piece(stream), self._piece(stream)]
        self._told_of_held = False
        self.nbytes = sum(piece.words.nbytes for piece in self._pieces)

    def next(self, count: int, stream: Stream) -> Batch:
        """Return ``count`` rows of the older piece to fill on a stream, or of a new one."""
        older, newer = self._pieces
        if older.is_held():
            self._tell_of_held()
            older = self._piece(stream)
        elif older.stream is not stream and older.stream != stream:
            # Whoever read it there has let go of it, and may not have run yet.
            self._backend.wait_stream(stream, older.stream)
            self._backend.record_stream(older.words, stream)
            older.stream = stream
        self._pieces = [newer, older]
        return older.batch(count)

    def _piece(self, stream: Stream) -> _Piece:
        """Return a new piece; its memory goes back to ``stream``, which is the current one."""
        # Outside of inference mode, whose tensors take no writes after it.
        with torch.inference_mode(False):
            words = torch.empty(self._shape, dtype=torch.int64, device=self._device)
        return _Piece(words, self._fields, stream)

    def _tell_of_held(self) -> None:
        if not self._told_of_held:
            self._told_of_held = True
            _log.warning(
                "FutureMap: a payload is still held when the second resolve() after it would "
                "overwrite it; new memory is taken. Drop payloads after their step, or copy."
            )


class Batch:
    """The first rows of an output, as ``resolve`` fills them and hands them out.

    Attributes
    ----------
    words : Tensor, int64, [bs, words]
    guards : Tensor or None
        Under debugging, int64, [bs].
    payload : RelayPayload
    """

    def __init__(self, words: Tensor, fields: list[Field]) -> None:
        self.words = words
        views = {field.name: view_of(words, field) for field in fields}
        self.guards = views.pop("guard", None)
        self.payload = RelayPayload(**views)
        self._shown = (self.payload, *views.values())

    def uses(self) -> int:
        """Return how many references there are to what is handed out, these included."""
        return sum(map(sys.getrefcount, self._shown))


class _Piece:
    """One of the pieces of memory that ``resolve`` writes to in turn.

    Its batches are kept: making views costs more than the gather. So whether a caller still has
    one is a matter of reference counts: those of the objects handed out, and that of the storage,
    which further views of them share.

    Attributes
    ----------
    words : Tensor, int64, [limit, words]
    stream : Stream
        Which filled it last, and read it since.
    """

    def __init__(self, words: Tensor, fields: list[Field], stream: Stream) -> None:
        self.words = words
        self.stream = stream
        self._fields = fields
        self._storage = words.untyped_storage()._cdata
        self._batches: dict[int, Batch] = {}
        self._handed_out: Batch | None = None
        self._uses = self._storage_uses = 0  # while nobody else has one

    def is_held(self) -> bool:
        """Say whether somebody still holds what was handed out last, or a view of it."""
        batch = self._handed_out
        return batch is not None and (
            batch.uses() > self._uses or _use_count(self._storage) > self._storage_uses
        )

    def batch(self, count: int) -> Batch:
        """Return the first rows, to be handed out. Nobody may hold any."""
        batch = self._batches.get(count)
        if batch is None:
            if len(self._batches) >= _MANY_SIZES:
                self._batches.clear()
                self._handed_out = None  # or its views would be counted as uses that stay
            with torch.inference_mode(False), torch.no_grad():
                batch = self._batches[count] = Batch(self.words[:count], self._fields)
            self._storage_uses = _use_count(self._storage)
        if batch is not self._handed_out:
            self._handed_out, self._uses = batch, batch.uses()
        return batch
