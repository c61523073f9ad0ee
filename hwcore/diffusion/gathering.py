"""Small tensors of the host gathered at their places, by plain moves of bytes.

A call of torch takes longer than a small tensor takes to be moved, so there is none for each: where
what goes is worked out once for a layout, and used for all trees that have it.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from hwcore.diffusion.host import tell_sanitizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from hwcore.diffusion.layout import Layout

__all__ = ["Gathering"]


class Gathering:
    """Where the small tensors of a layout go.

    Parameters
    ----------
    layout : Layout
    """

    def __init__(self, layout: Layout) -> None:
        first = {entry.offset: index for index, entry in reversed([*enumerate(layout.entries)])
                 if entry.size_bytes}  # fmt: skip
        self._moves = [(first[entry.offset], entry.offset, entry.size_bytes)
                       for entry in layout.places()]  # fmt: skip
        self._gaps = [(start, end - start) for start, end in layout.gaps()]

    def gather(self, target: torch.Tensor, tensors: Sequence[torch.Tensor]) -> None:
        """Write tensors, and zeros between them.

        Parameters
        ----------
        target : Tensor, uint8, [layout.size_bytes], CPU
        tensors : sequence of Tensor
            Of the layout's entries, each in the host's memory as its entry describes it.
        """
        start, move = target.data_ptr(), ctypes.memmove
        for index, offset, size_bytes in self._moves:
            move(start + offset, tensors[index].data_ptr(), size_bytes)
        for offset, size_bytes in self._gaps:  # whoever had this memory before left bytes there
            ctypes.memset(start + offset, 0, size_bytes)
        tell_sanitizer("gather", tensors, [target])
