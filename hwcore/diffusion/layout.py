"""Where each tensor of a message lies: computed once, used to size, write, check and read it.

A layout is a pure function of what the tensors *are*; their values are never looked at. So a peer
is told dtypes and shapes and no offset (``TensorSpec``): it computes the same ones, and there is
none that could point elsewhere.

Large tensors come first, each at a multiple of 64 bytes: a cache line, and what the widest vector
load wants. Small ones follow without a gap: those of whole 16-byte words at multiples of 16, for
kernels (and compilers of kernels) that ask for that much, then the others by falling element size,
each at a multiple of its own. Padding is below 64 bytes a *large* tensor, so a layout of any
tensors has less than 1.6 % of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from hwcore.diffusion.specs import MAX_TENSORS, TensorSpec, check_spec, spec_bytes, spec_of
from hwcore.errors import ArgumentValueError, describe

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import torch

__all__ = [
    "LARGE_ALIGNMENT",
    "LARGE_BYTES",
    "Layout",
    "TensorEntry",
    "by_place",
    "check_layout",
    "check_total",
    "layout_by",
    "layout_of",
    "numbered",
    "places_of",
]

LARGE_BYTES = 4096
"""From this size on a tensor has a place, and on the wire a frame, of its own."""

LARGE_ALIGNMENT = 64
SMALL_ALIGNMENT = 16


class TensorEntry(TensorSpec, frozen=True, kw_only=True):
    """A tensor, and where it lies.

    Attributes
    ----------
    offset : int
        Of its first byte; 0 for a tensor without elements.
    size_bytes : int
    """

    offset: int
    size_bytes: int


class Layout(msgspec.Struct, frozen=True):
    """Places of tensors in one range of bytes.

    Attributes
    ----------
    size_bytes : int
        Of the whole range.
    entries : tuple of TensorEntry
        In the order of the tensors. Two with the same place are the same tensor.
    """

    size_bytes: int
    entries: tuple[TensorEntry, ...]

    def places(self) -> list[TensorEntry]:
        """Return each place once, by rising offset: large ones first, empty ones left out."""
        distinct = {entry.offset: entry for entry in self.entries if entry.size_bytes}
        return [distinct[offset] for offset in sorted(distinct)]

    def gaps(self) -> list[tuple[int, int]]:
        """Return start and end of the bytes that no tensor has."""
        found, end = [], 0
        for entry in self.places():
            if entry.offset > end:
                found.append((end, entry.offset))
            end = entry.offset + entry.size_bytes
        return found

    def parts(self) -> list[tuple[int, int]]:
        """Return start and end of what is moved in one piece, without the padding between.

        First the small tensors, which lie together at the end, if there are any; then each large
        one.
        """
        spans = [(e.offset, e.offset + e.size_bytes) for e in self.places()]
        large = [(start, end) for start, end in spans if end - start >= LARGE_BYTES]
        small = spans[len(large) :]
        return [(small[0][0], small[-1][1]), *large] if small else large


def layout_of(tensors: Sequence[torch.Tensor], where: str = "layout_of") -> Layout:
    """Return the places of tensors, on whatever devices they are.

    A tensor that is dense keeps its strides. Any other, such as a slice or an expanded one, will
    be row-major. The same elements given several times (the same tensor, or equal views of it)
    have one place; views that merely overlap have one each.

    Parameters
    ----------
    tensors : sequence of Tensor, any shape, any dtype in ``DTYPES``
    where : str
        Who speaks in errors.

    Raises
    ------
    ArgumentTypeError
        If one is no plain strided tensor with elements of its own, or of another dtype.
    ArgumentValueError
        If there are more than ``MAX_TENSORS``.

    Notes
    -----
    Mutates: none. Host sync: no.
    """
    specs, which, _ = places_of(tensors, where)
    return layout_by(specs, which)


class Places(NamedTuple):
    """All that the layout of tensors depends on, and more that is seen on the way.

    Attributes
    ----------
    specs, which : tuple
        As for :func:`layout_by`.
    are_plain : bool
        Whether all are in the host's memory, and lie there as they will in the layout.
    """

    specs: tuple[TensorSpec, ...]
    which: tuple[int, ...]
    are_plain: bool


def places_of(tensors: Sequence[torch.Tensor], where: str) -> Places:
    """Return the places of tensors; as :func:`layout_of`."""
    if len(tensors) > MAX_TENSORS:
        expected, fix = f"at most {MAX_TENSORS} tensors", "Stack them, or send several messages"
        raise _bad(where, "tree", f"{len(tensors)} tensors", expected, fix)
    specs: list[TensorSpec] = []
    numbers: dict[Any, int] = {}
    which, are_plain = [], True
    for index, tensor in enumerate(tensors):
        spec = spec_of(where, index, tensor)
        is_conj, is_neg, is_cpu = tensor.is_conj(), tensor.is_neg(), tensor.is_cpu
        device = None if is_cpu else tensor.device
        same = tensor.data_ptr(), device, tensor.stride(), is_conj, is_neg, spec
        number = numbers.setdefault(same, len(specs))
        if number == len(specs):
            specs.append(spec)
            are_plain = are_plain and (
                is_cpu
                and tensor.is_contiguous()
                and not (is_conj or is_neg or tensor._is_zerotensor())
            )
        which.append(number)
    return Places(tuple(specs), tuple(which), are_plain)


def layout_by(specs: Sequence[TensorSpec], which: Iterable[int]) -> Layout:
    """Return the layout of tensors, each given by the number of its spec.

    Parameters
    ----------
    specs : sequence of TensorSpec
        One for each place.
    which : iterable of int
        In [0, len(specs)).
    """
    sizes = [spec_bytes(spec) for spec in specs]
    alignments = [_alignment(*size) for size in sizes]
    offsets, end = [0] * len(specs), 0
    for index in sorted(range(len(specs)), key=alignments.__getitem__, reverse=True):
        size_bytes, alignment = sizes[index][0], alignments[index]
        if size_bytes:
            offsets[index] = offset = -(-end // alignment) * alignment
            end = offset + size_bytes
    places = [
        TensorEntry(spec.dtype, spec.shape, spec.strides, offset=offset, size_bytes=size_bytes)
        for spec, offset, (size_bytes, _) in zip(specs, offsets, sizes, strict=True)
    ]
    return Layout(end, tuple([places[number] for number in which]))


def numbered(entries: Iterable[TensorEntry]) -> tuple[list[int], dict[TensorEntry, int]]:
    """Return the number of each entry's place, and the places, numbered as they first occur."""
    numbers: dict[TensorEntry, int] = {}
    return [numbers.setdefault(entry, len(numbers)) for entry in entries], numbers


def by_place(layout: Layout, tensors: Sequence[torch.Tensor]) -> dict[int, torch.Tensor]:
    """Return tensors by their offsets, without those that are empty."""
    entries = layout.entries
    return {e.offset: t for e, t in zip(entries, tensors, strict=True) if e.size_bytes}


def check_layout(layout: Layout, limit_bytes: int, where: str = "check_layout") -> None:
    """Raise unless a layout, whoever made it, is one that ``layout_of`` returns.

    Parameters
    ----------
    layout : Layout
    limit_bytes : int
        The bytes that there are.

    Raises
    ------
    ArgumentValueError
        If any number, dtype or offset is not as it should be, or the whole is too large.
    """
    if len(layout.entries) > MAX_TENSORS:
        expected = f"at most {MAX_TENSORS} tensors"
        raise _bad(where, "entries", len(layout.entries), expected, "Send fewer, or stack them")
    which, numbers = numbered(layout.entries)
    kinds = {(entry.dtype, entry.shape, entry.strides): n for entry, n in numbers.items()}
    for spec, index in kinds.items():
        check_spec(where, index, TensorSpec(*spec), limit_bytes)
    right = layout_by(list(numbers), which)
    fix = "Pass a layout as layout_of() made it"
    for index, (entry, other) in enumerate(zip(layout.entries, right.entries, strict=True)):
        if entry.offset != other.offset:
            expected = f"{other.offset}, where it belongs"
            raise _bad(where, f"entries[{index}].offset", entry.offset, expected, fix)
        if entry.size_bytes != other.size_bytes:
            expected = f"{other.size_bytes}, by its shape"
            raise _bad(where, f"entries[{index}].size_bytes", entry.size_bytes, expected, fix)
    if layout.size_bytes != right.size_bytes:
        expected = f"{right.size_bytes}, by its entries"
        raise _bad(where, "size_bytes", layout.size_bytes, expected, fix)
    check_total(where, layout, limit_bytes)


def check_total(where: str, layout: Layout, limit_bytes: int) -> None:
    """Raise if a layout takes more bytes than there are."""
    if layout.size_bytes > limit_bytes:
        expected = f"at most {limit_bytes} bytes, which there are"
        fix = "Allocate what the manifest's size_bytes says, and send all of it first"
        raise _bad(where, "size_bytes", layout.size_bytes, expected, fix)


def _alignment(size_bytes: int, item: int) -> int:
    if size_bytes >= LARGE_BYTES:
        return LARGE_ALIGNMENT
    return item if size_bytes % SMALL_ALIGNMENT else SMALL_ALIGNMENT


def _bad(where: str, what: str, got: object, expected: str, fix: str) -> ArgumentValueError:
    return ArgumentValueError(describe(where, f"`{what}`", got, expected, fix))
