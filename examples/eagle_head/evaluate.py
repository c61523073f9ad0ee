"""Decode the held-out prompts with the head: ``python -m examples.eagle_head.evaluate``."""

from __future__ import annotations

import json
import random
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click
import torch

import hwcore
from examples.eagle_head import plot, prompts
from examples.eagle_head.drafter import Drafter
from examples.eagle_head.head import EagleHead
from examples.serving import weights as target
from examples.serving.llama import Llama
from examples.serving.prompts import as_chat
from hwcore.speculative import TreeMaskMode, build_tree, commit, verify_greedy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from examples.eagle_head.drafter import Draft

    Propose = Callable[[Drafter, int], Draft]

SPEC_STEPS, TOPK, SIZE = 4, 4, 16
_END = 2
WAYS: dict[str, Propose] = {
    "chain": lambda drafter, root: drafter.chain(root, SPEC_STEPS),
    "tree": lambda drafter, root: drafter.tree(root, SPEC_STEPS, TOPK, SIZE),
}


class Decoded(NamedTuple):
    """An answer, in how many rounds it came, and how long drafting and all of it took."""

    tokens: list[int]
    rounds: int
    seconds: float
    drafting: float


class Text:
    """A target and its KV entries for a single text.

    Parameters
    ----------
    llama : Llama
    capacity : int
    taps : tuple of int
    """

    def __init__(self, llama: Llama, capacity: int, taps: tuple[int, ...]) -> None:
        self.llama, self.taps, self.length = llama, taps, 0
        self._kv = llama.new_kv(1 + capacity)
        self._slots = torch.arange(1, 1 + capacity, device=llama.device).unsqueeze(0)

    def append(self, tokens: Sequence[int]) -> tuple[int, Tensor]:
        """Append tokens; return the one that follows, and the features of these."""
        batch, lens = self._tensor([list(tokens)]), self._tensor([self.length])
        self.length += len(tokens)
        logits, features = self.llama.forward_features(
            self._kv, batch, lens, self._slots[:, : self.length], last=True, taps=self.taps
        )
        return int(logits[0, -1].argmax()), features

    def verify(self, draft: Draft) -> tuple[list[int], Tensor]:
        """Append the part of a tree that the target agrees with.

        Returns
        -------
        tokens : list of int
            The accepted drafts and the target's own next token.
        features : Tensor, float, [1, len(tokens), taps * hidden]
            Of the token before each.
        """
        size, lens = len(draft.tokens), self._tensor([self.length])
        tree = build_tree(
            self._tensor([draft.tokens]),
            self._tensor([draft.parents]),
            lens,
            spec_steps=SPEC_STEPS,
            tree_mask_mode=TreeMaskMode.QLEN_ONLY,
        )
        slots = self._slots[:, : self.length + size]
        logits, features = self.llama.forward_features(
            self._kv,
            tree.draft_tokens,
            lens,
            slots,
            positions=tree.positions.unsqueeze(0),
            tree_mask=tree.tree_mask,
            taps=self.taps,
        )
        verified = verify_greedy(tree, logits)
        committed = commit(tree, verified, lens, slots[:, self.length :])
        assert committed.kv_src is not None
        assert committed.kv_dst is not None
        held = self._kv.index_select(1, committed.kv_src[0])
        self._kv.index_copy_(1, committed.kv_dst[0], held)
        tokens = [token for token in committed.accept_tokens[0].tolist() if token >= 0]
        self.length += len(tokens)
        path = verified.accept_index[0, : len(tokens)].long()
        return tokens, features[:, path]

    def _tensor(self, values: list[int] | list[list[int]]) -> Tensor:
        return torch.tensor(values, device=self.llama.device)


def decode_plain(llama: Llama, prompt: Sequence[int], longest: int) -> Decoded:
    """Return the target's own greedy answer."""
    text = Text(llama, len(prompt) + longest, ())
    token, _ = text.append(prompt)
    tokens, began = [token], time.perf_counter()
    while len(tokens) < longest and tokens[-1] != _END:
        tokens.append(text.append(tokens[-1:])[0])
    return Decoded(tokens, len(tokens) - 1, time.perf_counter() - began, 0.0)


def decode(
    llama: Llama, head: EagleHead, propose: Propose, prompt: Sequence[int], longest: int
) -> Decoded:
    """Return the greedy answer, drafted by the head."""
    capacity = len(prompt) + longest + SIZE + SPEC_STEPS * TOPK
    text, drafter = Text(llama, capacity, head.shape.taps), Drafter(head, capacity)
    token, features = text.append(prompt)
    tokens, rounds, drafting = [token], 0, 0.0
    new = [*prompt[1:], token]
    began = time.perf_counter()
    while len(tokens) < longest and tokens[-1] != _END:
        started = time.perf_counter()
        drafter.extend(torch.tensor([new], device=llama.device), features)
        draft = propose(drafter, tokens[-1])
        drafting += time.perf_counter() - started
        new, features = text.verify(draft)
        tokens, rounds = tokens + new, rounds + 1
    spent = time.perf_counter() - began
    if _END in tokens:
        tokens = tokens[: tokens.index(_END) + 1]
    return Decoded(tokens[:longest], rounds, spent, drafting)


def accept_length(answers: Sequence[Decoded]) -> float:
    """Return the tokens that a round brought, the target's own included.

    The first token is none of it: it came with the prompt.
    """
    return sum(len(one.tokens) - 1 for one in answers) / max(1, sum(one.rounds for one in answers))


def interval(answers: Sequence[Decoded], draws: int = 2000) -> tuple[float, float]:
    """Return the 95 % interval of the accept length, from resampled prompts."""
    chance = random.Random(0)
    found = sorted(accept_length(chance.choices(answers, k=len(answers))) for _ in range(draws))
    return found[draws // 40], found[-draws // 40]


class Result(NamedTuple):
    """A prompt's answers, by way of decoding."""

    asked: prompts.Asked
    plain: Decoded
    drafted: dict[str, Decoded]


def run(
    llama: Llama,
    head: EagleHead,
    encode: Callable[[str], list[int]],
    asked: Sequence[prompts.Asked],
    longest: int,
    plain: dict[str, Decoded],
) -> Iterator[Result]:
    """Yield each prompt's answers; the plain ones are kept in ``plain`` and made once."""
    for one in asked:
        ids = encode(as_chat(one.text))
        if one.text not in plain:
            plain[one.text] = decode_plain(llama, ids, longest)
        drafted = {way: decode(llama, head, propose, ids, longest) for way, propose in WAYS.items()}
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


def _speed(answers: Sequence[Decoded]) -> float:
    return sum(len(one.tokens) - 1 for one in answers) / max(1e-9, sum(a.seconds for a in answers))


def _share(answers: Sequence[Decoded]) -> float:
    return sum(one.drafting for one in answers) / max(1e-9, sum(one.seconds for one in answers))


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
    llama = Llama(config, state, device, 1024)
    embedding = state["model.embed_tokens.weight"].to(device)
    asked = prompts.held_out()[::every]
    plain: dict[str, Decoded] = {}
    for folder in folders:
        head = EagleHead.load(folder, embedding, 1024)
        with torch.inference_mode():
            results = list(run(llama, head, tokenizer.encode, asked, tokens, plain))
        with (out / "evaluation.jsonl").open("a") as file:
            for line in report(results):
                text = json.dumps({"head": folder.name, "tokens": tokens} | line)
                click.echo(text)
                file.write(text + "\n")
    plot.accept_lengths(out / "evaluation.jsonl", out / "accept_length.png")


if __name__ == "__main__":
    main()
