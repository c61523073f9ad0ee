"""Bytes seen as the tensors of a layout, and tensors asked how their bytes lie."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hwcore.diffusion.layout import LARGE_BYTES
from hwcore.diffusion.specs import DTYPES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hwcore.diffusion.layout import Layout, TensorEntry

__all__ = ["is_plain", "is_stored_as", "plain", "view_of", "views", "views_of_parts"]


def views(
    layout: Layout, memory: Callable[[TensorEntry], tuple[torch.Tensor, int]], device: torch.device
) -> list[torch.Tensor]:
    """Return the tensors of a checked layout, each a view.

    Parameters
    ----------
    layout : Layout
    memory : callable
        Called once for each place that is not empty; returns a tensor, uint8, [any], and the
        offset in it, in bytes. Memory and offset are aligned to the element size.
    device : torch.device
        Of that memory; for tensors that have no elements.

    Returns
    -------
    list of Tensor
        Entries of the same place are the same object.
    """
    made: dict[int, torch.Tensor] = {}
    typed: dict[tuple[int, str], tuple[torch.Tensor, int, int]] = {}
    tensors = []
    for entry in layout.entries:
        tensor = made.get(entry.offset) if entry.size_bytes else _empty(entry, device)
        if tensor is None:
            base, offset = memory(entry)
            key = id(base), entry.dtype
            if key not in typed:
                elements = _as(entry.dtype, base)
                typed[key] = elements, elements.itemsize, int(elements.storage_offset())
            elements, item, first = typed[key]
            tensor = elements.as_strided(entry.shape, _strides(entry), first + offset // item)
            made[entry.offset] = tensor
        tensors.append(tensor)
    return tensors


def _empty(entry: TensorEntry, device: torch.device) -> torch.Tensor:
    nothing = torch.empty(0, dtype=torch.uint8, device=device)
    return nothing.view(DTYPES[entry.dtype]).reshape(entry.shape)


def views_of_parts(
    layout: Layout, buffers: Sequence[torch.Tensor], device: torch.device
) -> list[torch.Tensor]:
    """Return the tensors of a checked layout whose parts lie in buffers, one each.

    Parameters
    ----------
    buffers : sequence of Tensor, uint8, [bytes of the part]
        In the order of ``Layout.parts``.
    """
    parts = layout.parts()
    buffer_at = {start: buffer for (start, _), buffer in zip(parts, buffers, strict=True)}

    def locate(entry: TensorEntry) -> tuple[torch.Tensor, int]:
        start = entry.offset if entry.size_bytes >= LARGE_BYTES else parts[0][0]
        return buffer_at[start], entry.offset - start

    return views(layout, locate, device)


def view_of(base: torch.Tensor, offset: int, entry: TensorEntry) -> torch.Tensor:
    """Return one tensor as a view of memory, uint8, [any], at an offset in bytes."""
    elements = _as(entry.dtype, base[offset : offset + entry.size_bytes])
    return elements.as_strided(entry.shape, _strides(entry), elements.storage_offset())


def is_stored_as(tensor: torch.Tensor, entry: TensorEntry) -> bool:
    """Say whether a tensor's memory holds the bytes of its entry, from its first to its last."""
    if entry.strides is None:
        return is_plain(tensor)
    return not _is_lazy(tensor) and tensor.stride() == entry.strides


def is_plain(tensor: torch.Tensor) -> bool:
    """Say whether a tensor's memory holds its elements, row-major, as they are."""
    return tensor.is_contiguous() and not _is_lazy(tensor)


def _is_lazy(tensor: torch.Tensor) -> bool:
    return tensor.is_conj() or tensor.is_neg() or tensor._is_zerotensor()


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor without its gradient, and with a lazy conjugate or negative carried out.

    On its own device: torch would do it after a copy that may not have run.
    """
    return tensor.detach().resolve_conj().resolve_neg()


def _as(dtype: str, memory: torch.Tensor) -> torch.Tensor:
    if dtype == "uint8":
        return memory
    item, count = DTYPES[dtype].itemsize, memory.numel()
    whole = memory[: count // item * item] if count % item else memory
    return whole.view(DTYPES[dtype])


def _strides(entry: TensorEntry) -> tuple[int, ...]:
    if entry.strides is not None:
        return entry.strides
    if len(entry.shape) == 1:
        return (1,)
    strides, step = [], 1
    for size in reversed(entry.shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))
