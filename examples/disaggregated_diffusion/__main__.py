"""The demo: three roles in processes of their own, compared with one process bit for bit.

``python -m examples.disaggregated_diffusion [--short] [--kill] [--engine mooncake]
[--launcher ray]``
"""

from __future__ import annotations

import collections
import json
import logging
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch
from rich.console import Console
from rich.progress import Progress

import hwcore
from examples.disaggregated_diffusion import model, monolithic, picture, timeline
from examples.disaggregated_diffusion.judge import Judge
from examples.disaggregated_diffusion.requests import Asked, workload
from hwcore.diffusion.launch import Deployment, LocalLauncher, RoleSpec
from hwcore.diffusion.roles import RoleType
from hwcore.diffusion.serving.request import DiffusionRequest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hwcore.diffusion.launch.cluster import RayLauncher

COUNTS = {RoleType.ENCODER: 1, RoleType.DENOISER: 2, RoleType.DECODER: 1}
DEADLINE_S = 600.0
_SLOTS = (64 << 10, 64 << 10, 1 << 20, 1 << 20)


@click.command()
@click.option("--short", is_flag=True, help="16 requests of up to 256 samples: seconds.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("demo/diffusion"))
@click.option("--engine", type=click.Choice(["shm", "tcp", "mooncake"]), default="shm")
@click.option("--launcher", type=click.Choice(["local", "ray"]), default="local")
@click.option("--kill", is_flag=True, help="Kill a denoiser on the way.")
def main(short: bool, out: Path, engine: str, launcher: str, kill: bool) -> None:
    """Serve all requests by three roles; write a picture, a timeline and digests.

    The status is 1 where an image is missing, is not bit for bit that of one process, or where the
    judge finds too few right.
    """
    torch.set_num_threads(1)  # as in every role's process
    logging.basicConfig(stream=sys.stdout, format="%(message)s")
    console = Console(highlight=False)
    judge, asked = Judge(), workload(short)
    out.mkdir(parents=True, exist_ok=True)
    spans = out / "spans"
    shutil.rmtree(spans, ignore_errors=True)
    spans.mkdir()
    with Progress(console=console) as progress:
        task = progress.add_task("One process", total=len(asked))
        alone: dict[str, str] = {}
        began = time.perf_counter()
        for result in monolithic.Pipeline().run(asked):
            alone[result.asked.request.request_id] = result.digest
            progress.advance(task)
        alone_s = time.perf_counter() - began
        task = progress.add_task("Three roles", total=len(asked))
        with _launch(launcher, engine, spans) as launched, launched.client() as client:
            began = time.perf_counter()
            images = _serve(launched, client, asked, kill, lambda: progress.advance(task))
            took_s = time.perf_counter() - began
    wrong = [name for name, found in images.items() if monolithic.digest(found) != alone[name]]
    labels = torch.tensor([label for one in asked for label in one.labels()])
    right = judge.share_right(torch.cat([images[one.request.request_id] for one in asked]), labels)
    picture.draw(out / "samples.png", [(it.request, images[it.request.request_id]) for it in asked])
    seen = [timeline.Span(**json.loads(line)) for line in _lines(spans)]
    timeline.draw(out / "timeline.png", seen)
    over = timeline.overlap(seen)
    (out / "digests.json").write_text(json.dumps(alone, indent=1) + "\n")
    console.print(
        f"{len(images)} requests, {len(labels):,} samples, backend "
        f"{hwcore.current_backend().info.name}, {engine}, {launcher}: {took_s:.1f} s by roles, "
        f"{alone_s:.1f} s by one process; right: {right:.2%}\n"
        f"{'bit for bit as one process' if not wrong else f'NOT as one process: {wrong}'}\n"
        f"transfers ran for {over.transfer_s:.2f} s, for {over.overlap_s:.2f} s of it beside a "
        f"computation\nsee {out}/samples.png and {out}/timeline.png"
    )
    raise SystemExit(0 if not wrong and right >= monolithic.REQUIRED else 1)


def _launch(launcher: str, engine: str, spans: Path) -> LocalLauncher | RayLauncher:
    roles = tuple(
        RoleSpec(
            role=role,
            factory="examples.disaggregated_diffusion.roles:make",
            options={"role": role, "spans": str(spans.resolve())},
            count=count,
            environment={"OMP_NUM_THREADS": "1"},
            backend=hwcore.current_backend().info.name,
            worker={"engines": [engine], "pool_bytes": 32 << 20, "slot_bytes": _SLOTS},
        )
        for role, count in COUNTS.items()
    )
    deployment = Deployment(roles=roles)
    if launcher == "local":
        return LocalLauncher(deployment)
    from hwcore.diffusion.launch.cluster import RayLauncher

    return RayLauncher(deployment)


def _serve(
    launched: Any, client: Any, asked: Sequence[Asked], kill: bool, advance: Any
) -> dict[str, torch.Tensor]:
    """Send all requests at once; return their images, by request."""
    pending = collections.deque(
        client.submit(
            one.request.request_id,
            DiffusionRequest(one.request.request_id, one.request.to_tree()).to_tree(),
            deadline_s=DEADLINE_S,
            enums=model.ENUMS,
        )
        for one in asked
    )
    images: dict[str, torch.Tensor] = {}
    while pending:
        one = pending.popleft()
        images[one.request_id] = one.result()["images"]
        advance()
        if kill and len(images) == len(asked) // 4:
            _kill(launched)
    return images


def _kill(launched: Any) -> None:
    if isinstance(launched, LocalLauncher):
        launched.send_signal("denoiser-0", signal.SIGKILL)
    else:
        launched.kill("denoiser-0")


def _lines(folder: Path) -> list[str]:
    texts = [path.read_text() for path in sorted(folder.glob("*.jsonl"))]
    return [line for text in texts for line in text.splitlines()]


if __name__ == "__main__":
    main()
