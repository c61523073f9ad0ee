"""Plain and speculative decoding of the same prompts, in interleaved rounds."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from examples.serving.decode import Answer, decode

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from examples.serving.model import Model


@dataclass
class Outcome:
    """Every run of one prompt: ``plain[i]`` and ``speculative[i]`` are of the same round."""

    name: str
    prompt: list[int]
    plain: list[Answer] = field(default_factory=list)
    speculative: list[Answer] = field(default_factory=list)

    @property
    def plain_tokens_per_s(self) -> float:
        """Median over the rounds."""
        return statistics.median(answer.tokens_per_s for answer in self.plain)

    @property
    def speculative_tokens_per_s(self) -> float:
        """Median over the rounds."""
        return statistics.median(answer.tokens_per_s for answer in self.speculative)

    @property
    def ratio(self) -> float:
        """Median of the rounds' ratios of decoding speed: what disturbs a round hits both sides."""
        return statistics.median(self.ratios)

    @property
    def ratios(self) -> list[float]:
        """The ratio of each round; where they lie far apart, something disturbed the machine."""
        return self._ratios(lambda run: run.decode_s)

    @property
    def ratio_with_prefill(self) -> float:
        """The same for the whole answer, the prefill included, which speculation cannot help."""
        return statistics.median(self._ratios(lambda run: run.prefill_s + run.decode_s))

    def _ratios(self, seconds: Callable[[Answer], float]) -> list[float]:
        pairs = zip(self.plain, self.speculative, strict=True)
        return [seconds(plain) / seconds(speculative) for plain, speculative in pairs]

    @property
    def accept_length(self) -> float:
        """Mean tokens a step of the speculative runs, plain steps included."""
        return statistics.mean(answer.accept_length for answer in self.speculative)

    def first_difference(self) -> int | None:
        """Return where any run first parts from the first plain one, or None: nowhere."""
        reference = self.plain[0].tokens
        places = [
            next(i for i, (a, b) in enumerate(zip(reference, run.tokens, strict=True)) if a != b)
            for run in (*self.plain, *self.speculative)
            if run.tokens != reference
        ]
        return min(places, default=None)


def compare(
    model: Model,
    prompts: Mapping[str, Sequence[int]],
    count: int,
    rounds: int,
    costs: Mapping[int, float],
    tick: Callable[[], object] = lambda: None,
) -> list[Outcome]:
    """Decode ``count`` tokens of every prompt both ways, ``rounds`` times.

    ``costs`` are the seconds of a step by tree size; ``tick`` is called after each pair of runs.
    """
    outcomes = [Outcome(name, list(prompt)) for name, prompt in prompts.items()]
    for turn in range(rounds):
        for outcome in outcomes:
            ways = [(outcome.plain, None), (outcome.speculative, costs)]
            # Each way goes first in turn, so that neither always finds the caches warm.
            for runs, tree_costs in ways if turn % 2 == 0 else reversed(ways):
                runs.append(decode(model, outcome.prompt, count, tree_costs))
            tick()
    return outcomes


def top_two(model: Model, prompt: Sequence[int], tokens: Sequence[int]) -> list[tuple[int, float]]:
    """Return the two likeliest next tokens after a prompt and tokens, each with its logit.

    All in one forward: the logits may differ a little from those that decoding met.
    """
    model.length = 0
    with torch.inference_mode():
        text = torch.tensor([[*prompt, *tokens]], device=model.device)
        best = model.forward(text, last=True)[0, -1].topk(2)
    return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
