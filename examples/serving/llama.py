"""The Llama forward, on a pool of KV slots: ragged batches, trees, static shapes, no host reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from examples.serving.attention import Attention, rope_theta
from examples.serving.linear import linear

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


class Llama:
    """A Llama's weights on a device, and its forward.

    Parameters
    ----------
    config : transformers.LlamaConfig
        Only its numbers are read.
    weights : mapping of str to Tensor
        A state dict under transformers' names; without ``lm_head.weight`` the embedding serves.
    device : torch.device
    max_context : int
        Positions that are prepared for: more than any request has tokens, drafts included.

    Attributes
    ----------
    embedding : Tensor, float, [vocab, hidden]
        Which a draft head shares.
    """

    def __init__(
        self, config: Any, weights: Mapping[str, Tensor], device: torch.device, max_context: int
    ) -> None:
        self.device, self.max_context = device, max_context
        self.layers: int = config.num_hidden_layers
        self.heads: int = config.num_attention_heads
        self.kv_heads: int = config.num_key_value_heads
        self.width: int = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.vocab: int = config.vocab_size
        self._epsilon: float = config.rms_norm_eps

        def fused(*names: str) -> Tensor:
            # One wide matrix product instead of several: fewer, larger operations.
            return torch.cat([weights[f"{name}.weight"] for name in names]).to(device)

        self.embedding = fused("model.embed_tokens")
        untied = "lm_head.weight" in weights and not config.tie_word_embeddings
        self._head = fused("lm_head") if untied else self.embedding
        self._norm = fused("model.norm")
        self._blocks = []
        for layer in range(self.layers):
            at = f"model.layers.{layer}"
            block = {
                "norm": fused(f"{at}.input_layernorm"),
                "qkv": fused(*(f"{at}.self_attn.{name}_proj" for name in "qkv")),
                "out": fused(f"{at}.self_attn.o_proj"),
                "mlp_norm": fused(f"{at}.post_attention_layernorm"),
                "gate_up": fused(f"{at}.mlp.gate_proj", f"{at}.mlp.up_proj"),
                "down": fused(f"{at}.mlp.down_proj"),
            }
            self._blocks.append(block)
        self._attention = Attention(
            self.heads, self.kv_heads, self.width, rope_theta(config), max_context, device
        )

    def new_kv(self, num_slots: int) -> Tensor:
        """Return an empty pool ``[layers, num_slots, 2, kv_heads, width]`` of keys and values."""
        return self._attention.new_kv(self.layers, num_slots)

    def forward(
        self,
        kv: Tensor,
        tokens: Tensor,
        lens: Tensor,
        slots: Tensor,
        counts: Tensor | None = None,
        positions: Tensor | None = None,
        tree_mask: Tensor | None = None,
        last: bool = False,
    ) -> Tensor:
        """Write the tokens' keys and values to their slots, and return the logits that follow them.

        The node ``i`` of request ``r`` is the entry number ``lens[r] + i`` of the request. All
        that differs between requests is in tensors on the device, and shapes depend on nothing
        else, so that a graph can hold the whole.

        Parameters
        ----------
        kv : Tensor, float, [layers, num_slots, 2, kv_heads, width]
            Written to.
        tokens : Tensor, int64, [bs, q]
        lens : Tensor, int64, [bs]
            Entries that each request has before these tokens.
        slots : Tensor, int64, [bs, context]
            Slot of each entry of each request, the new ones included; what lies beyond is ignored.
        counts : Tensor, int64, [bs], optional
            How many of its ``q`` tokens a request really has, at least 1; the others, which are
            padding, are written to slot 0. Default: all.
        positions : Tensor, int64, [bs, q], optional
            Default: the tokens follow one another.
        tree_mask : Tensor, bool, [bs, q, q], optional
            Which of the tokens each of them attends to, besides all entries before them. Default:
            those up to itself.
        last : bool
            Return the logits after each request's last real token only.

        Returns
        -------
        logits : Tensor, float, [bs, q, vocab], or [bs, 1, vocab]

        Notes
        -----
        Host sync: no. Graph-safe: yes.
        """
        return self.forward_features(
            kv, tokens, lens, slots, counts, positions, tree_mask, last, taps=()
        )[0]

    def forward_features(
        self,
        kv: Tensor,
        tokens: Tensor,
        lens: Tensor,
        slots: Tensor,
        counts: Tensor | None = None,
        positions: Tensor | None = None,
        tree_mask: Tensor | None = None,
        last: bool = False,
        taps: tuple[int, ...] = (),
        write: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Do as :meth:`forward`, and return what a draft head sees of the model as well.

        Parameters
        ----------
        kv, tokens, lens, slots, counts, positions, tree_mask, last
            As in :meth:`forward`.
        taps : tuple of int
            Layers before which the residual stream is looked at.
        write : Tensor, int64, [bs, q], optional
            Slots to write to; the default is where ``slots`` has the new entries.

        Returns
        -------
        logits : Tensor, float, [bs, q, vocab], or [bs, 1, vocab]
        features : Tensor, float, [bs, q, len(taps) * hidden]
            Of all tokens, whatever ``last`` is.
        """
        where = self._attention.where(
            tokens.shape[1], lens, slots, counts, positions, tree_mask, write
        )
        x = functional.embedding(tokens, self.embedding)  # [bs, q, hidden]
        features = []
        for layer, (block, entry) in enumerate(zip(self._blocks, kv, strict=True)):
            if layer in taps:
                features.append(x)
            qkv = linear(self._rms(x, block["norm"]), block["qkv"])
            x = x + linear(self._attention(entry, qkv, where), block["out"])
            inner = linear(self._rms(x, block["mlp_norm"]), block["gate_up"])
            gate, up = inner.chunk(2, dim=-1)
            x = x + linear(functional.silu(gate) * up, block["down"])
        if last and counts is not None:
            x = x.gather(1, (counts - 1).view(-1, 1, 1).expand(-1, 1, x.shape[2]))
        elif last:
            x = x[:, -1:]
        logits = linear(self._rms(x, self._norm), self._head)
        return logits, torch.cat(features, dim=-1) if taps else logits[..., :0]

    def _rms(self, x: Tensor, weight: Tensor) -> Tensor:
        return functional.rms_norm(x, weight.shape, weight, self._epsilon)
