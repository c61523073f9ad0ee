"""Let the model answer: ``python -m examples.eagle_head.generate``. Resumes where it was killed."""

from __future__ import annotations

from examples.eagle_head import passive  # noqa: F401 - takes effect by being imported

# isort: split

import itertools
import time
from typing import TYPE_CHECKING, Any

import click
import torch

from examples.eagle_head import prompts, store
from examples.eagle_head.conversation import Conversation, Plan
from examples.serving import weights
from examples.serving.prompts import as_chat

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from torch import Tensor

    from examples.eagle_head.conversation import Tokenizer

    Step = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

ROOM = 768  # the longest conversation: two messages and two answers of 320 tokens
_BATCH = 192
_SEED = 20


def conversations(tokenizer: Tokenizer, taken: set[int], known: set[str]) -> Iterator[Conversation]:
    """Yield the conversations that are to be had, but for those ``taken`` already.

    A message that is in ``known`` already comes out dropped.
    """
    for index in itertools.count():
        if index not in taken:
            one = Conversation(Plan.of(index), tokenizer)
            if not one.plan.own_message:
                one.dropped = one.message in known
                known.add(one.message)
            yield one


def converse(
    step: Step, pending: Iterator[Conversation], bs: int, generator: torch.Generator
) -> Iterator[Conversation | None]:
    """Have conversations, ``bs`` at a time, each in a row of ``step``'s batch.

    Given tokens take a step each, as drawn ones do: that costs a seventh of the time, and there
    is one shape.

    Yields
    ------
    conversation : Conversation or None
        One that is done or dropped; None after each step. Ends when nothing is left.
    """
    rows: list[Conversation | None] = [None] * bs
    at = [0] * bs
    history: Tensor | None = None  # [bs, ROOM, width]
    while True:
        for row in range(bs):
            while rows[row] is None and (one := next(pending, None)) is not None:
                if one.dropped:
                    yield one
                else:
                    rows[row], at[row] = one, 0
        if not any(rows):
            return
        tokens = [one.tokens[at[row]] if one else 0 for row, one in enumerate(rows)]
        temperature = [one.temperature if one else 0.0 for one in rows]
        following, states = step(
            torch.tensor(tokens),
            torch.tensor(at),
            torch.tensor(temperature),
            torch.rand(bs, generator=generator),
        )
        if history is None:
            history = states.new_zeros(bs, ROOM, states.shape[1])
        history[torch.arange(bs), torch.tensor(at)] = states
        drawn = following.tolist()
        for row, one in enumerate(rows):
            if one is None:
                continue
            at[row] += 1
            if at[row] == len(one.tokens):
                one.append(drawn[row])
            if one.done or one.dropped:
                one.states = history[row, : at[row]].clone()
                rows[row], at[row] = None, 0
                yield one
        yield None


def as_document(one: Conversation) -> store.Document:
    """Return what is kept of a conversation."""
    tokens, answer = torch.tensor(one.tokens), torch.tensor(one.answer)
    greedy = one.plan.temperature == 0
    assert one.states is not None
    return store.Document(one.plan.index, tokens, answer, greedy, one.message, one.states)


class Writer:
    """Collects conversations, and writes a shard whenever one is due.

    Parameters
    ----------
    place : Path
    generator : torch.Generator
        Seeded anew at each shard, by its number.
    every_s : float
    """

    def __init__(self, place: Path, generator: torch.Generator, every_s: float) -> None:
        self.place, self.generator, self.every_s = place, generator, every_s
        documents, dropped = store.read(store.shards(place))
        self.taken = {one.index for one in documents} | set(dropped)
        self.known = {one.message for one in documents}
        self.answered = sum(int(one.answer.sum()) for one in documents)
        self._documents: list[store.Document] = []
        self._dropped: list[int] = []
        self._begin()

    def _begin(self) -> None:
        self.number = len(store.shards(self.place))
        self.generator.manual_seed(_SEED + self.number)
        self._began = time.monotonic()

    def add(self, one: Conversation) -> None:
        """Take a conversation that is done or dropped."""
        repeated = one.plan.own_message and one.message in self.known
        if one.dropped or repeated:
            self._dropped.append(one.plan.index)
            return
        self.known.add(one.message)
        document = as_document(one)
        self.answered += int(document.answer.sum())
        self._documents.append(document)

    @property
    def due(self) -> bool:
        """Whether it is time for a shard."""
        return time.monotonic() - self._began >= self.every_s

    def write(self) -> None:
        """Write what was collected."""
        path = self.place / f"shard-{self.number:05d}.pt"
        store.write(path, self._documents, self._dropped)
        self._documents, self._dropped = [], []
        self._begin()


@click.command()
@click.option("--minutes", default=60.0, show_default=True, help="Stop after so long.")
@click.option("--until", default=10**9, help="Stop once there are so many answer tokens in all.")
@click.option("--held-out", is_flag=True, help="Answer the held-out prompts, greedily.")
def main(minutes: float, until: int, held_out: bool) -> None:
    """Write conversations of the model with itself to the cache, shard by shard."""
    torch.set_num_threads(2)
    place = store.folder()
    with torch.inference_mode():
        if held_out:
            _answer_held_out(place)
        else:
            _fill(place, minutes * 60, until)


def _decoder(bs: int, room: int) -> tuple[Step, Any]:
    from examples.eagle_head.decoder import Decoder
    from examples.eagle_head.layout import TAPS

    config, state, tokenizer = weights.load(click.echo)
    return Decoder(config, state, bs, room, TAPS).step, tokenizer


def _fill(place: Path, seconds: float, until: int) -> None:
    step, tokenizer = _decoder(_BATCH, ROOM)
    generator = torch.Generator()
    writer = Writer(place, generator, every_s=150.0)
    before, began = writer.answered, time.monotonic()
    pending = conversations(tokenizer, writer.taken, writer.known)
    for one in converse(step, pending, _BATCH, generator):
        if one is not None:
            writer.add(one)
            continue
        store.wait_while_paused(place)
        elapsed = time.monotonic() - began
        over = elapsed >= seconds or writer.answered >= until
        if writer.due or over:
            writer.write()
            rate = (writer.answered - before) / elapsed
            left = max(0.0, seconds - elapsed)
            click.echo(
                f"{elapsed / 60:.1f} min: {writer.answered:,} answer tokens in {writer.number} "
                f"shards, {rate:.0f} a second; {left / 60:.0f} min left, "
                f"about {writer.answered + rate * left:,.0f} then"
            )
        if over:
            return


def _answer_held_out(place: Path) -> None:
    asked = prompts.held_out()
    step, tokenizer = _decoder(len(asked), ROOM)
    answers = answer_greedily(step, tokenizer, [one.text for one in asked], longest=192)
    store.write(place / "held_out.pt", answers, [])
    click.echo(f"{sum(int(one.answer.sum()) for one in answers):,} tokens")


def answer_greedily(
    step: Step, tokenizer: Tokenizer, messages: Iterable[str], longest: int
) -> list[store.Document]:
    """Return the model's greedy answers to messages, in their order."""
    asked = []
    for index, message in enumerate(messages):
        plan = Plan(index, own_message=False, temperature=0.0, turns=1, longest_answer=longest)
        tokens = tokenizer.encode(as_chat(message))
        given = [False] * len(tokens)
        asked.append(Conversation(plan, tokenizer, tokens, given, message=message))
    done = converse(step, iter(asked), len(asked), torch.Generator())
    documents = [as_document(one) for one in done if one is not None]
    return sorted(documents, key=lambda one: one.index)


if __name__ == "__main__":
    main()
