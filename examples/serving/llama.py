"""The Llama forward, on a pool of KV slots: ragged batches, trees, static shapes, no host reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


class _Where(NamedTuple):
    """What all layers of a forward have in common: where its tokens are, and what they see."""

    cos: Tensor  # [bs, q, 1, width / 2], by position
    sin: Tensor
    write: Tensor  # [bs, q]: slots of the new entries
    slots: Tensor  # [bs, context]: slots of all entries
    bias: Tensor  # [bs, 1, heads a key head * q, context]: 0, or -inf where nothing is seen


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

        self._embedding = fused("model.embed_tokens")
        untied = "lm_head.weight" in weights and not config.tie_word_embeddings
        self._head = fused("lm_head") if untied else self._embedding
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
        frequency = 1.0 / _theta(config) ** (torch.arange(0, self.width, 2) / self.width)
        angles = torch.outer(torch.arange(max_context), frequency)  # [positions, width / 2]
        self._cos, self._sin = angles.cos().to(device), angles.sin().to(device)

    def new_kv(self, num_slots: int) -> Tensor:
        """Return an empty pool ``[layers, num_slots, 2, kv_heads, width]`` of keys and values."""
        shape = self.layers, num_slots, 2, self.kv_heads, self.width
        return torch.zeros(shape, device=self.device)

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
        bs, q = tokens.shape
        step = torch.arange(q, device=self.device)
        entries = lens.unsqueeze(1) + step  # [bs, q]
        # A padding token may lie beyond the table; where it is written to does not matter.
        write = slots.gather(1, entries.clamp(max=slots.shape[1] - 1))
        if counts is not None:
            write = torch.where(step < counts.unsqueeze(1), write, 0)
        positions = entries if positions is None else positions
        positions = positions.clamp(max=self.max_context - 1).view(-1)
        cos = self._cos.index_select(0, positions).view(bs, q, 1, -1)
        sin = self._sin.index_select(0, positions).view(bs, q, 1, -1)
        bias = self._bias(lens, slots.shape[1], q, tree_mask)
        where = _Where(cos, sin, write, slots, bias)

        x = functional.embedding(tokens, self._embedding)  # [bs, q, hidden]
        for block, entry in zip(self._blocks, kv, strict=True):
            x = x + self._attention(block, entry, x, where)
            inner = _linear(self._rms(x, block["mlp_norm"]), block["gate_up"])
            gate, up = inner.chunk(2, dim=-1)
            x = x + _linear(functional.silu(gate) * up, block["down"])
        if last and counts is not None:
            x = x.gather(1, (counts - 1).view(-1, 1, 1).expand(-1, 1, x.shape[2]))
        elif last:
            x = x[:, -1:]
        return _linear(self._rms(x, self._norm), self._head)

    def _attention(
        self, block: dict[str, Tensor], entry: Tensor, x: Tensor, where: _Where
    ) -> Tensor:
        (bs, context), q, group = where.slots.shape, x.shape[1], self.heads // self.kv_heads
        qkv = _linear(self._rms(x, block["norm"]), block["qkv"])
        qkv = qkv.view(bs, q, self.heads + 2 * self.kv_heads, self.width)
        turned = _rotate(qkv[:, :, : -self.kv_heads], where.cos, where.sin)
        query, key = turned[:, :, : self.heads], turned[:, :, self.heads :]
        new = torch.stack((key, qkv[:, :, -self.kv_heads :]), dim=2)  # [bs, q, 2, kv_heads, width]
        entry.index_copy_(0, where.write.view(-1), new.view(bs * q, *new.shape[2:]))
        held = entry.index_select(0, where.slots.view(-1)).view(bs, context, *new.shape[2:])
        keys, values = held.transpose(1, 3).unbind(2)  # [bs, kv_heads, context, width] each
        # The query heads that share a key head queue up as more queries of it: nothing is repeated.
        query = query.view(bs, q, self.kv_heads, group, self.width).permute(0, 2, 3, 1, 4)
        query = query.reshape(bs, self.kv_heads, group * q, self.width)
        out = functional.scaled_dot_product_attention(query, keys, values, attn_mask=where.bias)
        out = out.view(bs, self.kv_heads, group, q, self.width).permute(0, 3, 1, 2, 4)
        return _linear(out.reshape(bs, q, -1), block["out"])

    def _bias(self, lens: Tensor, context: int, q: int, tree_mask: Tensor | None) -> Tensor:
        """Return what is added to the scores: 0 where a token attends to an entry, else -inf."""
        if tree_mask is None:
            tree_mask = torch.ones(q, q, dtype=torch.bool, device=self.device).tril()
            tree_mask = tree_mask.expand(len(lens), q, q)
        node = torch.arange(context, device=self.device) - lens.unsqueeze(1)  # [bs, context]
        of_tree = node.clamp(0, q - 1).unsqueeze(1).expand(-1, q, -1)
        sees = tree_mask.gather(2, of_tree) & (node < q).unsqueeze(1)
        sees = sees | (node < 0).unsqueeze(1)
        bias = torch.zeros(sees.shape, device=self.device).masked_fill_(~sees, float("-inf"))
        return bias.repeat(1, self.heads // self.kv_heads, 1).unsqueeze(1)

    def _rms(self, x: Tensor, weight: Tensor) -> Tensor:
        return functional.rms_norm(x, weight.shape, weight, self._epsilon)


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x [..., in]`` times the transpose of ``weight [out, in]``, as ``functional.linear``.

    Decoding multiplies a handful of rows by large weights. A CPU's library is two to four times
    faster with the weight as the left factor, and slowest of all with a single row, which goes in
    twice for that.
    """
    rows = x.reshape(-1, x.shape[-1])
    columns = (rows.repeat(2, 1) if len(rows) == 1 else rows).t()
    product = torch.mm(weight, columns)[:, : len(rows)].t().contiguous()
    return product.view(*x.shape[:-1], -1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the two halves of every head ``[..., width]`` against each other, by position."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def _theta(config: Any) -> float:
    parameters = getattr(config, "rope_parameters", None) or {}
    kind = parameters.get("rope_type", "default")
    if kind != "default":
        message = f"Llama: rope_type is `{kind}`; expected `default`. Scale the angles for it here."
        raise ValueError(message)
    return float(parameters.get("rope_theta") or config.rope_theta)
