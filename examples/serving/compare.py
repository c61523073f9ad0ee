"""Every way of decoding on the same prompts, in interleaved rounds."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from examples.serving.decode import Answer, decode
from examples.serving.step import Sampling

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from examples.serving.drafters import Drafter
    from examples.serving.model import Model


PLAIN = "plain"


@dataclass
class Outcome:
    """Every run of one prompt at one temperature.

    Attributes
    ----------
    name : str
    prompt : list of int
    temperature : float
    runs : dict of str to list of Answer
        By way of decoding, ``PLAIN`` among them; those of one place in the lists are of the same
        round.
    """

    name: str
    prompt: list[int]
    temperature: float = 0.0
    runs: dict[str, list[Answer]] = field(default_factory=dict)

    @property
    def drafted(self) -> list[str]:
        """The ways with drafts."""
        return [way for way in self.runs if way != PLAIN]

    def tokens_per_s(self, way: str) -> float:
        """Return the median over the rounds."""
        return statistics.median(answer.tokens_per_s for answer in self.runs[way])

    def ratio(self, way: str) -> float:
        """Return the median of :meth:`ratios`: what disturbs a round hits both sides."""
        return statistics.median(self.ratios(way))

    def ratios(self, way: str) -> list[float]:
        """Return each round's speed over plain decoding's.

        Where they lie far apart, something disturbed the machine. Tokens count, not answers: what
        is sampled may differ in length, though here it does not.
        """
        pairs = zip(self.runs[PLAIN], self.runs[way], strict=True)
        return [run.tokens_per_s / plain.tokens_per_s for plain, run in pairs]

    def ratio_with_prefill(self, way: str) -> float:
        """Return the same for whole answers, the prefill included, which no draft can help."""
        pairs = zip(self.runs[PLAIN], self.runs[way], strict=True)
        return statistics.median(
            (plain.prefill_s + plain.decode_s) / (run.prefill_s + run.decode_s)
            for plain, run in pairs
        )

    def accept_length(self, way: str) -> float:
        """Return the mean tokens a step, steps without drafts included."""
        return statistics.mean(answer.accept_length for answer in self.runs[way])

    def first_difference(self) -> int | None:
        """Return where any run first parts from the first plain one, or None: nowhere.

        Of greedy runs; sampled ones are not the same, they are distributed alike.
        """
        reference = self.runs[PLAIN][0].tokens
        places = [
            next(i for i, (a, b) in enumerate(zip(reference, run.tokens, strict=True)) if a != b)
            for runs in self.runs.values()
            for run in runs
            if not self.temperature and run.tokens != reference
        ]
        return min(places, default=None)


def compare(
    model: Model,
    prompts: Mapping[str, Sequence[int]],
    count: int,
    drafters: Mapping[str, Drafter],
    rounds: int,
    temperature: float = 0.0,
    tick: Callable[[], object] = lambda: None,
) -> list[Outcome]:
    """Decode ``count`` tokens of every prompt, plainly and with each drafter, ``rounds`` times.

    ``tick`` is called after each round of a prompt.
    """
    ways: dict[str, Drafter | None] = {PLAIN: None, **drafters}
    outcomes = [
        Outcome(name, list(prompt), temperature, {way: [] for way in ways})
        for name, prompt in prompts.items()
    ]
    for turn in range(rounds):
        for place, outcome in enumerate(outcomes):
            # Each way goes first in turn, so that none always finds the caches warm.
            order = list(ways)
            first = (turn + place) % len(order)
            for way in order[first:] + order[:first]:
                sampling = Sampling(temperature, seed=turn)
                answer = decode(model, outcome.prompt, count, ways[way], sampling)
                outcome.runs[way].append(answer)
            tick()
    return outcomes


def top_two(model: Model, prompt: Sequence[int], tokens: Sequence[int]) -> list[tuple[int, float]]:
    """Return the two likeliest next tokens after a prompt and tokens, each with its logit.

    All in one forward: the logits may differ a little from those that decoding met.
    """
    model.length = 0
    with torch.inference_mode():
        text = torch.tensor([[*prompt, *tokens]], device=model.device)
        best = model.forward(text, last=True)[0][0, -1].topk(2)
    return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
