"""The head as it is trained: several draft steps at all positions of a text at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from examples.eagle_head.layout import Shape


class Text(NamedTuple):
    """Rows of packed text."""

    embedded: Tensor  # [bs, row + steps, hidden]: embedding of the token after each position
    features: Tensor  # [bs, row, taps * hidden]: the target's
    mask: Tensor  # [bs, 1, 1, row, row]: 0 where a position sees another, else a large negative
    cos: Tensor  # [steps, bs, row, 1, width / 2], by position
    sin: Tensor


def unroll(shape: Shape, weights: Mapping[str, Tensor], text: Text, steps: int) -> list[Tensor]:
    """Return the features that the head arrives at in each of its draft steps.

    Step ``j`` at position ``t`` has been given the tokens up to ``t + 1 + j`` and, besides the
    target's features up to ``t``, its own; what it sees of the text is step 0 at all positions up
    to ``t`` and its own steps up to ``j`` at ``t``: just as when it drafts from there.

    Parameters
    ----------
    shape : Shape
    weights : mapping of str to Tensor
    text : Text
    steps : int

    Returns
    -------
    features : list of Tensor, float, [bs, row, hidden]
        Not normed; :func:`normed` comes before the output matrix.
    """
    row = text.features.shape[1]
    kind = weights["fc.weight"].dtype
    feature = functional.linear(text.features, weights["fc.weight"]).float()
    keys: list[Tensor] = []
    values: list[Tensor] = []
    found = []
    for step in range(steps):
        embedded = text.embedded[:, step : step + row]
        inputs = torch.cat(
            (
                _rms(shape, embedded, weights["midlayer.input_layernorm.weight"]).to(kind),
                _rms(shape, feature, weights["midlayer.hidden_norm.weight"]).to(kind),
            ),
            dim=-1,
        )
        query, key, value = (
            functional.linear(inputs, weights[f"midlayer.self_attn.{name}_proj.weight"]).view(
                *inputs.shape[:2], -1, shape.width
            )
            for name in "qkv"
        )
        cos, sin = text.cos[step], text.sin[step]
        query = _rotate(query, cos, sin).to(kind)
        keys.append(_rotate(key, cos, sin).to(kind).transpose(1, 2))  # [bs, kv_heads, row, width]
        values.append(value.transpose(1, 2))
        seen = _attention(query, keys, values, text.mask)
        feature = feature + functional.linear(seen, weights["midlayer.self_attn.o_proj.weight"])
        inner = _rms(shape, feature, weights["midlayer.post_attention_layernorm.weight"]).to(kind)
        gate = functional.linear(inner, weights["midlayer.mlp.gate_proj.weight"])
        up = functional.linear(inner, weights["midlayer.mlp.up_proj.weight"])
        down = weights["midlayer.mlp.down_proj.weight"]
        feature = feature + functional.linear(functional.silu(gate) * up, down)
        found.append(feature)
    return found


def normed(shape: Shape, weights: Mapping[str, Tensor], features: Tensor) -> Tensor:
    """Return what the output matrix is applied to."""
    return _rms(shape, features, weights["norm.weight"])


def _attention(query: Tensor, keys: list[Tensor], values: list[Tensor], mask: Tensor) -> Tensor:
    """Attend to the keys of step 0 up to each position, and to the later steps' at the position."""
    bs, row, heads, width = query.shape
    kv_heads = keys[0].shape[1]
    # [bs, kv_heads, group, row, width]: the query heads that share a key head
    query = query.view(bs, row, kv_heads, -1, width).permute(0, 2, 3, 1, 4) * width**-0.5
    queued = query.reshape(bs, kv_heads, -1, width)
    scores = (queued @ keys[0].transpose(2, 3)).view(bs, kv_heads, -1, row, row) + mask
    own = [(query * key.unsqueeze(2)).sum(-1, keepdim=True) for key in keys[1:]]
    chance = torch.cat((scores, *own), dim=-1).float().softmax(-1).to(query.dtype)
    of_text = chance[..., :row].reshape(bs, kv_heads, -1, row)
    out = (of_text @ values[0]).view(bs, kv_heads, -1, row, width)
    for index, value in enumerate(values[1:]):
        out = out + chance[..., row + index].unsqueeze(-1) * value.unsqueeze(2)
    return out.permute(0, 3, 1, 2, 4).reshape(bs, row, heads * width)


def _rms(shape: Shape, x: Tensor, weight: Tensor) -> Tensor:
    return functional.rms_norm(x.float(), weight.shape, weight.float(), shape.epsilon)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
