"""Decode the held-out prompts with the head: ``python -m examples.eagle_head.evaluate``."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click
import torch

import hwcore
from examples.eagle_head import plot, prompts
from examples.eagle_head.head import EagleHead
from examples.serving import weights as target
from examples.serving.decode import decode
from examples.serving.drafters import Eagle
from examples.serving.eagle import EagleDrafter
from examples.serving.llama import Llama
from examples.serving.model import Model
from examples.serving.prompts import as_chat

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from examples.serving.decode import Answer

SPEC_STEPS = 4
WAYS = {"chain": (1, 5), "tree": (4, 16)}
"""Branches at each node, and nodes."""

_CAPACITY, _END = 1024, 2


def accept_length(answers: Sequence[Answer]) -> float:
    """Return the tokens that a round brought, the target's own included.

    The first token is none of it: it came with the prompt.
    """
    rounds = sum(len(one.accepted) for one in answers)
    return sum(len(one.tokens) - 1 for one in answers) / max(1, rounds)


def interval(answers: Sequence[Answer], draws: int = 2000) -> tuple[float, float]:
    """Return the 95 % interval of the accept length, from resampled prompts."""
    chance = random.Random(0)
    found = sorted(accept_length(chance.choices(answers, k=len(answers))) for _ in range(draws))
    return found[draws // 40], found[-draws // 40]


class Result(NamedTuple):
    """A prompt's answers, by way of decoding."""

    asked: prompts.Asked
    plain: Answer
    drafted: dict[str, Answer]


def run(
    model: Model,
    head: EagleHead,
    encode: Callable[[str], list[int]],
    asked: Sequence[prompts.Asked],
    longest: int,
    plain: dict[str, Answer],
) -> Iterator[Result]:
    """Yield each prompt's answers; the plain ones are kept in ``plain`` and made once."""
    drafters = {}
    for way, (topk, size) in WAYS.items():
        runner = EagleDrafter(head, 1 + model.slots.shape[1], topk, SPEC_STEPS)
        drafters[way] = Eagle(runner, model, (1, size))
    for one in asked:
        ids = encode(as_chat(one.text))
        if one.text not in plain:
            plain[one.text] = decode(model, ids, longest, end=_END)
        drafted = {
            way: decode(model, ids, longest, drafter, end=_END) for way, drafter in drafters.items()
        }
        yield Result(one, plain[one.text], drafted)


def report(results: Sequence[Result]) -> list[dict[str, object]]:
    """Return a line of figures for all prompts, and for each group and kind of task."""
    groups: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        groups["all"].append(result)
        groups[f"group {result.asked.group}"].append(result)
    for result in results:
        groups[f"task {result.asked.task}"].append(result)
    lines = []
    for name, members in groups.items():
        line: dict[str, object] = {"prompts": name, "count": len(members)}
        speed = _speed([one.plain for one in members])
        for way in WAYS:
            answers = [one.drafted[way] for one in members]
            low, high = interval(answers)
            same = sum(one.drafted[way].tokens == one.plain.tokens for one in members)
            line[way] = {
                "accept_length": round(accept_length(answers), 3),
                "interval": [round(low, 2), round(high, 2)],
                "identical": same,
                "over_plain": round(_speed(answers) / speed, 3),
                "drafting": round(_share(answers), 3),
            }
        lines.append(line)
    return lines


def _speed(answers: Sequence[Answer]) -> float:
    return sum(len(one.tokens) - 1 for one in answers) / max(1e-9, sum(a.decode_s for a in answers))


def _share(answers: Sequence[Answer]) -> float:
    return sum(one.draft_s for one in answers) / max(1e-9, sum(one.decode_s for one in answers))


@click.command()
@click.argument("folders", nargs=-1, type=click.Path(exists=True, path_type=Path))
@click.option("--tokens", default=128, show_default=True, help="Of an answer, at most.")
@click.option("--every", default=1, show_default=True, help="Take every so many-th prompt.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("eagle-head"))
def main(folders: tuple[Path, ...], tokens: int, every: int, out: Path) -> None:
    """Decode the held-out prompts in all ways, with the head in each of the FOLDERS.

    Figures go to OUT/evaluation.jsonl, and their course over training to OUT/accept_length.png.
    """
    torch.set_num_threads(2)
    out.mkdir(parents=True, exist_ok=True)
    config, state, tokenizer = target.load(click.echo)
    device = hwcore.current_backend().device()
    llama = Llama(config, state, device, _CAPACITY)
    asked = prompts.held_out()[::every]
    plain: dict[str, Answer] = {}
    for folder in folders:
        head = EagleHead.load(folder, llama.embedding, _CAPACITY)
        model = Model(llama, _CAPACITY, taps=head.shape.taps)
        results = list(run(model, head, tokenizer.encode, asked, tokens, plain))
        with (out / "evaluation.jsonl").open("a") as file:
            for line in report(results):
                text = json.dumps({"head": folder.name, "tokens": tokens} | line)
                click.echo(text)
                file.write(text + "\n")
    plot.accept_lengths(out / "evaluation.jsonl", out / "accept_length.png")


if __name__ == "__main__":
    main()
