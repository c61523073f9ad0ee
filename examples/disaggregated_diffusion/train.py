"""Train and evaluate all networks: ``python -m examples.disaggregated_diffusion.train``."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click
import torch
from safetensors.torch import save_file

from examples.disaggregated_diffusion import model
from examples.disaggregated_diffusion.digits import SPLIT_SEED, halves
from examples.disaggregated_diffusion.evaluate import evaluate
from examples.disaggregated_diffusion.judge import Judge
from examples.disaggregated_diffusion.monolithic import REQUIRED, Pipeline
from examples.disaggregated_diffusion.training import (
    LatentEncoder,
    Settings,
    train_autoencoder,
    train_denoiser,
)

if TYPE_CHECKING:
    from examples.disaggregated_diffusion.networks import LatentDecoder


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=model.TRAINED, show_default=True)
@click.option("--autoencoder-steps", default=Settings.autoencoder_steps, show_default=True)
@click.option("--denoiser-steps", default=Settings.denoiser_steps, show_default=True)
@click.option("--seed", default=Settings.seed, show_default=True)
def main(out: Path, autoencoder_steps: int, denoiser_steps: int, seed: int) -> None:
    """Train on one thread of the host, write a file for each role and quality.json.

    The status is 1 where the judge finds too few samples right, at any guidance.
    """
    torch.set_num_threads(1)
    settings = Settings(seed, autoencoder_steps, denoiser_steps)
    _, learnt = halves()
    began = time.monotonic()
    encoder, decoder = train_autoencoder(learnt, settings, click.echo)
    between = time.monotonic()
    text, denoiser = train_denoiser(learnt, encoder, decoder, settings, click.echo)
    ended = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    networks = {network.role: network for network in (text, denoiser, decoder)}
    for role, network in networks.items():
        state = {name: weight.contiguous() for name, weight in network.state_dict().items()}
        save_file(state, out / f"{role}.safetensors")
    quality = evaluate(Pipeline("cpu", out), Judge(), click.echo) | {
        "training": {
            **dataclasses.asdict(settings),
            "split_seed": SPLIT_SEED,
            "images": len(learnt.labels),
            "autoencoder_seconds": round(between - began, 1),
            "denoiser_seconds": round(ended - between, 1),
            "autoencoder_error": round(_error(encoder, decoder), 5),
            "threads": 1,
            "torch": torch.__version__,
        },
        "parameters": {str(role): _parameters(network) for role, network in networks.items()},
        "size_bytes": {
            str(role): (out / f"{role}.safetensors").stat().st_size for role in networks
        },
    }
    (out / "quality.json").write_text(json.dumps(quality, indent=1) + "\n")
    raise SystemExit(0 if all(row["right"] >= REQUIRED for row in quality["right"]) else 1)


@torch.no_grad()
def _error(encoder: LatentEncoder, decoder: LatentDecoder) -> float:
    """Return the root mean square error on the judge's half, which neither of them saw."""
    images = halves()[0].images
    mean, _ = encoder(images)
    restored: torch.Tensor = decoder((mean - decoder.mean) / decoder.scale)
    return float(((restored - images) ** 2).mean().sqrt())


def _parameters(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


if __name__ == "__main__":
    main()
