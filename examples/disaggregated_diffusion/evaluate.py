"""How good the trained networks are, by a judge that was trained apart."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import torch

from examples.disaggregated_diffusion import model
from examples.disaggregated_diffusion.digits import halves, ink
from examples.disaggregated_diffusion.networks import LATENT
from examples.disaggregated_diffusion.prompts import Style, phrasings
from examples.disaggregated_diffusion.requests import GUIDANCES, STEPS, Request, Scheduler

if TYPE_CHECKING:
    from collections.abc import Callable

    from examples.disaggregated_diffusion.judge import Judge
    from examples.disaggregated_diffusion.monolithic import Pipeline

DIGITS = torch.arange(10)


def evaluate(pipeline: Pipeline, judge: Judge, say: Callable[[str], None]) -> dict[str, Any]:
    """Return the quality figures, as ``quality.json`` has them; 1000 samples for each."""
    found: dict[str, Any] = {
        "judge": {"held_out": judge.accuracy(), "images": len(judge.held_out.labels)}
    }
    rows = []
    for guidance in GUIDANCES:
        for scheduler in Scheduler:
            images = samples(pipeline, guidance, scheduler)
            right = judge.share_right(images, labels_of(images))
            rows.append(
                {
                    "guidance": guidance,
                    "scheduler": scheduler.value,
                    "steps": STEPS[scheduler],
                    "samples": len(images),
                    "right": right,
                }
            )
            say(f"guidance {guidance:g}, {scheduler.value}: {right:.1%} right")
    found["right"] = rows
    images = samples(pipeline, unseen=True)
    right = judge.share_right(images, labels_of(images))
    found["unseen_phrasings"] = {"guidance": 2.0, "samples": len(images), "right": right}
    amounts = {}
    for style in Style:
        styled = samples(pipeline, styles=(style,))
        amounts[style.name.lower()] = round(float(ink(styled).mean()), 4)
    found["mean_ink"] = amounts
    images = samples(pipeline, 1.0)
    return found | {
        "controls": _controls(pipeline, judge, images),
        "spread": _spread(images),
        "nearest": _nearest(images),
    }


def samples(
    pipeline: Pipeline,
    guidance: float = 2.0,
    scheduler: Scheduler = Scheduler.EULER,
    styles: tuple[Style, ...] = tuple(Style),
    unseen: bool = False,
    requests: int = 10,
) -> torch.Tensor:
    """Return samples of all digits, 0 to 9 over and over: 100 a request, on the CPU.

    ``unseen``: with the phrasings that training left out.
    """
    found = []
    for number in range(requests):
        words = random.Random(number)
        prompts = []
        for digit in DIGITS.tolist():
            several = [phrasings(digit, style)[unseen] for style in styles]
            prompts.append(words.choice([prompt for one in several for prompt in one]))
        request = Request(
            request_id=f"evaluation-{number}",
            prompts=tuple(prompts),
            num_samples=100,
            guidance=guidance,
            scheduler=scheduler,
            num_inference_steps=STEPS[scheduler],
            seed=number,
        )
        found.append(pipeline.images(request).cpu())
    return torch.cat(found)


def labels_of(images: torch.Tensor) -> torch.Tensor:
    """Return which digit each of :func:`samples` was to show."""
    return DIGITS.repeat(len(images) // len(DIGITS))


def _controls(pipeline: Pipeline, judge: Judge, images: torch.Tensor) -> dict[str, float]:
    """Return the share right where it must be nothing, and twice where it must be a tenth."""
    labels, count = labels_of(images), len(images)
    noise = torch.randn(count, *LATENT, generator=torch.Generator().manual_seed(0))
    unprompted = Request("unprompted", ("",), count, 1.0, Scheduler.EULER, 12, seed=0)
    return {
        "labels_shifted": judge.share_right(images, (labels + 1) % 10),
        "decoded_noise": judge.share_right(model.decode(pipeline.decoder, noise), labels),
        "without_prompt": judge.share_right(pipeline.images(unprompted), labels),
    }


def _spread(images: torch.Tensor) -> float:
    """Return how much samples of a digit vary, over how much the images that were learnt do."""
    _, learnt = halves()

    def deviation(images: torch.Tensor, labels: torch.Tensor) -> float:
        of_digits = [images[labels == digit].std(0).mean() for digit in DIGITS]
        return float(torch.stack(of_digits).mean())

    ratio = deviation(images, labels_of(images)) / deviation(learnt.images, learnt.labels)
    return round(ratio, 4)


def _nearest(images: torch.Tensor) -> dict[str, float]:
    """Say how far samples are from the images that were learnt, beside new images' distance.

    Root mean squares over pixels in [-1, 1]: medians, and the nearest of all samples. A copy
    would be as near as the autoencoder is to what it was given.
    """
    judged, learnt = (half.images.flatten(1) for half in halves())
    size = learnt.shape[1] ** 0.5
    ours, new = (torch.cdist(rows, learnt).amin(1) / size for rows in (images.flatten(1), judged))
    return {
        "samples": round(float(ours.median()), 4),
        "new_images": round(float(new.median()), 4),
        "least": round(float(ours.min()), 4),
    }
