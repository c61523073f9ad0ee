"""A Llama that decodes many texts at once on a CPU: bf16 products, static shapes, own sampling."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional
from torch.utils import cpp_extension

from examples.serving.attention import frequencies, rope_theta

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

_BLOCK = 128  # of the vocabulary: a token is drawn by block first, then within the block


class Decoder:
    """A Llama with a KV cache of ``bs`` rows, which takes one token of each row a step.

    Parameters
    ----------
    config : transformers.LlamaConfig
    weights : mapping of str to Tensor
        Under transformers' names; the embedding serves as the output matrix.
    bs : int
    room : int
        Entries of a row.
    taps : tuple of int
        Layers before which the residual stream is a feature of the draft head.

    Notes
    -----
    Attention is C++: at 192 rows it takes a tenth of the time of torch's own, which runs every
    row to the length of the longest.
    """

    def __init__(
        self, config: Any, weights: Mapping[str, Tensor], bs: int, room: int, taps: tuple[int, ...]
    ) -> None:
        self.taps = taps
        self._epsilon: float = config.rms_norm_eps
        source = Path(__file__).with_name("attention.cpp")
        flags = ["-O3", "-march=native", "-ffast-math", "-fopenmp"]
        built: Any = cpp_extension.load("eagle_head_attention", [str(source)], extra_cflags=flags)
        self._attention = built.decode_attention

        def fused(*names: str) -> Tensor:
            return torch.cat([weights[f"{name}.weight"] for name in names]).bfloat16()

        self._embedding = fused("model.embed_tokens")
        self._norm = weights["model.norm.weight"].float()
        self._blocks = []
        for layer in range(config.num_hidden_layers):
            at = f"model.layers.{layer}"
            self._blocks.append(
                (
                    weights[f"{at}.input_layernorm.weight"].float(),
                    fused(*(f"{at}.self_attn.{name}_proj" for name in "qkv")),
                    fused(f"{at}.self_attn.o_proj"),
                    weights[f"{at}.post_attention_layernorm.weight"].float(),
                    fused(f"{at}.mlp.gate_proj", f"{at}.mlp.up_proj"),
                    fused(f"{at}.mlp.down_proj"),
                )
            )
        shape = config.num_hidden_layers, 2, bs, config.num_key_value_heads, room, config.head_dim
        self._kv = torch.zeros(shape, dtype=torch.bfloat16)
        angles = torch.outer(torch.arange(room), frequencies(rope_theta(config), config.head_dim))
        self._cos, self._sin = angles.cos(), angles.sin()
        self._enter = torch.compile(_enter, dynamic=False)
        self._between = torch.compile(_between, dynamic=False)
        self._leave = torch.compile(_leave, dynamic=False)
        self._sample = torch.compile(_sample, dynamic=False)

    def step(
        self, tokens: Tensor, positions: Tensor, temperature: Tensor, uniform: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Append a token to each row and draw the one that follows.

        Parameters
        ----------
        tokens, positions : Tensor, int64, [bs]
        temperature : Tensor, float, [bs]
            0: the most probable token.
        uniform : Tensor, float, [bs]
            In [0, 1): what the draw depends on.

        Returns
        -------
        following : Tensor, int64, [bs]
        states : Tensor, bfloat16, [bs, (len(taps) + 1) * hidden]
            The features of the tokens, and the normed state that the logits were made of.
        """
        x = functional.embedding(tokens, self._embedding).float()
        states = []
        for layer, (block, kv) in enumerate(zip(self._blocks, self._kv, strict=True)):
            norm, qkv, out, mlp_norm, gate_up, down = block
            if layer in self.taps:
                states.append(x)
            inner = self._enter(x, norm, qkv, self._epsilon)
            seen = self._attention(inner, kv[0], kv[1], positions, self._cos, self._sin)
            x = self._between(x, seen, out, mlp_norm, gate_up, down, self._epsilon)
        last, logits = self._leave(x, self._norm, self._embedding, self._epsilon)
        states.append(last)
        following = self._sample(logits, temperature, uniform)
        return following, torch.cat([state.bfloat16() for state in states], dim=1)


def _rms(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return functional.rms_norm(x, weight.shape, weight, epsilon).bfloat16()


def _enter(x: Tensor, norm: Tensor, qkv: Tensor, epsilon: float) -> Tensor:
    return functional.linear(_rms(x, norm, epsilon), qkv)


def _between(
    x: Tensor,
    seen: Tensor,
    out: Tensor,
    norm: Tensor,
    gate_up: Tensor,
    down: Tensor,
    epsilon: float,
) -> Tensor:
    x = x + functional.linear(seen, out)
    gate, up = functional.linear(_rms(x, norm, epsilon), gate_up).chunk(2, dim=-1)
    return x + functional.linear(functional.silu(gate) * up, down)


def _leave(x: Tensor, norm: Tensor, head: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    last = _rms(x, norm, epsilon)
    return last, functional.linear(last, head)


def _sample(logits: Tensor, temperature: Tensor, uniform: Tensor) -> Tensor:
    """Draw by inverse distribution: the block of the vocabulary, then the token of the block."""
    blocks = logits.view(len(logits), -1, _BLOCK)
    peaks = blocks.amax(-1).float()  # [bs, blocks]
    top = peaks.amax(-1, keepdim=True)
    scale = 1 / temperature.clamp(min=1e-3).unsqueeze(1)
    # Greedy is a distribution on the most probable token alone; what ties falls to the first.
    mass = ((blocks.float() - top.unsqueeze(2)) * scale.unsqueeze(2)).exp().sum(-1)
    reached = mass.cumsum(-1)
    aim = uniform.unsqueeze(1) * reached[:, -1:]
    block = (reached <= aim).sum(-1, keepdim=True).clamp(max=blocks.shape[1] - 1)
    aim = aim - (reached - mass).gather(1, block)
    chosen = blocks.gather(1, block.unsqueeze(2).expand(-1, 1, _BLOCK)).squeeze(1).float()
    within = ((chosen - top) * scale).exp().cumsum(-1)
    return block.squeeze(1) * _BLOCK + (within <= aim).sum(-1).clamp(max=_BLOCK - 1)
