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
    """

    def __init__(self, llama: Llama, capacity: int) -> None:
        self.llama, self.device = llama, llama.device
        capacity = -(-capacity // _BLOCK) * _BLOCK
        self._kv = llama.new_kv(1 + capacity)  # slot 0 is for padding
        self.slots = torch.arange(1, 1 + capacity, device=self.device).unsqueeze(0)  # [1, capacity]
        self.length = 0

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor | None = None,
        tree_mask: torch.Tensor | None = None,
        last: bool = False,
    ) -> torch.Tensor:
        """Append tokens ``[1, n]`` to the cache and return their logits ``[1, n, vocab]``.

        As :meth:`examples.serving.llama.Llama.forward`; the caller says with ``length`` how many
        of the entries are kept.
        """
        lens = torch.tensor([self.length], device=self.device)
        self.length += tokens.shape[1]
        slots = self.slots[:, : -(-self.length // _BLOCK) * _BLOCK]
        return self.llama.forward(
            self._kv, tokens, lens, slots, positions=positions, tree_mask=tree_mask, last=last
        )

    def move(self, src: torch.Tensor, dst: torch.Tensor) -> None:
        """Copy slots ``src [n]`` to ``dst [n]`` in every layer."""
        self._kv.index_copy_(1, dst, self._kv.index_select(1, src))
