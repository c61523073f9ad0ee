"""What one step hands to the next for each request, and how it lies in memory.

The values of a request are one row: so that reading a batch is one gather, however many values
there are. A row holds, in this order and each at a multiple of 16 bytes, what the spec asks for;
under debugging also a guard word before the token::

    hidden_states | guard  next_token | topk_index | topk_p | draft_probs

The guard's lower half is the row's own number, its upper half is 0 for a full row and negative for
an empty one: as int64 it tells both at once. Upper half and token lie side by side, and are emptied
together.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import torch

from hwcore._checks import check_size
from hwcore.errors import ArgumentTypeError, ArgumentValueError, describe

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Field",
    "RelayPayload",
    "RelaySpec",
    "Rows",
    "as_bits",
    "fields_of",
    "view_of",
]

_WORD = 8  # bytes: rows are copied as int64
_ALIGNMENT = 16  # bytes: what vectorised loads want
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclasses.dataclass(frozen=True)
class RelaySpec:
    """Which values a step hands to the next, and how large they are.

    Attributes
    ----------
    pool_size : int
        Rows of the request pool, row 0 included, which is the padding of graph-padded batches.
    max_batch_size : int or None
        Longest batch; None: ``pool_size``.
    topk : int
        Draft candidates of a request (``topk_p``, ``topk_index``); 0: none.
    hidden_size : int
        Elements of ``hidden_states``; 0: none.
    hidden_dtype : torch.dtype
    draft_probs : (int, int) or None
        Draft steps and vocabulary size of ``draft_probs``; None: none.
    probs_dtype : torch.dtype
        Of ``topk_p`` and ``draft_probs``.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        If a size is no int or out of range, or a dtype is none that can be copied.
    """

    pool_size: int
    max_batch_size: int | None = None
    topk: int = 0
    hidden_size: int = 0
    hidden_dtype: torch.dtype = torch.bfloat16
    draft_probs: tuple[int, int] | None = None
    probs_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        where = "RelaySpec"
        check_size(where, "pool_size", self.pool_size, 2, "Count the padding row and one more")
        if self.max_batch_size is not None:
            fix = "Pass the longest batch, padding included"
            check_size(where, "max_batch_size", self.max_batch_size, 1, fix)
        check_size(where, "topk", self.topk, 0, "Pass 0 for a map without draft candidates")
        check_size(where, "hidden_size", self.hidden_size, 0, "Pass 0 for a map without them")
        if self.draft_probs is not None:
            if not isinstance(self.draft_probs, tuple) or len(self.draft_probs) != 2:
                expected, fix = "(draft steps, vocabulary size) or None", "Pass a pair of ints"
                what = "draft_probs"
                raise ArgumentTypeError(describe(where, what, self.draft_probs, expected, fix))
            for name, size in zip(("steps", "vocabulary"), self.draft_probs, strict=True):
                check_size(where, f"draft_probs {name}", size, 1, "Pass None for a map without")
        hidden = self.hidden_dtype
        if not isinstance(hidden, torch.dtype) or hidden.is_complex or hidden.itemsize > _WORD:
            expected, fix = "a real torch dtype", "Pass the dtype of the model's hidden states"
            raise ArgumentTypeError(describe(where, "hidden_dtype", hidden, expected, fix))
        if self.probs_dtype not in _FLOATS:
            expected = " or ".join(map(str, _FLOATS))
            fix = "Pass the dtype of the probabilities"
            raise ArgumentValueError(
                describe(where, "probs_dtype", self.probs_dtype, expected, fix)
            )

    @property
    def batch_limit(self) -> int:
        """Longest batch that the map takes."""
        return self.pool_size if self.max_batch_size is None else self.max_batch_size


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class RelayPayload:
    """What a step hands to the next for a batch; what a map does not hold is None.

    Attributes
    ----------
    next_token : Tensor, int64, [bs]
        The last token of each request, at least 0: with speculation the bonus token, root of the
        next draft tree.
    topk_p : Tensor, [bs, topk]
        Probabilities of the draft's first candidates.
    topk_index : Tensor, int64, [bs, topk]
        Their tokens.
    hidden_states : Tensor, [bs, hidden_size]
        Of the last accepted position, which the draft goes on from.
    draft_probs : Tensor, [bs, steps, vocabulary]
        The draft's distributions, which chain rejection sampling compares with.
    """

    next_token: Tensor
    topk_p: Tensor | None = None
    topk_index: Tensor | None = None
    hidden_states: Tensor | None = None
    draft_probs: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Field:
    """One value of a row: its dtype, its shape for one request, and its place in bytes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int = 0

    @property
    def size_bytes(self) -> int:
        """Bytes in a row."""
        return self.dtype.itemsize * math.prod(self.shape)


def fields_of(spec: RelaySpec, guarded: bool) -> tuple[list[Field], int]:
    """Return the fields of a row in memory order, and the row's length in words."""
    fields = []
    if spec.hidden_size:
        fields.append(Field("hidden_states", spec.hidden_dtype, (spec.hidden_size,)))
    if guarded:
        fields.append(Field("guard", torch.int64, ()))
    fields.append(Field("next_token", torch.int64, ()))
    if spec.topk:
        fields.append(Field("topk_index", torch.int64, (spec.topk,)))
        fields.append(Field("topk_p", spec.probs_dtype, (spec.topk,)))
    if spec.draft_probs is not None:
        fields.append(Field("draft_probs", spec.probs_dtype, spec.draft_probs))
    placed, end = [], 0
    for field in fields:
        # The token follows its guard at once.
        step = _WORD if guarded and field.name == "next_token" else _ALIGNMENT
        start = -(-end // step) * step
        placed.append(dataclasses.replace(field, offset=start))
        end = start + field.size_bytes
    return placed, -(-end // _ALIGNMENT) * _ALIGNMENT // _WORD


class Rows:
    """Rows in one piece of memory, and views of their fields.

    Attributes
    ----------
    words : Tensor, int64, [count, words]
        The memory.
    views : dict of str to Tensor
        ``[count, *shape]`` of each field; rows lie a row's length apart.
    bits : dict of str to Tensor
        The same, of an integer dtype of the same width: every device copies those.
    """

    def __init__(self, words: Tensor, fields: list[Field]) -> None:
        self.words = words
        self.views = {field.name: view_of(words, field) for field in fields}
        self.bits = {name: as_bits(view) for name, view in self.views.items()}

    def state(self) -> Tensor:
        """Return what empties a row when it is filled with -1, int32 ``[count, 3]``."""
        guard = self.views["guard"]
        start = int(guard.storage_offset() - self.words.storage_offset()) * _WORD
        return view_of(self.words, Field("guard and token", torch.int32, (4,), start))[:, 1:]


def as_bits(tensor: Tensor) -> Tensor:
    """Return a view of an integer dtype of the same width."""
    return tensor.view(_BITS[tensor.dtype.itemsize])


def view_of(words: Tensor, field: Field) -> Tensor:
    """Return a field of rows, ``[count, *shape]``."""
    start = field.offset // field.dtype.itemsize
    flat = words.view(field.dtype)[:, start : start + math.prod(field.shape)]
    return flat.view(flat.shape[0], *field.shape) if field.shape else flat[:, 0]
