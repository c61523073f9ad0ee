"""Choosing the tree's size: what each size costs, measured, against what it should bring."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from examples.serving.step import plain_step, tree_step
from hwcore.speculative import TreeSizer, measure_costs

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from examples.serving.lookup import Draft
    from examples.serving.model import Model

SIZES = (1, 2, 4, 6, 8, 12, 16, 24, 32)

_PRIOR = 1.0  # steps' worth of belief in the draft's own chances
_MEMORY = 0.97  # weight that an observation keeps with each later one


def measure(
    model: Model,
    context: int,
    sizes: Sequence[int] = SIZES,
    rounds: int = 7,
    tick: Callable[[], object] = lambda: None,
) -> dict[int, float]:
    """Measure the seconds of a step with trees of each size, ``context`` tokens in the cache.

    A step is all that decoding does for it but drafting: tree, forward, verify, commit. The trees
    are chains, the dearest to verify; size 1 is plain decoding. Rounds go through all sizes in
    turn, so that a disturbance hits them alike; medians count. One round goes ahead unmeasured.
    """
    model.length = 0
    device = model.device

    def step(size: int) -> None:
        model.length = context
        if size == 1:
            plain_step(model, [1])
        else:
            nodes = torch.ones(1, size, dtype=torch.int64, device=device)
            parents = torch.arange(-1, size - 1, device=device).unsqueeze(0)
            tree_step(model, nodes, parents, size - 1)
        if size == sizes[-1]:
            tick()

    with torch.inference_mode():
        plain_step(model, [1] * context)
        return measure_costs(step, sizes, rounds=rounds)


class Sizer:
    """Chooses, for one text, the tree size that should give most tokens a second.

    It keeps, for matches of like length, how often the node of each rank turned out to be on the
    path. Only tokens already decoded teach it, but they teach it about trees that were never run:
    a draft that plain decoding ignored is compared with what followed all the same. So it finds
    its way back from plain decoding without trying.
    """

    def __init__(self, costs: Mapping[int, float]) -> None:
        # No probes: drafts that were not run teach as well.
        self._sizer = TreeSizer(costs, prior_weight=_PRIOR, memory=_MEMORY, probe_share=0.0)
        self._pending: list[tuple[Draft, int]] = []
        self.largest = max(costs)

    def expected(self, draft: Draft, size: int) -> float:
        """Return the tokens to expect of one step with the first ``size`` nodes of a draft."""
        return self._sizer.expected(size, kind=_kind(draft), chances=draft.chances)

    def choose(self, draft: Draft) -> int:
        """Return the size with the best expected tokens a second; 1 is plain decoding."""
        return self._sizer.choose(kind=_kind(draft), chances=draft.chances)

    def watch(self, draft: Draft, place: int) -> None:
        """Remember a draft whose root is followed by the text's token number ``place``."""
        if len(draft) > 1:
            self._pending.append((draft, place))

    def learn(self, text: list[int]) -> None:
        """Settle the drafts whose fate the text has decided."""
        still = []
        for draft, place in self._pending:
            nodes, ended = draft.path(text[place:])
            if ended:
                self._sizer.learn(nodes, len(draft), kind=_kind(draft))
            else:
                still.append((draft, place))
        self._pending = still


def _kind(draft: Draft) -> int:
    """Return the class of match lengths that a draft is judged with: 1, 2-3, 4-7, 8-15, …."""
    return draft.agreement.bit_length()
