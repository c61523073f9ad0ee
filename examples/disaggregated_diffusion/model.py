"""What each role does for a request: text to conditions, conditions to latents, latents to pixels.

The roles hand on trees of tensors and plain values, which ``hwcore.diffusion`` carries. What comes
out depends on the request alone: requests share no batch, each is cut into the same pieces
wherever it runs, and noise is drawn on the host. The same kind of device, the same build of torch
and the same number of threads (one; see ``monolithic``) then give the same bits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import hwcore
from examples.disaggregated_diffusion.checks import check_conditions, check_count, check_tensor
from examples.disaggregated_diffusion.networks import (
    LATENT,
    Denoiser,
    LatentDecoder,
    TextEncoder,
)
from examples.disaggregated_diffusion.prompts import tokenize
from examples.disaggregated_diffusion.requests import Request, Scheduler
from hwcore.diffusion import EnumRegistry

TRAINED = Path(__file__).parent / "trained"
MICRO_BATCH = 64
"""Samples at once: memory is bounded, and a sample's neighbours are always the same."""

ENUMS = EnumRegistry()
"""What the trees hold that is no plain value."""
ENUMS.register(Scheduler)

_Network = TypeVar("_Network", TextEncoder, Denoiser, LatentDecoder)


def load(
    kind: type[_Network], device: torch.device | str | None = None, folder: Path = TRAINED
) -> _Network:
    """Return a role's trained network; no other's weights are read.

    Parameters
    ----------
    kind : type
        TextEncoder, Denoiser or LatentDecoder.
    device : torch.device or str, optional
        By default the selected backend's.
    folder : Path

    Raises
    ------
    FileNotFoundError
        If it was not trained.
    """
    path = folder / f"{kind.role}.safetensors"
    if not path.exists():
        message = f"{path} is not there; run python -m examples.disaggregated_diffusion.train"
        raise FileNotFoundError(message)
    device = hwcore.current_backend().device() if device is None else torch.device(device)
    network = kind()
    network.load_state_dict(load_file(path))
    return network.eval().requires_grad_(False).to(device)


@torch.no_grad()
def encode(network: TextEncoder, request: Request) -> dict[str, Any]:
    """Return what the denoiser needs of a request.

    Returns
    -------
    dict
        ``embeddings`` (float32, [prompts, LENGTH, EMBEDDING]) and ``mask`` (bool, [prompts,
        LENGTH]) on the network's device; ``prompt_of`` (uint8, [num_samples], CPU), each sample's
        prompt; ``timesteps`` (float32, [steps + 1], CPU), from 1 to 0; ``guidance``,
        ``scheduler``, ``seeds``; and in ``extra`` the request's id, its prompts and
        ``negative``: embeddings and mask of the empty prompt, or twice None where guidance is 1.
    """
    device = _device(network)
    embeddings, mask = _embed(network, request.prompts, device)
    negative: list[Tensor | None] = [None, None]
    if request.guidance != 1.0:
        negative = [*_embed(network, ("",), device)]
    samples = torch.arange(request.num_samples)
    return {
        "embeddings": embeddings,
        "mask": mask,
        "prompt_of": (samples % len(request.prompts)).to(torch.uint8),
        "timesteps": torch.linspace(1, 0, request.num_inference_steps + 1),
        "guidance": request.guidance,
        "scheduler": request.scheduler,
        "seeds": [request.seed],
        "extra": {
            "request_id": request.request_id,
            "prompts": request.prompts,
            "negative": negative,
        },
    }


@torch.no_grad()
def denoise(
    network: Denoiser, conditions: dict[str, Any], generator: torch.Generator | None = None
) -> Tensor:
    """Return a request's latents, ``[num_samples, *LATENT]``, float32, on the network's device.

    Parameters
    ----------
    network : Denoiser
    conditions : dict
        Of :func:`encode`; its tensors may be on any device.
    generator : torch.Generator, optional
        Whose noise is used; its state moves on. By default one of the host, made anew of the seed.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        If the conditions are none.
    """
    check_conditions(conditions)
    device, guidance = _device(network), conditions["guidance"]
    if generator is None:
        generator = torch.Generator().manual_seed(conditions["seeds"][0])

    def condition(embeddings: Tensor, mask: Tensor) -> Tensor:
        return network.condition(_moved(embeddings, device), _moved(mask, device))

    texts = condition(conditions["embeddings"], conditions["mask"])
    empty = None if guidance == 1.0 else condition(*conditions["extra"]["negative"])
    prompt_of = conditions["prompt_of"].to(device).long()
    times = conditions["timesteps"].to(device)
    latents = torch.empty(len(prompt_of), *LATENT, device=device)
    for piece in _pieces(len(latents)):
        size = piece.stop - piece.start
        noise = torch.randn(size, *LATENT, generator=generator, device=generator.device)
        velocity = _Velocity(network, texts[prompt_of[piece]], empty, guidance)
        latents[piece] = _integrated(velocity, noise.to(device), times, conditions["scheduler"])
    return latents


@torch.no_grad()
def decode(network: LatentDecoder, latents: Tensor) -> Tensor:
    """Return images, ``[num_samples, *IMAGE]``, float32, in [-1, 1], of a request's latents.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        If they are no float32 latents ``[1 to MAX_SAMPLES, *LATENT]``.
    """
    check_tensor("decode", "latents", latents, torch.float32, (None, *LATENT))
    check_count("decode", "latents", latents)
    device = _device(network)
    return torch.cat([network(_moved(latents[piece], device)) for piece in _pieces(len(latents))])


class _Velocity:
    """The denoiser under guidance: with the prompt and without it, in one pass."""

    def __init__(
        self, network: Denoiser, texts: Tensor, empty: Tensor | None, guidance: float
    ) -> None:
        self._network, self._guidance, self._texts = network, guidance, texts
        if empty is not None:
            self._texts = torch.cat((texts, empty.expand_as(texts)))

    def __call__(self, latents: Tensor, time: Tensor) -> Tensor:
        if len(self._texts) == len(latents):
            found: Tensor = self._network(latents, time.expand(len(latents)), self._texts)
            return found
        twice = torch.cat((latents, latents))
        with_prompt, without = self._network(twice, time.expand(len(twice)), self._texts).chunk(2)
        guided: Tensor = without + self._guidance * (with_prompt - without)
        return guided


def _integrated(velocity: _Velocity, noise: Tensor, times: Tensor, scheduler: Scheduler) -> Tensor:
    """Follow the flow from noise, at time 1, to data, at time 0."""
    latents, last = noise, len(times) - 2
    for step in range(last + 1):
        now, then = times[step], times[step + 1]
        slope = velocity(latents, now)
        if scheduler is Scheduler.HEUN and step < last:
            slope = (slope + velocity(latents + (then - now) * slope, then)) / 2
        latents = latents + (then - now) * slope
    return latents


def _embed(
    network: TextEncoder, prompts: tuple[str, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    tokens, mask = (tensor.to(device) for tensor in tokenize(prompts))
    return network(tokens, mask), mask


def _pieces(count: int) -> list[slice]:
    starts = range(0, count, MICRO_BATCH)
    return [slice(start, min(start + MICRO_BATCH, count)) for start in starts]


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device, in memory of its own.

    Received tensors lie in the middle of a pool, and matrix libraries promise the same bits only
    for arrays of the same alignment. A precaution: no difference was seen without it.
    """
    return tensor.to(device, copy=True, memory_format=torch.contiguous_format)


def _device(network: nn.Module) -> torch.device:
    return next(network.parameters()).device
