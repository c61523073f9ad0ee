"""Train the head: ``python -m examples.eagle_head.train``. Goes on where it was stopped."""

from __future__ import annotations

from examples.eagle_head import passive  # noqa: F401 - takes effect by being imported

# isort: split

import json
import signal
import threading
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

_EXPORT_EVERY = 500_000  # tokens seen
_SAVE_EVERY_S, _MEASURE_EVERY_S = 300.0, 600.0


@click.command()
@click.option("--tokens", type=int, help="To be seen in all; sets the schedule.  [default: 20 M]")
@click.option("--shards", type=int, help="Use only the first so many.  [default: all there are]")
@click.option("--minutes", default=1e9, help="Stop after so long; the next run goes on.")
@click.option("--name", default="run", show_default=True, help="Of the folder in the cache.")
@click.option("--eager", is_flag=True, help="Do not compile: slower, but starts at once.")
def main(tokens: int | None, shards: int | None, minutes: float, name: str, eager: bool) -> None:
    """Train a head on the generated conversations, or go on with a run of the same name.

    A run that goes on keeps its length and data unless told otherwise: fewer --tokens bring the
    end of the schedule nearer. SIGTERM stops it after the current step.
    """
    torch.set_num_threads(2)
    began, place = time.monotonic(), store.folder() / name
    place.mkdir(parents=True, exist_ok=True)
    config, state, _ = target.load(click.echo)
    embedding = state["model.embed_tokens.weight"].float().to(hwcore.current_backend().device())
    told = {"tokens": tokens, "shards": shards}
    changed = {name: value for name, value in told.items() if value is not None}
    training, data, held = _prepare(place, config, embedding, changed, not eager)
    _run(training, data, held, place, began + minutes * 60)


def _prepare(
    place: Path, config: Any, embedding: Tensor, changed: dict[str, Any], compiled: bool
) -> tuple[Training, Data, Data]:
    checkpoint = place / "checkpoint.pt"
    kept = torch.load(checkpoint, weights_only=True) if checkpoint.exists() else None
    settings = Settings(**((kept["settings"] if kept else {}) | changed))
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


def _run(training: Training, data: Data, held: Data, place: Path, until: float) -> None:
    log = place / "log.jsonl"
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    losses: list[list[float]] = []
    since = saved = measured = time.monotonic()
    seen = training.seen
    while training.done < 1 and time.monotonic() < until and not stopped.is_set():
        store.wait_while_paused(store.folder())
        before = training.seen
        losses.append(training.step(data))
        now = time.monotonic()
        if len(losses) == 25:
            loss = [sum(column) / len(column) for column in zip(*losses, strict=False)]
            rate = (training.seen - seen) / (now - since)
            left = (training.settings.tokens - training.seen) / rate / 60
            _note(log, training, loss=loss, tokens_per_s=rate, minutes_left=left)
            losses, since, seen = [], now, training.seen
        if before // _EXPORT_EVERY < training.seen // _EXPORT_EVERY:
            _export(training, place)
        if now - measured > _MEASURE_EVERY_S:
            _measure(training, held, place)
            measured = now
        if now - saved > _SAVE_EVERY_S:
            store.save(training.state(), place / "checkpoint.pt")
            saved = now
    store.save(training.state(), place / "checkpoint.pt")
    if not stopped.is_set():
        _measure(training, held, place)
        _export(training, place)


def _measure(training: Training, held: Data, place: Path) -> None:
    _note(place / "log.jsonl", training, **training.agreement(held))
    plot.draw(place / "log.jsonl", place / "training.png")


def _export(training: Training, place: Path) -> None:
    folder = place / f"export-{training.seen:010d}"
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
