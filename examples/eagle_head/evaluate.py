"""Decode the held-out prompts with the head: ``python -m examples.eagle_head.evaluate``."""

from __future__ import annotations

import json
import random
import statistics
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click
import torch

import hwcore
from examples.eagle_head import plot, prompts
from examples.eagle_head.conversation import END
from examples.eagle_head.head import EagleHead
from examples.serving import weights as target
from examples.serving.compare import PLAIN
from examples.serving.decode import decode
from examples.serving.drafters import Eagle, calibrated
from examples.serving.eagle import HeadRunner
from examples.serving.llama import Llama
from examples.serving.model import Model
from examples.serving.prompts import as_chat

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from examples.serving.decode import Answer
    from examples.serving.drafters import Drafter

SPEC_STEPS = 4
WAYS = {"chain": (1, 5), "tree": (4, 16)}
"""Branches at each node, and nodes."""

_CAPACITY = 1024
_CONTEXT = 128  # tokens in the cache while costs are measured: prompt and half an answer


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


def fixed(model: Model, head: EagleHead) -> dict[str, Drafter]:
    """Return drafters of ``WAYS``, whose trees are of one size: what accept lengths are told of."""
    drafters: dict[str, Drafter] = {}
    for way, (topk, size) in WAYS.items():
        runner = HeadRunner(head, model.num_slots, topk, SPEC_STEPS)
        drafters[way] = Eagle(runner, model, (1, size))
    return drafters


def run(
    model: Model,
    encode: Callable[[str], list[int]],
    asked: Sequence[prompts.Asked],
    longest: int,
    drafters: Mapping[str, Drafter],
) -> Iterator[Result]:
    """Yield each prompt's answers; the ways take turns in going first."""
    ways: dict[str, Drafter | None] = {PLAIN: None, **drafters}
    for turn, one in enumerate(asked):
        ids = encode(as_chat(one.text))
        first = turn % len(ways)
        order = list(ways)[first:] + list(ways)[:first]
        answers = {way: decode(model, ids, longest, ways[way], end=END) for way in order}
        yield Result(one, answers[PLAIN], {way: answers[way] for way in drafters})


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
        for way in results[0].drafted:
            answers = [one.drafted[way] for one in members]
            low, high = interval(answers)
            same = sum(one.drafted[way].tokens == one.plain.tokens for one in members)
            line[way] = {
                "accept_length": round(accept_length(answers), 3),
                "interval": [round(low, 2), round(high, 2)],
                "identical": same,
                "over_plain": round(statistics.median(_ratios(members, way)), 3),
                "over_plain_in_all": round(_speed(answers) / speed, 3),
                "drafting": round(_share(answers), 3),
                "plain_steps": round(_plain_steps(answers), 3),
            }
        lines.append(line)
    return lines


def _speed(answers: Sequence[Answer]) -> float:
    return sum(len(one.tokens) - 1 for one in answers) / max(1e-9, sum(a.decode_s for a in answers))


def _ratios(results: Sequence[Result], way: str) -> list[float]:
    """Return each prompt's speed over plain decoding's, whatever disturbed the others."""
    return [_speed([one.drafted[way]]) / _speed([one.plain]) for one in results]


def _share(answers: Sequence[Answer]) -> float:
    return sum(one.draft_s for one in answers) / max(1e-9, sum(one.decode_s for one in answers))


def _plain_steps(answers: Sequence[Answer]) -> float:
    steps = [size for one in answers for size in one.sizes]
    return steps.count(1) / max(1, len(steps))


@click.command()
@click.argument("folders", nargs=-1, type=click.Path(exists=True, path_type=Path))
@click.option("--tokens", default=128, show_default=True, help="Of an answer, at most.")
@click.option("--every", default=1, show_default=True, help="Take every so many-th prompt.")
@click.option(
    "--speed", is_flag=True, help="With prompt lookup, and sizes that calibration chooses."
)
@click.option("--out", type=click.Path(path_type=Path), default=Path("eagle-head"))
def main(folders: tuple[Path, ...], tokens: int, every: int, speed: bool, out: Path) -> None:
    """Decode the held-out prompts in all ways, with the head in each of the FOLDERS.

    "over_plain" is the median over the prompts of the ratio of tokens a second, "over_plain_in_all"
    the ratio of all tokens over all the time, which one disturbance spoils. Figures are appended to
    OUT/evaluation.jsonl; OUT/accept_length.png is their course over training, of all that were
    evaluated as these.
    """
    torch.set_num_threads(2)
    out.mkdir(parents=True, exist_ok=True)
    config, state, tokenizer = target.load(click.echo)
    device = hwcore.current_backend().device()
    llama = Llama(config, state, device, _CAPACITY)
    asked = prompts.held_out()[::every]
    for folder in folders:
        head = EagleHead.load(folder, llama.embedding, _CAPACITY)
        model = Model(llama, _CAPACITY, taps=head.shape.taps)
        drafters = calibrated(model, head, _CONTEXT, 9)[0] if speed else fixed(model, head)
        results = list(run(model, tokenizer.encode, asked, tokens, drafters))
        with (out / "evaluation.jsonl").open("a") as file:
            for line in report(results):
                text = json.dumps({"head": folder.name, "tokens": tokens, "every": every} | line)
                click.echo(text)
                file.write(text + "\n")
    plot.accept_lengths(out / "evaluation.jsonl", out / "accept_length.png", tokens, every)


if __name__ == "__main__":
    main()
