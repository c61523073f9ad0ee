"""All roles in one process: what the disaggregated run is compared with, bit for bit.

``python -m examples.disaggregated_diffusion.monolithic``
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click
import torch
from safetensors.torch import save_file

import hwcore
from examples.disaggregated_diffusion import model, picture
from examples.disaggregated_diffusion.judge import Judge
from examples.disaggregated_diffusion.networks import Denoiser, LatentDecoder, TextEncoder
from examples.disaggregated_diffusion.requests import Asked, Request, workload

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


REQUIRED = 0.95
"""Share of samples that the judge must find right."""


@dataclass(frozen=True)
class Result:
    """What came of a request.

    Attributes
    ----------
    asked : Asked
    images : Tensor, float32, [num_samples, 1, 8, 8], CPU
    """

    asked: Asked
    images: torch.Tensor

    @property
    def digest(self) -> str:
        """What differs as soon as one bit of the images does."""
        return digest(self.images)


def digest(images: torch.Tensor) -> str:
    """Return the digest of images, their shape included, wherever they are."""
    images = images.cpu()
    content = hashlib.blake2b(str((images.dtype, tuple(images.shape))).encode(), digest_size=16)
    content.update(images.numpy().tobytes())
    return content.hexdigest()


class Pipeline:
    """The three roles' networks on one device."""

    def __init__(
        self, device: torch.device | str | None = None, folder: Path = model.TRAINED
    ) -> None:
        self.encoder = model.load(TextEncoder, device, folder)
        self.denoiser = model.load(Denoiser, device, folder)
        self.decoder = model.load(LatentDecoder, device, folder)

    def images(self, request: Request) -> torch.Tensor:
        """Return a request's images: float32, [num_samples, 1, 8, 8], on the device."""
        conditions = model.encode(self.encoder, request)
        return model.decode(self.decoder, model.denoise(self.denoiser, conditions))

    def run(self, asked: Sequence[Asked]) -> Iterator[Result]:
        """Serve requests one after the other."""
        for one in asked:
            yield Result(one, self.images(one.request).cpu())


@click.command()
@click.option("--short", is_flag=True, help="16 requests of up to 256 samples: seconds.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("demo/diffusion/monolithic"))
@click.option("--same-as", type=click.Path(path_type=Path), help="The digests.json of another run.")
def main(short: bool, out: Path, same_as: Path | None) -> None:
    """Serve all requests in this process; write images, digests and a picture.

    The status is 1 where the judge finds too few samples right, or digests are not the same.
    """
    torch.set_num_threads(1)  # as in every role's process: more would sum in another order
    judge = Judge()  # what it needs is missed now, not after the run
    out.mkdir(parents=True, exist_ok=True)
    asked = workload(short)
    results: list[Result] = []
    began = time.perf_counter()
    with click.progressbar(Pipeline().run(asked), len(asked), "Requests") as running:
        results.extend(running)
    took = time.perf_counter() - began
    digests = {result.asked.request.request_id: result.digest for result in results}
    (out / "digests.json").write_text(json.dumps(digests, indent=1) + "\n")
    save_file(
        {one.asked.request.request_id: one.images for one in results}, out / "images.safetensors"
    )
    picture.draw(out / "samples.png", [(one.asked.request, one.images) for one in results])
    images = torch.cat([result.images for result in results])
    labels = torch.tensor([label for result in results for label in result.asked.labels()])
    right = judge.share_right(images, labels)
    click.echo(
        f"{len(results)} requests, {len(images):,} samples in {took:.1f} s on the backend "
        f"{hwcore.current_backend().info.name}; right: {right:.2%}; see {out}"
    )
    same = True
    if same_as is not None:
        other = json.loads(same_as.read_text())
        wrong = [name for name in other.keys() | digests if other.get(name) != digests.get(name)]
        same = not wrong
        click.echo(
            f"bit for bit as in {same_as}" if same else f"NOT as in {same_as}: {sorted(wrong)}"
        )
    raise SystemExit(0 if same and right >= REQUIRED else 1)


if __name__ == "__main__":
    main()
