"""One text on the selected backend: a Llama, and KV slots that follow one another."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from examples.serving.llama import Llama

_BLOCK = 64  # the forward looks at whole blocks of entries: few shapes, little waste


class Model:
    """A Llama and the KV cache of a single text.

    Parameters
    ----------
    llama : Llama
    capacity : int
        Entries in the KV cache: prompt, answer and the widest tree.
    taps : tuple of int
        Layers whose input a draft head is shown.
    """

    def __init__(self, llama: Llama, capacity: int, taps: tuple[int, ...] = ()) -> None:
        self.llama, self.device, self.taps = llama, llama.device, taps
        capacity = -(-capacity // _BLOCK) * _BLOCK
        self._kv = llama.new_kv(1 + capacity)  # slot 0 is for padding
        self.slots = torch.arange(1, 1 + capacity, device=self.device).unsqueeze(0)  # [1, capacity]
        self.num_slots, self.length = 1 + capacity, 0

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor | None = None,
        tree_mask: torch.Tensor | None = None,
        last: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append tokens ``[1, n]`` to the cache; return logits ``[1, n, vocab]`` and features.

        As :meth:`examples.serving.llama.Llama.forward_features`; the caller says with ``length``
        how many of the entries are kept.
        """
        lens = torch.tensor([self.length], device=self.device)
        self.length += tokens.shape[1]
        return self.llama.forward_features(
            self._kv,
            tokens,
            lens,
            self.slots_of(self.length),
            positions=positions,
            tree_mask=tree_mask,
            last=last,
            taps=self.taps,
        )

    def slots_of(self, entries: int) -> torch.Tensor:
        """Return the slots of so many entries, in whole blocks: ``[1, context]``."""
        return self.slots[:, : -(-entries // _BLOCK) * _BLOCK]

    def move(self, src: torch.Tensor, dst: torch.Tensor) -> None:
        """Copy slots ``src [n]`` to ``dst [n]`` in every layer."""
        self._kv.index_copy_(1, dst, self._kv.index_select(1, src))
