"""What proposes the next tree of one text: earlier matches looked up, or an EAGLE head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from examples.serving.lookup import Lookup
from examples.serving.sizing import Sizer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from examples.serving.eagle import EagleDrafter, Seed
    from examples.serving.model import Model
    from examples.serving.step import Emitted


@dataclass
class Proposal:
    """A tree to verify, as :func:`hwcore.speculative.build_tree` takes it, of one request."""

    nodes: Tensor  # int64, [1, n]
    parents: Tensor  # int64, [1, n]
    spec_steps: int


class Drafter(Protocol):
    """Proposes trees for one text after the other."""

    def begin(self, prompt: list[int], emitted: Emitted) -> None:
        """Turn to a text of which the prefill gave the first token."""

    def draft(self) -> Proposal | None:
        """Return a tree whose root is the newest token; None for a plain step."""

    def learn(self, emitted: Emitted) -> None:
        """Take what the step gave."""


class PromptLookup:
    """Looks earlier matches of the text's end up, and takes as much of the tree as should pay.

    Parameters
    ----------
    costs : mapping of int to float
        Seconds of a step by tree size; see :mod:`examples.serving.sizing`.
    device : torch.device
    """

    def __init__(self, costs: Mapping[int, float], device: torch.device) -> None:
        self._costs, self._device = costs, device

    def begin(self, prompt: list[int], emitted: Emitted) -> None:  # noqa: D102
        self._lookup, self._sizer = Lookup(prompt + emitted.tokens), Sizer(self._costs)

    def draft(self) -> Proposal | None:  # noqa: D102
        text = self._lookup.tokens
        draft = self._lookup.draft(self._sizer.largest)
        size = self._sizer.choose(draft)
        self._sizer.watch(draft, len(text))
        if size == 1:
            return None
        # Only sizes of known cost are run: a smaller draft is filled up with padding nodes.
        padding = max(size - len(draft), 0)
        nodes = draft.tokens[:size] + [text[-1]] * padding
        parents = draft.parents[:size] + [-1] * padding
        both = torch.tensor([nodes, parents], device=self._device)
        return Proposal(both[:1], both[1:], max(draft.depths[:size]))

    def learn(self, emitted: Emitted) -> None:  # noqa: D102
        self._lookup.extend(emitted.tokens)
        self._sizer.learn(self._lookup.tokens)


class Eagle:
    """Lets an EAGLE head run ahead of the model.

    Parameters
    ----------
    drafter : EagleDrafter
    model : Model
        Whose slots it goes by.
    num_draft_tokens : int
    """

    def __init__(self, drafter: EagleDrafter, model: Model, num_draft_tokens: int) -> None:
        self._drafter, self._model, self._size = drafter, model, num_draft_tokens

    def begin(self, prompt: list[int], emitted: Emitted) -> None:  # noqa: D102
        self._entries = 0
        self._extend(prompt[1:] + emitted.tokens, emitted.features)

    def draft(self) -> Proposal | None:  # noqa: D102
        roots = torch.tensor([self._root], device=self._model.device)
        lens = torch.tensor([self._entries], device=self._model.device)
        slots = self._model.slots_of(self._entries + self._drafter.entries)
        nodes, parents = self._drafter.draft(self._seed, roots, lens, slots, self._size)
        return Proposal(nodes, parents, self._drafter.spec_steps)

    def learn(self, emitted: Emitted) -> None:  # noqa: D102
        self._extend(emitted.tokens, emitted.features)

    def _extend(self, tokens: list[int], features: Tensor) -> None:
        device, count = self._model.device, len(tokens)
        self._seed: Seed = self._drafter.extend(
            torch.tensor([tokens], device=device),
            features,
            torch.tensor([self._entries], device=device),
            self._model.slots_of(self._entries + count),
            torch.tensor([count], device=device),
        )
        self._entries += count
        self._root = tokens[-1]
