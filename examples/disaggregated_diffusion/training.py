"""How the networks learn: the autoencoder first, then denoiser and text encoder together."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from examples.disaggregated_diffusion.digits import Digits, styles
from examples.disaggregated_diffusion.networks import (
    IMAGE,
    LATENT,
    Denoiser,
    LatentDecoder,
    TextEncoder,
)
from examples.disaggregated_diffusion.prompts import Style, phrasings, tokenize

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class Settings:
    """What a training run is made of.

    Attributes
    ----------
    seed : int
    autoencoder_steps, denoiser_steps, batch_size : int
    divergence : float
        Weight of the autoencoder's Kullback-Leibler term, per latent value.
    without_prompt : float
        Share of prompts that are left out, for guidance.
    """

    seed: int = 0
    autoencoder_steps: int = 1500
    denoiser_steps: int = 3000
    batch_size: int = 256
    divergence: float = 1e-3
    without_prompt: float = 0.1


class LatentEncoder(nn.Module):
    """Pixels to the mean and log variance of latents; of use in training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(IMAGE[0], 48, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(48, 48, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(48, 2 * LATENT[0], 3, padding=1),
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log variance, each ``[batch, *LATENT]``, of ``[batch, *IMAGE]``."""
        mean, log_variance = self.layers(images).chunk(2, dim=1)
        return mean, log_variance.clamp(-12, 4)


def train_autoencoder(
    digits: Digits, settings: Settings, say: Callable[[str], None]
) -> tuple[LatentEncoder, LatentDecoder]:
    """Return an encoder and a decoder whose latents have unit variance, by channel."""
    torch.manual_seed(settings.seed)
    encoder, decoder = LatentEncoder(), LatentDecoder()
    both = nn.ModuleList((encoder, decoder))
    course = _Course(both, 2e-3, settings.autoencoder_steps)
    for step in range(settings.autoencoder_steps):
        images = digits.images[torch.randint(len(digits.images), (settings.batch_size,))]
        mean, log_variance = encoder(images)
        latents = mean + (log_variance / 2).exp() * torch.randn_like(mean)
        error = ((decoder.layers(latents) - images) ** 2).mean()
        divergence = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
        course.follow(error + settings.divergence * divergence)
        if (step + 1) % 500 == 0:
            say(f"autoencoder {step + 1}: error {error:.4f}, divergence {divergence:.2f}")
    with torch.no_grad():
        mean, log_variance = encoder(digits.images)
        variance = mean.var((0, 2, 3)) + log_variance.exp().mean((0, 2, 3))
        decoder.mean.copy_(mean.mean((0, 2, 3))[:, None, None])
        decoder.scale.copy_(variance.sqrt()[:, None, None])
    return encoder.eval(), decoder.eval()


def train_denoiser(
    digits: Digits,
    encoder: LatentEncoder,
    decoder: LatentDecoder,
    settings: Settings,
    say: Callable[[str], None],
) -> tuple[TextEncoder, Denoiser]:
    """Return text encoder and denoiser: averages over their training, by rectified flow."""
    torch.manual_seed(settings.seed + 1)
    words = random.Random(settings.seed)
    text, denoiser = TextEncoder(), Denoiser()
    both = nn.ModuleList((text, denoiser))
    averages = copy.deepcopy((text, denoiser))
    course = _Course(both, 2e-3, settings.denoiser_steps)
    with torch.no_grad():
        mean, log_variance = encoder(digits.images)
    labels: list[int] = digits.labels.tolist()
    kinds, recent = list(zip(labels, styles(digits), strict=True)), 0.0
    for step in range(settings.denoiser_steps):
        chosen = torch.randint(len(mean), (settings.batch_size,))
        spread = (log_variance[chosen] / 2).exp() * torch.randn_like(mean[chosen])
        data = (mean[chosen] + spread - decoder.mean) / decoder.scale
        prompts = [_prompt(kinds[one], words, settings) for one in chosen.tolist()]
        tokens, mask = tokenize(prompts)
        noise, time = torch.randn_like(data), torch.sigmoid(torch.randn(len(data)))
        share = time.view(-1, 1, 1, 1)
        condition = denoiser.condition(text(tokens, mask), mask)
        velocity = denoiser((1 - share) * data + share * noise, time, condition)
        loss = ((velocity - (noise - data)) ** 2).mean()
        course.follow(loss)
        _approach(nn.ModuleList(averages), both, min(0.999, (1 + step) / (10 + step)))
        recent += float(loss.detach()) / 250
        if (step + 1) % 250 == 0:
            say(f"denoiser {step + 1}: loss {recent:.4f}")
            recent = 0.0
    return averages[0].eval(), averages[1].eval()


class _Course:
    """An optimiser whose rate rises over 50 steps and falls to nothing."""

    def __init__(self, network: nn.Module, rate: float, steps: int) -> None:
        self._optimizer = torch.optim.AdamW(network.parameters(), rate, weight_decay=0.01)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer,
            lambda step: min(1.0, (step + 1) / 50) * max(0.0, 1 - step / steps) ** 0.5,
        )

    def follow(self, loss: Tensor) -> None:
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self._schedule.step()


def _prompt(kind: tuple[int, Style], words: random.Random, settings: Settings) -> str:
    digit, style = kind
    if words.random() < settings.without_prompt:
        return ""
    named = style if words.random() < 0.5 else Style.PLAIN
    return words.choice(phrasings(digit, named)[0])


@torch.no_grad()
def _approach(average: nn.Module, network: nn.Module, decay: float) -> None:
    for kept, new in zip(average.parameters(), network.parameters(), strict=True):
        kept.lerp_(new, 1 - decay)
