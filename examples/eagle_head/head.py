"""The head at run time: one draft step of ragged batches and trees, on a pool of KV slots."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from examples.eagle_head import layout
from examples.serving.attention import Attention
from examples.serving.linear import linear

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor


class EagleHead:
    """An EAGLE-3 head's weights on its target's device, and its forward.

    Parameters
    ----------
    shape : Shape
    weights : mapping of str to Tensor
        As :func:`layout.load` returns them.
    draft_ids : Tensor, int64, [draft_vocab]
        The token that each entry of the draft vocabulary stands for.
    embedding : Tensor, float, [vocab, hidden]
        The target's.
    max_context : int
        Positions that are prepared for: more than any request has tokens, drafts included.
    """

    def __init__(
        self,
        shape: layout.Shape,
        weights: Mapping[str, Tensor],
        draft_ids: Tensor,
        embedding: Tensor,
        max_context: int,
    ) -> None:
        self.shape, self.device, self._embedding = shape, embedding.device, embedding
        self.max_context = max_context
        self.dtype, self.draft_ids = embedding.dtype, draft_ids.to(self.device)

        def fused(*names: str) -> Tensor:
            found = torch.cat([weights[f"{name}.weight"] for name in names])
            return found.to(self.device, embedding.dtype)

        layer = "midlayer"
        self._fuse, self._norm, self._head = fused("fc"), fused("norm"), fused("lm_head")
        self._token_norm = fused(f"{layer}.input_layernorm")
        self._feature_norm = fused(f"{layer}.hidden_norm")
        self._mlp_norm = fused(f"{layer}.post_attention_layernorm")
        self._qkv = fused(*(f"{layer}.self_attn.{name}_proj" for name in "qkv"))
        self._out = fused(f"{layer}.self_attn.o_proj")
        self._gate_up = fused(f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj")
        self._down = fused(f"{layer}.mlp.down_proj")
        self._attention = Attention(
            shape.heads, shape.kv_heads, shape.width, shape.theta, max_context, self.device
        )

    @classmethod
    def load(cls, folder: Path, embedding: Tensor, max_context: int) -> EagleHead:
        """Return the head that is in a folder, on the embedding's device."""
        return cls(*layout.load(folder), embedding, max_context)

    def new_kv(self, num_slots: int) -> Tensor:
        """Return an empty pool ``[1, num_slots, 2, kv_heads, width]`` of keys and values."""
        return self._attention.new_kv(1, num_slots)

    def fuse(self, features: Tensor) -> Tensor:
        """Turn the target's features ``[bs, q, taps * hidden]`` to the head's ``[bs, q, hidden]``.

        Those that the head returns itself are so already.
        """
        return linear(features, self._fuse)

    def forward(
        self,
        kv: Tensor,
        tokens: Tensor,
        features: Tensor,
        lens: Tensor,
        slots: Tensor,
        counts: Tensor | None = None,
        positions: Tensor | None = None,
        tree_mask: Tensor | None = None,
        last: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Write the tokens' keys and values to their slots; return what may follow them.

        Entry ``t`` of a request is made of token ``t + 1`` and of the feature at ``t``, the
        target's or, past the last token that the target has seen, the head's own.

        Parameters
        ----------
        kv : Tensor, float, [1, num_slots, 2, kv_heads, width]
            Written to.
        tokens : Tensor, int64, [bs, q]
        features : Tensor, float, [bs, q, hidden]
            Of the token before each.
        lens, slots, counts, positions
            As in :meth:`examples.serving.llama.Llama.forward`.
        tree_mask : Tensor, bool, [bs, q, newest], optional
            As in :meth:`examples.serving.attention.Attention.where`: the last entries, of which
            the ``q`` tokens are the end, are the draft tree so far.
        last : bool
            Return what follows each request's last real token only.

        Returns
        -------
        logits : Tensor, float, [bs, q, draft_vocab], or [bs, 1, draft_vocab]
            ``draft_ids`` says of which tokens.
        features : Tensor, float, [bs, q, hidden], or [bs, 1, hidden]
            For the next step.

        Notes
        -----
        Host sync: no. Graph-safe: yes.
        """
        where = self._attention.where(tokens.shape[1], lens, slots, counts, positions, tree_mask)
        embedded = functional.embedding(tokens, self._embedding)
        inputs = self._rms(embedded, self._token_norm), self._rms(features, self._feature_norm)
        qkv = linear(torch.cat(inputs, dim=-1), self._qkv)
        x = features + linear(self._attention(kv[0], qkv, where), self._out)
        if last and counts is not None:
            x = x.gather(1, (counts - 1).view(-1, 1, 1).expand(-1, 1, x.shape[2]))
        elif last:
            x = x[:, -1:]
        inner = linear(self._rms(x, self._mlp_norm), self._gate_up)
        gate, up = inner.chunk(2, dim=-1)
        x = x + linear(functional.silu(gate) * up, self._down)
        return linear(self._rms(x, self._norm), self._head), x

    def _rms(self, x: Tensor, weight: Tensor) -> Tensor:
        return functional.rms_norm(x, weight.shape, weight, self.shape.epsilon)
