"""Attention of ragged batches and trees over a pool of KV slots: static shapes, no host reads."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class Where(NamedTuple):
    """What all layers of a forward have in common: where its tokens are, and what they see."""

    cos: Tensor  # [bs, q, 1, width / 2], by position
    sin: Tensor
    write: Tensor  # [bs, q]: slots of the new entries
    slots: Tensor  # [bs, context]: slots of all entries
    bias: Tensor  # [bs, 1, heads a key head * q, context]: 0, or -inf where nothing is seen


class Attention:
    """Grouped-query attention with rotary positions, on pooled keys and values.

    Parameters
    ----------
    heads, kv_heads, width : int
    theta : float
        Base of the rotary frequencies.
    max_context : int
        Positions that are prepared for: more than any request has tokens, drafts included.
    device : torch.device
    """

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        width: int,
        theta: float,
        max_context: int,
        device: torch.device,
    ) -> None:
        self.heads, self.kv_heads, self.width = heads, kv_heads, width
        self.max_context, self.device = max_context, device
        angles = torch.outer(torch.arange(max_context), frequencies(theta, width))
        self._cos, self._sin = angles.cos().to(device), angles.sin().to(device)

    def new_kv(self, layers: int, num_slots: int) -> Tensor:
        """Return an empty pool ``[layers, num_slots, 2, kv_heads, width]`` of keys and values."""
        shape = layers, num_slots, 2, self.kv_heads, self.width
        return torch.zeros(shape, device=self.device)

    def where(
        self,
        q: int,
        lens: Tensor,
        slots: Tensor,
        counts: Tensor | None = None,
        positions: Tensor | None = None,
        tree_mask: Tensor | None = None,
        write: Tensor | None = None,
    ) -> Where:
        """Return where ``q`` new tokens of each request are, and what they see.

        Parameters
        ----------
        q : int
        lens : Tensor, int64, [bs]
            Entries that each request has before these tokens.
        slots : Tensor, int64, [bs, context]
            Slot of each entry of each request, the new ones included; what lies beyond is ignored.
        counts : Tensor, int64, [bs], optional
            How many of its ``q`` tokens a request really has, at least 1; the others, which are
            padding, are written to slot 0. Default: all.
        positions : Tensor, int64, [bs, q], optional
            Default: the tokens follow one another.
        tree_mask : Tensor, bool, [bs, q, newest], optional
            Which of a request's ``newest >= q`` last entries, the ``q`` tokens at their end
            included, each token attends to, besides all entries before. Default: those up to
            itself.
        write : Tensor, int64, [bs, q], optional
            Slots to write to. Default: where ``slots`` has them.
        """
        bs = len(lens)
        step = torch.arange(q, device=self.device)
        entries = lens.unsqueeze(1) + step  # [bs, q]
        if write is None:
            # A padding token may lie beyond the table; where it is written to does not matter.
            write = slots.gather(1, entries.clamp(max=slots.shape[1] - 1))
        if counts is not None:
            write = torch.where(step < counts.unsqueeze(1), write, 0)
        positions = entries if positions is None else positions
        positions = positions.clamp(max=self.max_context - 1).view(-1)
        cos = self._cos.index_select(0, positions).view(bs, q, 1, -1)
        sin = self._sin.index_select(0, positions).view(bs, q, 1, -1)
        return Where(cos, sin, write, slots, self._bias(lens, slots.shape[1], q, tree_mask))

    def __call__(self, entry: Tensor, qkv: Tensor, where: Where) -> Tensor:
        """Write the tokens' keys and values to a layer's pool and attend.

        Parameters
        ----------
        entry : Tensor, float, [num_slots, 2, kv_heads, width]
            Written to.
        qkv : Tensor, float, [bs, q, (heads + 2 * kv_heads) * width]
        where : Where

        Returns
        -------
        out : Tensor, float, [bs, q, heads * width]
        """
        (bs, context), q, group = where.slots.shape, qkv.shape[1], self.heads // self.kv_heads
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
        return out.reshape(bs, q, -1)

    def _bias(self, lens: Tensor, context: int, q: int, tree_mask: Tensor | None) -> Tensor:
        """Return what is added to the scores: 0 where a token attends to an entry, else -inf."""
        if tree_mask is None:
            tree_mask = torch.ones(q, q, dtype=torch.bool, device=self.device).tril()
            tree_mask = tree_mask.expand(len(lens), q, q)
        newest = tree_mask.shape[2]
        first = lens + (q - newest)  # the entry that the mask begins with
        node = torch.arange(context, device=self.device) - first.unsqueeze(1)  # [bs, context]
        of_tree = node.clamp(0, newest - 1).unsqueeze(1).expand(-1, q, -1)
        sees = tree_mask.gather(2, of_tree) & (node < newest).unsqueeze(1)
        sees = sees | (node < 0).unsqueeze(1)
        bias = torch.zeros(sees.shape, device=self.device).masked_fill_(~sees, float("-inf"))
        return bias.repeat(1, self.heads // self.kv_heads, 1).unsqueeze(1)


def rope_theta(config: Any) -> float:
    """Return the base of the rotary frequencies of a transformers LlamaConfig.

    Raises
    ------
    ValueError
        If positions are scaled in a way that is not known here.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    kind = parameters.get("rope_type", "default")
    if kind != "default":
        message = f"Llama: rope_type is `{kind}`; expected `default`. Scale the angles for it here."
        raise ValueError(message)
    return float(parameters.get("rope_theta") or config.rope_theta)


def frequencies(theta: float, width: int) -> Tensor:
    """Return the rotary frequencies ``[width / 2]``, in radians a position."""
    return 1.0 / theta ** (torch.arange(0, width, 2) / width)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the two halves of every head ``[..., width]`` against each other, by position."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
