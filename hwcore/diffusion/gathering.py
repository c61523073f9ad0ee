"""Tensors of the host gathered at their places, as bytes.

Where what goes is worked out once for a layout, and used for all trees that have it. A call of
torch takes longer than a small tensor takes to be moved, so there is none for each of these.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch

from hwcore.diffusion.host import is_sanitized, tell_sanitizer
from hwcore.diffusion.layout import LARGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hwcore.diffusion.checksum import Digest
    from hwcore.diffusion.layout import Layout

__all__ = ["Gathering"]


class Gathering:
    """Where the tensors of a layout go.

    Parameters
    ----------
    layout : Layout
    """

    def __init__(self, layout: Layout) -> None:
        first: dict[int, int] = {}
        for index, entry in enumerate(layout.entries):
            if entry.size_bytes:  # else its offset says nothing
                first.setdefault(entry.offset, index)
        self._moves = [(first[e.offset], e.offset, e.size_bytes) for e in layout.places()]
        self._gaps = [(start, end - start) for start, end in layout.gaps()]

    def gather(
        self, target: torch.Tensor, tensors: Sequence[torch.Tensor], digest: Digest | None
    ) -> None:
        """Write tensors, and zeros between them.

        Parameters
        ----------
        target : Tensor, uint8, [layout.size_bytes], CPU
        tensors : sequence of Tensor
            Of the layout's entries, each in the host's memory as its entry describes it.
        digest : Digest or None
            Gets all that is written; of a large tensor each stretch while a core's cache has it.
        """
        origin, move = target.data_ptr(), ctypes.memmove
        for start, size_bytes in self._gaps:  # whoever had this memory before left bytes there
            ctypes.memset(origin + start, 0, size_bytes)
        summed = 0
        for index, offset, size_bytes in self._moves:
            tensor = tensors[index]
            if size_bytes < LARGE_BYTES:
                move(origin + offset, tensor.data_ptr(), size_bytes)
                continue
            place = target[offset : offset + size_bytes]
            source = tensor.view(-1).view(torch.uint8)
            if digest is None:
                place.copy_(source)
            else:
                digest.add(target[summed:offset])
                digest.copy(place, source)
                summed = offset + size_bytes
        if digest is not None:
            digest.add(target[summed:])
        if is_sanitized():
            tell_sanitizer("gather", tensors, [target])
