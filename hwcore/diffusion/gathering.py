"""Small tensors of the host gathered at their places, by plain moves of bytes.

A call of torch takes longer than a small tensor takes to be moved, so there is none for each: where
what goes is worked out once for a layout, and used for all trees that have it.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from hwcore.diffusion.host import is_sanitized, tell_sanitizer

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
        first: dict[int, int] = {}
        for index, entry in enumerate(layout.entries):
            if entry.size_bytes:  # else its offset says nothing
                first.setdefault(entry.offset, index)
        self._moves = [(first[e.offset], e.offset, e.size_bytes) for e in layout.places()]

    def gather(self, target: torch.Tensor, tensors: Sequence[torch.Tensor]) -> None:
        """Write small tensors, which a layout places without gaps.

        Parameters
        ----------
        target : Tensor, uint8, [layout.size_bytes], CPU
        tensors : sequence of Tensor
            Of the layout's entries, each in the host's memory as its entry describes it.
        """
        start, move = target.data_ptr(), ctypes.memmove
        for index, offset, size_bytes in self._moves:
            move(start + offset, tensors[index].data_ptr(), size_bytes)
        if is_sanitized():
            tell_sanitizer("gather", tensors, [target])
