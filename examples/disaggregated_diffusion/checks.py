"""What a role refuses, before it computes: trees that are not what the role before returns."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from examples.disaggregated_diffusion.networks import EMBEDDING
from examples.disaggregated_diffusion.prompts import LENGTH
from examples.disaggregated_diffusion.requests import MAX_SAMPLES, Scheduler
from hwcore.errors import ArgumentTypeError, ArgumentValueError, describe

_NAMES = (
    *("embeddings", "mask", "prompt_of", "timesteps", "guidance", "scheduler", "seeds"),
    "extra",
)


def check_conditions(conditions: dict[str, Any]) -> None:
    """Raise unless a denoiser can take ``conditions`` for those of an encoder."""
    where, fix = "denoise", "Pass what encode returned"
    missing = set(_NAMES) if not isinstance(conditions, dict) else set(_NAMES) - conditions.keys()
    if missing:
        got = f"nothing for {', '.join(sorted(missing))}"
        raise ArgumentTypeError(describe(where, "`conditions`", got, "a dict with all", fix))
    embeddings, mask, prompt_of, times, guidance, scheduler, seeds, extra = (
        conditions[name] for name in _NAMES
    )
    check_tensor(where, "embeddings", embeddings, torch.float32, (None, LENGTH, EMBEDDING))
    check_tensor(where, "mask", mask, torch.bool, (len(embeddings), LENGTH))
    check_tensor(where, "prompt_of", prompt_of, torch.uint8, (None,))
    check_count(where, "prompt_of", prompt_of)
    check_tensor(where, "timesteps", times, torch.float32, (None,))
    # On a device an index out of range would end the process: worth one look from the host.
    if len(times) < 2 or int(prompt_of.max()) >= len(embeddings):
        got = f"{len(times)} timesteps, {len(embeddings)} prompts, samples of {prompt_of.tolist()}"
        expected = "`timesteps` of a step or more, and a prompt for all of `prompt_of`"
        raise ArgumentValueError(describe(where, "`conditions`", got, expected, fix))
    for name, value, kind in (("guidance", guidance, float), ("scheduler", scheduler, Scheduler)):
        if not isinstance(value, kind):
            expected = f"a {kind.__name__}"
            raise ArgumentTypeError(describe(where, f"`{name}`", value, expected, fix))
    if not 1.0 <= guidance < math.inf:
        raise ArgumentValueError(describe(where, "`guidance`", guidance, "1.0 or more", fix))
    if not (isinstance(seeds, list) and len(seeds) == 1 and isinstance(seeds[0], int)):
        raise ArgumentTypeError(describe(where, "`seeds`", seeds, "a list of one int", fix))
    negative = extra.get("negative") if isinstance(extra, dict) else None
    if not isinstance(negative, list) or len(negative) != 2:
        expected = "`negative`: a list of embeddings and mask, or of None twice"
        raise ArgumentTypeError(describe(where, "`extra`", extra, expected, fix))
    if guidance != 1.0:
        check_tensor(
            where, "negative embeddings", negative[0], torch.float32, (1, LENGTH, EMBEDDING)
        )
        check_tensor(where, "negative mask", negative[1], torch.bool, (1, LENGTH))


def check_tensor(
    where: str, name: str, value: object, dtype: torch.dtype, shape: tuple[int | None, ...]
) -> None:
    """Raise unless ``value`` is a tensor of a dtype and shape; None admits any size."""
    fix = "Pass what the role before returned"
    form = f"a {dtype} tensor of {['any' if size is None else size for size in shape]}"
    if not isinstance(value, Tensor) or value.dtype != dtype or value.dim() != len(shape):
        raise ArgumentTypeError(describe(where, f"`{name}`", value, form, fix))
    if any(size not in (None, got) for size, got in zip(shape, value.shape, strict=True)):
        raise ArgumentValueError(describe(where, f"`{name}`", list(value.shape), form, fix))


def check_count(where: str, name: str, value: Tensor) -> None:
    """Raise unless a tensor has a row for each sample that a request may ask for."""
    if not 1 <= len(value) <= MAX_SAMPLES:
        expected, fix = f"1 to {MAX_SAMPLES} samples", "Split the request"
        raise ArgumentValueError(describe(where, f"`{name}`", len(value), expected, fix))
