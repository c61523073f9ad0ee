"""The three networks, one for each role: text to embeddings, noise to latents, latents to pixels.

Each is small and of the usual kind: a pre-norm transformer over characters, a latent diffusion
transformer with adaptive norms, the decoder of a variational autoencoder.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.disaggregated_diffusion.prompts import LENGTH, VOCABULARY
from hwcore.diffusion import RoleType

LATENT = (4, 4, 4)
"""Channels, height and width of one sample's latents: 64 fp32 values, 256 bytes."""

IMAGE = (1, 8, 8)
"""Likewise of one image, with values in [-1, 1]."""

EMBEDDING = 64
"""Width of the text embeddings."""

_WIDTH, _BLOCKS, _HEADS, _PATCH = 96, 4, 4, 2
_PATCHES = (LATENT[1] // _PATCH) * (LATENT[2] // _PATCH)


class _Attention(nn.Module):
    """Written out: torch's fused attention is another kernel, and other bits, by device."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.inputs, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, length, width = x.shape
        parts = self.inputs(x).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)  # each [batch, heads, length, ...]
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        found = scores.softmax(-1) @ value
        done: Tensor = self.output(found.transpose(1, 2).reshape(batch, length, width))
        return done


def _mlp(width: int, inner: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))


class _TextBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(EMBEDDING) for _ in range(2))
        self.attention = _Attention(EMBEDDING, heads=4)
        self.mlp = _mlp(EMBEDDING, 2 * EMBEDDING)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x), mask[:, None, None])
        done: Tensor = x + self.mlp(self.norms[1](x))
        return done


class TextEncoder(nn.Module):
    """The encoder's network: a prompt's characters to a sequence of embeddings."""

    role = RoleType.ENCODER

    def __init__(self) -> None:
        super().__init__()
        self.characters = nn.Embedding(VOCABULARY, EMBEDDING)
        self.places = nn.Parameter(0.02 * torch.randn(LENGTH, EMBEDDING))
        self.blocks = nn.ModuleList(_TextBlock() for _ in range(2))
        self.norm = nn.LayerNorm(EMBEDDING)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Return the embeddings ``[prompts, LENGTH, EMBEDDING]`` of tokens ``[prompts, LENGTH]``.

        ``mask``, bool, of the same shape, says which tokens are no padding.
        """
        x = self.characters(tokens) + self.places
        for block in self.blocks:
            x = block(x, mask)
        embeddings: Tensor = self.norm(x)
        return embeddings


class _DenoiserBlock(nn.Module):
    """Norms whose shift, scale and gate come from time and text; at first it does nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(_WIDTH, elementwise_affine=False) for _ in range(2))
        self.attention = _Attention(_WIDTH, _HEADS)
        self.mlp = _mlp(_WIDTH, 3 * _WIDTH)
        self.adapt = nn.Linear(_WIDTH, 6 * _WIDTH)
        nn.init.zeros_(self.adapt.weight)
        nn.init.zeros_(self.adapt.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        parts = self.adapt(condition).unsqueeze(1).chunk(6, dim=-1)  # each [batch, 1, width]
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = parts
        x = x + gate * self.attention(self.norms[0](x) * (1 + scale) + shift)
        done: Tensor = x + mlp_gate * self.mlp(self.norms[1](x) * (1 + mlp_scale) + mlp_shift)
        return done


class Denoiser(nn.Module):
    """The denoiser's network: a diffusion transformer that says where noisy latents come from."""

    role = RoleType.DENOISER

    def __init__(self) -> None:
        super().__init__()
        patch = LATENT[0] * _PATCH**2
        self.score, self.pooled = nn.Linear(EMBEDDING, 1), nn.Linear(EMBEDDING, _WIDTH)
        self.time = nn.Sequential(nn.Linear(32, _WIDTH), nn.SiLU(), nn.Linear(_WIDTH, _WIDTH))
        self.patches = nn.Linear(patch, _WIDTH)
        self.places = nn.Parameter(0.02 * torch.randn(_PATCHES, _WIDTH))
        self.blocks = nn.ModuleList(_DenoiserBlock() for _ in range(_BLOCKS))
        self.norm = nn.LayerNorm(_WIDTH)
        self.output = nn.Linear(_WIDTH, patch)
        nn.init.zeros_(self.output.weight)
        self.register_buffer("frequencies", 100 * torch.exp(-0.5 * torch.arange(16)), False)
        self.frequencies: Tensor

    def condition(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        """Return what the blocks need of prompts, ``[prompts, width]``: once for all steps."""
        scores = self.score(embeddings).squeeze(-1).masked_fill(~mask, float("-inf"))
        text: Tensor = self.pooled((scores.softmax(-1).unsqueeze(-1) * embeddings).sum(1))
        return text

    def forward(self, latents: Tensor, time: Tensor, text: Tensor) -> Tensor:
        """Return the velocity, noise minus data, of ``latents [batch, *LATENT]``.

        ``time [batch]`` is the share of noise, in [0, 1]; ``text [batch, width]`` is of
        :meth:`condition`.
        """
        angles = time.unsqueeze(1) * self.frequencies
        moment = self.time(torch.cat((angles.sin(), angles.cos()), dim=1))
        condition = functional.silu(moment + text)
        x = functional.pixel_unshuffle(latents, _PATCH).flatten(2).transpose(1, 2)
        x = self.patches(x) + self.places
        for block in self.blocks:
            x = block(x, condition)
        x = self.output(self.norm(x)).transpose(1, 2)
        x = x.reshape(len(x), -1, LATENT[1] // _PATCH, LATENT[2] // _PATCH)
        return functional.pixel_shuffle(x, _PATCH)


class LatentDecoder(nn.Module):
    """The decoder's network: latents of unit variance to pixels."""

    role = RoleType.DECODER

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(LATENT[0], 48, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(48, 48, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(48, 4 * IMAGE[0], 3, padding=1),
            nn.PixelShuffle(2),
        )
        self.register_buffer("mean", torch.zeros(LATENT[0], 1, 1))
        self.register_buffer("scale", torch.ones(LATENT[0], 1, 1))
        self.mean: Tensor
        self.scale: Tensor

    def forward(self, latents: Tensor) -> Tensor:
        """Return pixels ``[batch, *IMAGE]`` in [-1, 1] of ``latents [batch, *LATENT]``."""
        pixels: Tensor = self.layers(latents * self.scale + self.mean)
        return pixels.clamp(-1, 1)
