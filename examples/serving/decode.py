"""Greedy decoding, plainly and with prompt-lookup tree speculation. Same model, same tokens."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from examples.serving.lookup import Lookup
from examples.serving.sizing import Sizer
from examples.serving.step import plain_step, tree_step

if TYPE_CHECKING:
    from collections.abc import Mapping

    from examples.serving.model import Model


@dataclass
class Answer:
    """What one decoding run gave.

    Attributes
    ----------
    tokens : list of int
        Exactly as many as were asked for; the end-of-text token does not stop the run.
    prefill_s, decode_s : float
        Seconds up to the first token, and from there to the end of the last step, which with
        speculation may give more tokens than are kept.
    sizes, accepted : list of int
        Tree size of each step after the prefill, and tokens that it emitted, bonus included.
    """

    tokens: list[int]
    prefill_s: float = 0.0
    decode_s: float = 0.0
    sizes: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second after the first one, which the prefill gave."""
        return (len(self.tokens) - 1) / self.decode_s

    @property
    def accept_length(self) -> float:
        """Mean tokens a step."""
        return sum(self.accepted) / len(self.accepted)


def decode(
    model: Model, prompt: list[int], count: int, costs: Mapping[int, float] | None = None
) -> Answer:
    """Decode ``count`` tokens greedily.

    Parameters
    ----------
    model : Model
        Its cache is emptied first.
    prompt : list of int
        Token ids.
    count : int
        Tokens to decode, at least 2.
    costs : mapping of int to float, optional
        Seconds of a step by tree size (see :mod:`examples.serving.sizing`): decode with
        speculation. Default: plainly.
    """
    model.length = 0
    with torch.inference_mode():
        start = time.perf_counter()
        tokens = [plain_step(model, prompt)]
        speculation = None if costs is None else Speculation(model, prompt + tokens, costs)
        began = time.perf_counter()
        answer = Answer(tokens, prefill_s=began - start)
        while len(tokens) < count:
            if speculation is None:
                size, emitted = 1, [plain_step(model, tokens[-1:])]
            else:
                size, emitted = speculation.step()
            tokens += emitted
            answer.sizes.append(size)
            answer.accepted.append(len(emitted))
        answer.decode_s = time.perf_counter() - began
    del tokens[count:]
    return answer


class Speculation:
    """One text being decoded with prompt-lookup trees: draft, choose a size, verify, learn."""

    def __init__(self, model: Model, text: list[int], costs: Mapping[int, float]) -> None:
        self._model = model
        self._lookup = Lookup(text)
        self._sizer = Sizer(costs)

    def step(self) -> tuple[int, list[int]]:
        """Decode at least one more token; return the size of the tree and the tokens."""
        text = self._lookup.tokens
        draft = self._lookup.draft(self._sizer.largest)
        size = self._sizer.choose(draft)
        self._sizer.watch(draft, len(text))
        if size == 1:
            tokens = [plain_step(self._model, text[-1:])]
        else:
            # Only sizes of known cost are run: a smaller draft is filled up with padding nodes.
            padding = max(size - len(draft), 0)
            nodes = draft.tokens[:size] + [text[-1]] * padding
            parents = draft.parents[:size] + [-1] * padding
            tokens = tree_step(self._model, nodes, parents, max(draft.depths[:size]))
        self._lookup.extend(tokens)
        self._sizer.learn(text)
        return size, tokens
