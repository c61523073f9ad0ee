"""Decoding one text, plainly or with drafts; greedily the tokens are the same."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from examples.serving.step import GREEDY, plain_step, tree_step

if TYPE_CHECKING:
    from examples.serving.drafters import Drafter, Proposal
    from examples.serving.model import Model
    from examples.serving.step import Emitted, Sampling


@dataclass
class Answer:
    """What one decoding run gave.

    Attributes
    ----------
    tokens : list of int
        As many as were asked for, or up to the token that was to end it.
    prefill_s, decode_s : float
        Seconds up to the first token, and from there to the end of the last step, which with
        drafts may give more tokens than are kept. What a drafter makes of the prompt is in the
        second.
    sizes, accepted : list of int
        Tree size of each step after the prefill, and tokens that it emitted, bonus included.
    longest : (Proposal, Emitted) or None
        Of the trees that branch, the one whose accepted path was the longest.
    draft_s : float
        Seconds of ``decode_s`` that went into drafting.
    """

    tokens: list[int]
    prefill_s: float = 0.0
    decode_s: float = 0.0
    sizes: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    longest: tuple[Proposal, Emitted] | None = None
    draft_s: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second after the first one, which the prefill gave."""
        return (len(self.tokens) - 1) / self.decode_s

    @property
    def accept_length(self) -> float:
        """Mean tokens a step."""
        return sum(self.accepted) / len(self.accepted)


def decode(
    model: Model,
    prompt: list[int],
    count: int,
    drafter: Drafter | None = None,
    sampling: Sampling = GREEDY,
    end: int | None = None,
) -> Answer:
    """Decode ``count`` tokens.

    Parameters
    ----------
    model : Model
        Its cache is emptied first.
    prompt : list of int
        Token ids.
    count : int
        Tokens to decode, at least 2.
    drafter : Drafter, optional
        Default: decode plainly.
    sampling : Sampling
    end : int, optional
        A token that ends the run; it is kept. Default: none does.
    """
    model.length = 0
    with torch.inference_mode():
        start = time.perf_counter()
        emitted = plain_step(model, prompt, sampling)
        tokens = list(emitted.tokens)
        began = time.perf_counter()
        if drafter is not None:
            drafter.begin(prompt, emitted)
        answer = Answer(tokens, prefill_s=began - start)
        verified: list[tuple[Proposal, Emitted]] = []
        while len(tokens) < count and end not in emitted.tokens:
            drafting = time.perf_counter()
            proposal = None if drafter is None else drafter.draft()
            answer.draft_s += time.perf_counter() - drafting
            if proposal is None:
                emitted = plain_step(model, tokens[-1:], sampling)
            else:
                emitted = tree_step(
                    model, proposal.nodes, proposal.parents, proposal.spec_steps, sampling
                )
                verified.append((proposal, emitted))
            if drafter is not None:
                drafter.learn(emitted)
            tokens += emitted.tokens
            answer.sizes.append(1 if proposal is None else proposal.nodes.shape[1])
            answer.accepted.append(len(emitted.tokens))
        answer.decode_s = time.perf_counter() - began
        branching = (one for one in verified if one[0].branches)
        answer.longest = max(branching, key=lambda one: len(one[1].path), default=None)
    del tokens[count:]
    if end in tokens:
        del tokens[tokens.index(end) + 1 :]
    return answer
