"""What proposes the next tree of one text: earlier matches looked up, or an EAGLE head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from examples.serving import sizing
from examples.serving.eagle import HeadRunner
from examples.serving.lookup import Lookup
from examples.serving.sizing import Sizer
from examples.serving.step import plain_step, tree_step
from hwcore.speculative import TreeSizer, measure_costs

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from examples.eagle_head.head import EagleHead
    from examples.serving.model import Model
    from examples.serving.step import Emitted


@dataclass
class Proposal:
    """A tree to verify, as :func:`hwcore.speculative.build_tree` takes it, of one request."""

    nodes: Tensor  # int64, [1, n]
    parents: Tensor  # int64, [1, n]
    spec_steps: int

    @property
    def branches(self) -> bool:
        """Whether a node has two children. Host sync: yes."""
        parents = [parent for parent in self.parents[0].tolist() if parent >= 0]
        return len(set(parents)) < len(parents)


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
    """Lets an EAGLE head run ahead of the model, with trees of the size that should pay.

    What is learnt of the head's chances holds for all texts.

    Parameters
    ----------
    runner : HeadRunner
    model : Model
        Whose slots it goes by.
    sizes : sequence of int
        Of trees; the first 1. One other: always that.
    """

    def __init__(self, runner: HeadRunner, model: Model, sizes: Sequence[int]) -> None:
        self._runner, self._model, self._sizes = runner, model, tuple(sizes)
        self.sizer: TreeSizer | None = None
        self._entries = 0  # of the text, that the head has
        self._tokens: list[int] = []  # after those, that it has not seen
        self._features: list[Tensor] = []  # the model's, at the token before each
        self._ranks: Tensor | None = None  # of the nodes that are being verified

    def begin(self, prompt: list[int], emitted: Emitted) -> None:  # noqa: D102
        self._entries, self._tokens, self._features = 0, prompt[1:], []
        self._ranks = None
        self.learn(emitted)

    def draft(self) -> Proposal | None:  # noqa: D102
        size = self._sizes[-1] if self.sizer is None else self.sizer.choose()
        return self.propose(size) if size > 1 else None

    def propose(self, size: int) -> Proposal:
        """Return a tree of so many nodes."""
        runner, device = self._runner, self._model.device
        root, count = self._tokens[-1], len(self._tokens)
        # After steps without drafts there is more to catch up with.
        start = runner.extend(
            torch.tensor([self._tokens], device=device),
            torch.cat(self._features, dim=1),
            torch.tensor([self._entries], device=device),
            self._model.slots_of(self._entries + count),
            torch.tensor([count], device=device),
        )
        self._entries += count
        self._tokens, self._features = [], []
        nodes, parents, self._ranks = runner.draft(
            start,
            torch.tensor([root], device=device),
            torch.tensor([self._entries], device=device),
            self._model.slots_of(self._entries + runner.entries),
            size,
        )
        return Proposal(nodes, parents, runner.depth(size))

    def learn(self, emitted: Emitted) -> None:  # noqa: D102
        if self.sizer is not None and self._ranks is not None:
            ranks = self._ranks[0].tolist()
            self.sizer.learn([ranks[node] for node in emitted.path], len(ranks))
        self._ranks = None
        self._tokens = self._tokens + emitted.tokens
        self._features.append(emitted.features)

    def calibrate(self, context: int, rounds: int = 7) -> dict[int, float]:
        """Measure what a step costs with trees of each size, and choose among them from now on.

        Parameters
        ----------
        context : int
            Tokens in the cache meanwhile.
        rounds : int
            How often each is measured.
        """
        model, prompt = self._model, [1] * context

        def step(size: int) -> None:
            model.length = context
            if size == 1:
                plain_step(model, prompt[:1])
            else:
                self._entries = context - 1
                self._tokens, self._features = prompt[:1], [last]
                proposal = self.propose(size)
                tree_step(model, proposal.nodes, proposal.parents, proposal.spec_steps)

        model.length = 0
        with torch.inference_mode():
            last = plain_step(model, prompt).features[:, -1:]
            costs = measure_costs(step, self._sizes, rounds=rounds)
        self.sizer = TreeSizer(costs)
        return costs


_CHAIN, _TREE = (1, 2, 3, 4, 5), (1, 4, 8, 12, 16)  # sizes to choose among
_TOPK, _SPEC_STEPS = 4, 4


def calibrated(
    model: Model,
    head: EagleHead | None,
    context: int,
    rounds: int,
    tick: Callable[[], object] = lambda: None,
) -> tuple[dict[str, Drafter], dict[str, dict[int, float]]]:
    """Return every drafter there is, and what a step costs with each by tree size.

    Parameters
    ----------
    model : Model
    head : EagleHead, optional
        Without one there is prompt lookup alone.
    context : int
        Tokens in the cache while costs are measured.
    rounds : int
        How often each size is measured.
    tick : callable
        Called after each drafter.
    """
    costs = {"lookup": sizing.measure(model, context, rounds=rounds)}
    drafters: dict[str, Drafter] = {"lookup": PromptLookup(costs["lookup"], model.device)}
    tick()
    if head is None:
        return drafters, costs
    for way, topk, sizes in (("EAGLE chain", 1, _CHAIN), ("EAGLE tree", _TOPK, _TREE)):
        runner = HeadRunner(head, model.num_slots, topk, _SPEC_STEPS)
        drafters[way] = drafter = Eagle(runner, model, sizes)
        costs[way] = drafter.calibrate(context, rounds)
        tick()
    return drafters, costs
