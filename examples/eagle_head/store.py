"""The conversations on disk: shards that appear whole or not at all."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from examples.serving.weights import cache_folder

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


def folder() -> Path:
    """Return where data and checkpoints are kept."""
    return cache_folder() / "eagle-head"


def wait_while_paused(place: Path) -> None:
    """Return at once, or as soon as there is no file ``PAUSE`` in a folder."""
    while (place / "PAUSE").exists():
        time.sleep(1)


def save(content: Any, path: Path) -> None:
    """Write a file such that a reader, or a run that is killed, never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.draft")
    torch.save(content, draft)
    draft.replace(path)


@dataclass(frozen=True)
class Document:
    """A conversation.

    Attributes
    ----------
    index : int
        Its place in the list of prompts.
    tokens : Tensor, int64, [length]
    answer : Tensor, bool, [length]
        Which of them the model gave as an answer.
    greedy : bool
    message : str
        What the user said first.
    states : Tensor, bfloat16, [length - 1, width]
        The target's features and its last normed state at each token that it was given.
    """

    index: int
    tokens: Tensor
    answer: Tensor
    greedy: bool
    message: str
    states: Tensor


def shards(place: Path) -> list[Path]:
    """Return the shards in a folder, oldest first."""
    return sorted(place.glob("shard-*.pt"))


def write(path: Path, documents: list[Document], dropped: list[int]) -> None:
    """Write a shard; ``dropped`` are the conversations that came to nothing.

    The states, which are most of it, get a file of their own, to be mapped rather than read. It
    is there before the shard is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    labels_path(path).unlink(missing_ok=True)
    states = torch.cat([one.states for one in documents]) if documents else torch.empty(0, 0)
    states.view(torch.int16).numpy().tofile(_states_path(path))
    content = {
        "indices": [one.index for one in documents],
        "dropped": dropped,
        "tokens": [one.tokens.to(torch.uint16) for one in documents],
        "answer": [one.answer for one in documents],
        "greedy": [one.greedy for one in documents],
        "messages": [one.message for one in documents],
        "width": states.shape[1],
    }
    save(content, path)


def read(paths: list[Path]) -> tuple[list[Document], list[int]]:
    """Return the documents of shards, their states mapped, and the indices of what was dropped."""
    documents, dropped = [], []
    for path in paths:
        shard = torch.load(path, weights_only=True)
        dropped += shard["dropped"]
        lengths = [len(tokens) - 1 for tokens in shard["tokens"]]
        if not lengths:
            continue
        size = sum(lengths) * shard["width"]
        states = torch.from_file(str(_states_path(path)), size=size, dtype=torch.bfloat16)
        parts = torch.split(states.view(-1, shard["width"]), lengths)
        fields = ("indices", "tokens", "answer", "greedy", "messages")
        for index, tokens, answer, greedy, message, part in zip(
            *(shard[name] for name in fields), parts, strict=True
        ):
            documents.append(Document(index, tokens.long(), answer, greedy, message, part))
    return documents, dropped


def labels_path(path: Path) -> Path:
    """Return where what is looked up about a shard is kept, until the shard is written anew."""
    return path.with_suffix(".best")


def _states_path(path: Path) -> Path:
    return path.with_suffix(".states")
