"""What a static input looks like in every bucket: its shape, dtype and padding."""

from __future__ import annotations

import collections.abc
import dataclasses
import enum
import math
from typing import TYPE_CHECKING, TypeAlias

import torch

from hwcore.errors import ArgumentTypeError, ArgumentValueError, describe

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = [
    "BATCH",
    "TOKENS",
    "TOKENS_PER_REQUEST",
    "Bucket",
    "Dim",
    "Slot",
    "check_buckets",
    "check_slots",
]

Bucket: TypeAlias = tuple[int, int]
"""Batch size and tokens per request that a graph is captured for."""


class Dim(enum.Enum):
    """A dimension of a slot whose size the bucket decides."""

    BATCH = "batch"
    TOKENS = "tokens"
    TOKENS_PER_REQUEST = "tokens per request"

    def __repr__(self) -> str:
        return self.name


BATCH = Dim.BATCH
"""The requests; padded."""

TOKENS = Dim.TOKENS
"""The tokens of all requests, one request after the other; padded."""

TOKENS_PER_REQUEST = Dim.TOKENS_PER_REQUEST
"""The tokens of one request; never padded, for a bucket takes batches of its own width alone."""


@dataclasses.dataclass(frozen=True)
class Slot:
    """A static input of a graph.

    Attributes
    ----------
    dtype : torch.dtype
    shape : tuple of int and Dim
        One dimension, at any place, is ``BATCH`` or ``TOKENS``; it is the one that is padded. Any
        other may be ``TOKENS_PER_REQUEST``, or a size.
    fill : bool, int, float or complex
        What padding holds: a value that the captured function can take without harm, such as the
        row that no request owns.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        If an attribute is of another type, or not exactly one dimension is padded.
    """

    dtype: torch.dtype
    shape: tuple[int | Dim, ...]
    fill: complex = 0

    def __post_init__(self) -> None:
        if not isinstance(self.dtype, torch.dtype):
            fix = "Pass one, such as torch.int64"
            raise ArgumentTypeError(describe("Slot", "`dtype`", self.dtype, "a torch.dtype", fix))
        fix = "Write it like (TOKENS,) or (3, TOKENS)"
        expected = "a tuple of sizes ≥ 1 and Dim, exactly one of them BATCH or TOKENS"
        if not isinstance(self.shape, tuple):
            raise ArgumentTypeError(describe("Slot", "`shape`", self.shape, expected, fix))
        sound = all(isinstance(d, Dim) or (type(d) is int and d >= 1) for d in self.shape)
        if not sound or sum(d in (BATCH, TOKENS) for d in self.shape) != 1:
            raise ArgumentValueError(describe("Slot", "`shape`", self.shape, expected, fix))
        if not isinstance(self.fill, (bool, int, float, complex)):
            fix = "Pass the value of one element"
            raise ArgumentTypeError(describe("Slot", "`fill`", self.fill, "a number", fix))
        # Here, for a device may say so with the next value that somebody reads.
        if not _fits(self.fill, self.dtype):
            expected = f"a value of {self.dtype}"
            raise ArgumentValueError(
                describe("Slot", "`fill`", self.fill, expected, "Choose another")
            )

    @property
    def axis(self) -> int:
        """The dimension that is padded."""
        return next(axis for axis, d in enumerate(self.shape) if d in (BATCH, TOKENS))

    def shape_for(self, batch_size: int, tokens_per_request: int) -> torch.Size:
        """Return the shape that the slot has for a batch."""
        sizes = {
            BATCH: batch_size,
            TOKENS: batch_size * tokens_per_request,
            TOKENS_PER_REQUEST: tokens_per_request,
        }
        return torch.Size([sizes[d] if isinstance(d, Dim) else d for d in self.shape])

    def size_bytes(self, bucket: Bucket) -> int:
        """Return the bytes that the slot takes in a bucket."""
        return math.prod(self.shape_for(*bucket)) * self.dtype.itemsize


def check_slots(slots: Mapping[str, Slot]) -> dict[str, Slot]:
    """Return slots by name.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        If it is no mapping of identifiers to slots, or empty.
    """
    where, expected = "GraphBuffers", "at least one Slot by its name, an identifier"
    fix = "Pass {'input_ids': Slot(torch.int64, (TOKENS,)), ...}"
    if not isinstance(slots, collections.abc.Mapping):
        raise ArgumentTypeError(describe(where, "`slots`", slots, expected, fix))
    for name, slot in slots.items():
        if not isinstance(slot, Slot) or not isinstance(name, str):
            raise ArgumentTypeError(describe(where, "`slots`", {name: slot}, expected, fix))
    if not slots or not all(map(str.isidentifier, slots)):
        raise ArgumentValueError(describe(where, "`slots`", list(slots), expected, fix))
    return dict(slots)


def check_buckets(buckets: Iterable[Bucket]) -> tuple[Bucket, ...]:
    """Return buckets, largest first: by tokens, then by batch size.

    Raises
    ------
    ArgumentValueError
        If there is none, one is there twice, or is not two positive ints.
    """
    checked = [_check_bucket(bucket) for bucket in buckets]
    if not checked or len(set(checked)) < len(checked):
        expected, fix = "at least one bucket, each once", "Pass each that is to have a graph"
        raise ArgumentValueError(describe("GraphBuffers", "`buckets`", checked, expected, fix))
    return tuple(sorted(checked, key=lambda bucket: (bucket[0] * bucket[1], bucket), reverse=True))


def _check_bucket(bucket: object) -> Bucket:
    if (
        isinstance(bucket, (tuple, list))
        and len(bucket) == 2
        and all(type(size) is int and size >= 1 for size in bucket)
    ):
        return bucket[0], bucket[1]
    expected = "a batch size and a number of tokens per request, both ints ≥ 1"
    fix = "Pass (batch size, tokens per request), such as (8, 1)"
    raise ArgumentValueError(describe("GraphBuffers", "`buckets`", bucket, expected, fix))


def _fits(fill: complex, dtype: torch.dtype) -> bool:
    try:
        stored = torch.full((), fill, dtype=dtype, device="cpu")
    except (RuntimeError, OverflowError):
        return False
    return dtype.is_floating_point or dtype.is_complex or stored.item() == fill
