"""Tensors written where a layout puts them: the whole of it at once, or part by part.

A part is a run of bytes of the layout, so that parts can be written, summed and sent one after the
other, each in memory of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from hwcore.diffusion.host import copy_to_host, tell_sanitizer
from hwcore.diffusion.layout import LARGE_BYTES, by_place
from hwcore.diffusion.views import is_plain, plain

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from hwcore.diffusion.checksum import Digest
    from hwcore.diffusion.layout import Layout, TensorEntry

__all__ = ["Part", "parts_of", "write_part", "write_part_summed"]


class Part(NamedTuple):
    """A run of bytes of a layout, and the tensors in it.

    Attributes
    ----------
    start, end : int
        Of the run, in bytes from the beginning of the layout. What follows the last tensor up to
        ``end`` is padding.
    items : list of (int, Tensor)
        By rising offset, in bytes from ``start``. The tensor's elements go there row-major.
    """

    start: int
    end: int
    items: list[tuple[int, torch.Tensor]]

    @property
    def size_bytes(self) -> int:
        """Bytes of the run."""
        return self.end - self.start

    @property
    def is_of_host(self) -> bool:
        """Whether all its tensors are in the host's memory."""
        return all(tensor.is_cpu for _, tensor in self.items)


def parts_of(
    layout: Layout, tensors: Sequence[torch.Tensor], limit_bytes: int | None = None
) -> list[Part]:
    """Return parts that cover a layout, without a gap; none where it is empty.

    Parameters
    ----------
    layout : Layout
    tensors : sequence of Tensor
        Of its entries. What is not row-major is seen as such or, where it is lazily conjugated
        besides, copied on the current stream.
    limit_bytes : int, optional
        About how large a part may be, at least 64; padding of below 64 bytes may come to it. A
        tensor that is larger is split. None: one part.
    """
    sources = by_place(layout, tensors)
    limit = layout.size_bytes if limit_bytes is None else limit_bytes
    parts: list[Part] = []
    items: list[tuple[int, torch.Tensor]] = []
    start = 0
    for entry in layout.places():
        ordered = _in_layout_order(sources[entry.offset], entry)
        for offset, piece in _pieces(ordered, entry.offset, limit):
            if items and offset + piece.nbytes - start > limit:
                parts.append(Part(start, offset, items))
                items, start = [], offset
            items.append((offset - start, piece))
    if items:
        parts.append(Part(start, layout.size_bytes, items))
    return parts


def write_part(base: torch.Tensor, part: Part) -> None:
    """Write a part's tensors, and zeros between them, on the current stream.

    Small tensors of the host are gathered there first: into the memory itself where it is the
    host's, else into one block that is copied at once.

    Parameters
    ----------
    base : Tensor, uint8, [part.size_bytes]
    """
    _clear_gaps(base, part)
    small = [(offset, tensor) for offset, tensor in part.items if _is_small(tensor)]
    if small and base.is_cpu:
        copy_to_host(base, small)
    elif small:
        _copy_gathered(base, small)
    for offset, tensor in part.items:
        if not _is_small(tensor):
            _copy(base, offset, tensor)


def write_part_summed(base: torch.Tensor, part: Part, digest: Digest) -> None:
    """Write a part of the host to memory of the host, and add its bytes to a digest.

    Each stretch of a large tensor is summed and copied while a core's cache has it.
    """
    _clear_gaps(base, part)
    small: list[tuple[int, torch.Tensor]] = []
    summed = 0
    for offset, tensor in part.items:
        if _is_small(tensor):
            small.append((offset, tensor))
        elif is_plain(tensor):
            copy_to_host(base, small)
            small = []
            digest.add(base[summed:offset])
            summed = offset + tensor.nbytes
            target = base[offset:summed]
            digest.copy(target, tensor.reshape(-1).view(torch.uint8))
            tell_sanitizer("write_part_summed", [tensor], [target])
        else:
            _copy(base, offset, tensor)
    copy_to_host(base, small)
    digest.add(base[summed:])


def _in_layout_order(tensor: torch.Tensor, entry: TensorEntry) -> torch.Tensor:
    """Return a tensor whose elements, row-major, are those of its place; flat where it can be."""
    tensor = tensor.detach()
    if entry.strides is not None:  # dense in an order of its own, which the layout keeps
        return plain(tensor).as_strided((tensor.numel(),), (1,))
    return tensor.view(-1) if tensor.is_contiguous() else tensor


def _pieces(
    tensor: torch.Tensor, offset: int, limit_bytes: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """Split a tensor into pieces of ``limit_bytes`` at most, each a run of its row-major bytes."""
    if tensor.nbytes <= limit_bytes:
        yield offset, tensor
        return
    row_bytes = tensor.nbytes // tensor.shape[0]
    count = limit_bytes // row_bytes
    for row in range(0, tensor.shape[0], max(1, count)):
        place = offset + row * row_bytes
        if count:
            yield place, tensor[row : row + count]
        else:
            yield from _pieces(tensor[row], place, limit_bytes)


def _clear_gaps(base: torch.Tensor, part: Part) -> None:
    """Zero what is between tensors: whoever had this memory before left bytes there."""
    end = 0
    for offset, tensor in part.items:
        if offset > end:
            base[end:offset].zero_()
        end = offset + tensor.nbytes
    if part.size_bytes > end:
        base[end : part.size_bytes].zero_()


def _is_small(tensor: torch.Tensor) -> bool:
    return tensor.nbytes < LARGE_BYTES and tensor.is_cpu and is_plain(tensor)


def _copy(base: torch.Tensor, offset: int, tensor: torch.Tensor) -> None:
    target = base[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    target.copy_(plain(tensor), non_blocking=True)


def _copy_gathered(base: torch.Tensor, gathered: list[tuple[int, torch.Tensor]]) -> None:
    """Copy small tensors of the host to a device; before others that lie among them."""
    start = gathered[0][0]
    end = gathered[-1][0] + gathered[-1][1].nbytes
    # Not page-locked: torch has read such memory when the call returns, so it may go then.
    block = torch.zeros(end - start, dtype=torch.uint8)
    copy_to_host(block, [(offset - start, tensor) for offset, tensor in gathered])
    base[start:end].copy_(block, non_blocking=True)
