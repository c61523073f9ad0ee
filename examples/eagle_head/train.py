"""Train the head: ``python -m examples.eagle_head.train``. Goes on where it was stopped."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click
import torch

import hwcore
from examples.eagle_head import labels, layout, plot, store
from examples.eagle_head.layout import Shape
from examples.eagle_head.training import (
    Data,
    Settings,
    Training,
    draft_vocabulary,
    feature_scale,
)
from examples.serving import weights as target

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

_EXPORTS = 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9


@click.command()
@click.option("--tokens", default=20_000_000, show_default=True, help="To be seen in all.")
@click.option("--minutes", default=1e9, help="Stop after so long; the next run goes on.")
@click.option("--shards", default=0, help="Use only the first so many.")
@click.option("--draft-vocab", default=8192, show_default=True)
@click.option("--name", default="run", show_default=True, help="Of the folder in the cache.")
@click.option("--eager", is_flag=True, help="Do not compile: slower, but starts at once.")
def main(
    tokens: int, minutes: float, shards: int, draft_vocab: int, name: str, eager: bool
) -> None:
    """Train a head on the generated conversations, or go on with a run of the same name."""
    torch.set_num_threads(2)
    began, place = time.monotonic(), store.folder() / name
    place.mkdir(parents=True, exist_ok=True)
    config, state, _ = target.load(click.echo)
    embedding = state["model.embed_tokens.weight"].float().to(hwcore.current_backend().device())
    training, data, held = _prepare(place, config, embedding, Settings(tokens, shards, draft_vocab))
    _run(training, data, held, place, began, minutes * 60)


def _prepare(
    place: Path, config: Any, embedding: Tensor, settings: Settings, compiled: bool
) -> tuple[Training, Data, Data]:
    checkpoint = place / "checkpoint.pt"
    kept = torch.load(checkpoint, weights_only=True) if checkpoint.exists() else None
    if kept is not None:
        settings = Settings(**kept["settings"])
    paths = store.shards(store.folder())
    settings = Settings(**(asdict(settings) | {"shards": settings.shards or len(paths)}))
    output = embedding.bfloat16()
    data = Data(*labels.of_shards(paths[: settings.shards], output, click.echo))
    held = Data(*labels.of_shards([store.folder() / "held_out.pt"], output, click.echo))
    shape = Shape.of(config, settings.draft_vocab)
    if kept is None:
        draft_ids = draft_vocabulary(data, shape.vocab, shape.draft_vocab)
        scale = feature_scale(data, shape)
    else:
        draft_ids, scale = kept["draft_ids"], kept["scale"]
    training = Training(settings, shape, embedding, draft_ids, scale, compiled)
    if kept is not None:
        training.restore(kept)
    answers = sum(int(one.answer.sum()) for one in data.documents)
    click.echo(
        f"{len(data.documents):,} conversations, {answers:,} answer tokens in {len(data.rows):,} "
        f"rows; at iteration {training.iteration}, {training.done:.1%}"
    )
    return training, data, held


def _run(
    training: Training, data: Data, held: Data, place: Path, began: float, seconds: float
) -> None:
    log = place / "log.jsonl"
    saved = measured = float("-inf")
    sums: list[list[float]] = []
    since = time.monotonic(), training.seen
    while training.done < 1 and time.monotonic() - began < seconds:
        store.wait_while_paused(store.folder())
        before = training.done
        sums.append(training.step(data))
        now = time.monotonic()
        if len(sums) == 25:
            losses = [sum(column) / len(column) for column in zip(*sums, strict=False)]
            rate = (training.seen - since[1]) / (now - since[0])
            left = (training.settings.tokens - training.seen) / rate / 60
            _note(log, training, loss=losses, tokens_per_s=rate, minutes_left=left)
            sums, since = [], (now, training.seen)
        if any(before < part <= training.done for part in _EXPORTS):
            _export(training, place / f"export-{training.seen:010d}")
        if now - measured > 600:
            _note(log, training, **training.agreement(held))
            plot.draw(log, place / "training.png")
            measured = now
        if now - saved > 300:
            store.save(training.state(), place / "checkpoint.pt")
            saved = now
    store.save(training.state(), place / "checkpoint.pt")
    _note(log, training, **training.agreement(held))
    _export(training, place / f"export-{training.seen:010d}")


def _export(training: Training, folder: Path) -> None:
    layout.save(folder, training.shape, training.exported(), training.draft_ids.cpu())


def _note(log: Path, training: Training, **facts: Any) -> None:
    told: dict[str, Any] = {"iteration": training.iteration, "seen": training.seen}
    for name, fact in facts.items():
        told[name] = [round(x, 4) for x in fact] if isinstance(fact, list) else round(fact, 2)
    line = json.dumps(told)
    click.echo(line)
    with log.open("a") as file:
        file.write(line + "\n")


if __name__ == "__main__":
    main()
