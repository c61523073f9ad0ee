"""Drafting with an EAGLE head: it is brought up to date with the model, then it runs ahead."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from examples.serving.drafting import lens_before
from hwcore.overlap import RelayPayload
from hwcore.speculative import DraftSteps, top_k

if TYPE_CHECKING:
    from torch import Tensor

    from examples.eagle_head.head import EagleHead
    from examples.serving.kv_pool import KVPool
    from hwcore.speculative import VerifyStep


@dataclass
class DraftStart:
    """What the head says of the token after the root, and draft steps start from.

    Attributes
    ----------
    probs : Tensor, float, [bs, topk]
        Of the likeliest tokens, likeliest first.
    tokens : Tensor, int64, [bs, topk]
        Those.
    features : Tensor, float, [bs, hidden]
        The head's own, at the root.
    """

    probs: Tensor
    tokens: Tensor
    features: Tensor


class HeadRunner:
    """Draft trees of a batch, from a head on a KV pool of its own with its target's slots.

    Parameters
    ----------
    head : EagleHead
    num_slots : int
        Of the target's pool.
    topk : int
        Branches at each node; 1: chains.
    spec_steps : int
        Greatest depth of a tree.

    Notes
    -----
    Host sync: no, nowhere. Shapes depend on nothing but the batch size and the tree's.
    """

    def __init__(self, head: EagleHead, num_slots: int, topk: int, spec_steps: int) -> None:
        self.topk, self.spec_steps = topk, spec_steps
        self._head, self._kv = head, head.new_kv(num_slots)

    @property
    def entries(self) -> int:
        """Slots beyond a request's last entry that drafting writes to."""
        return (self.spec_steps - 1) * self.topk

    def depth(self, num_draft_tokens: int) -> int:
        """Return the draft steps that a tree of so many nodes is made of."""
        return min(self.spec_steps, num_draft_tokens - 1)

    def extend(
        self, tokens: Tensor, features: Tensor, lens: Tensor, slots: Tensor, counts: Tensor
    ) -> DraftStart:
        """Bring the head up to date with tokens that are settled.

        Parameters
        ----------
        tokens : Tensor, int64, [bs, q]
            The last is the root of the next tree.
        features : Tensor, float, [bs, q, taps * hidden]
            The target's, at the token before each.
        lens : Tensor, int64, [bs]
            Entries that the head has of each request: tokens before these, less one.
        slots : Tensor, int64, [bs, context]
        counts : Tensor, int64, [bs]
            How many of the ``q`` are real.
        """
        fused = self._head.fuse(features)
        logits, own = self._head.forward(
            self._kv, tokens, fused, lens, slots, counts=counts, last=True
        )
        probs, drafted = self._likeliest(logits)
        return DraftStart(probs[:, 0], drafted[:, 0], own[:, 0])

    def draft(
        self, start: DraftStart, roots: Tensor, lens: Tensor, slots: Tensor, num_draft_tokens: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run ahead, and keep the likeliest nodes.

        Parameters
        ----------
        start : DraftStart
        roots : Tensor, int64, [bs]
        lens : Tensor, int64, [bs]
            Entries that the head has, and the target before the root.
        slots : Tensor, int64, [bs, context]
            With room for :attr:`entries` more.
        num_draft_tokens : int
            Nodes of the tree, the root included.

        Returns
        -------
        draft_tokens, parents : Tensor, int64, [bs, num_draft_tokens]
            As :func:`hwcore.speculative.build_tree` takes them.
        ranks : Tensor, int64, [bs, num_draft_tokens]
            Of the nodes, by their scores.
        """
        steps = DraftSteps(self.topk)
        beam = steps.first(start.probs, start.tokens)
        bs, device = len(roots), roots.device
        features = start.features.unsqueeze(1).expand(-1, self.topk, -1)
        itself = torch.eye(self.topk, dtype=torch.bool, device=device).expand(bs, -1, -1)
        sees = itself  # [bs, topk, drafted so far]: which of them each node of the beam follows
        for step in range(self.depth(num_draft_tokens) - 1):
            position = lens + step
            logits, features = self._head.forward(
                self._kv,
                beam.tokens,
                features,
                lens + step * self.topk,
                slots,
                positions=position.unsqueeze(1).expand(-1, self.topk),
                tree_mask=sees,
            )
            beam = steps.next(*self._likeliest(logits))
            origin = beam.origin.unsqueeze(2)
            features = features.gather(1, origin.expand(-1, -1, features.shape[2]))
            sees = torch.cat((sees.gather(1, origin.expand(-1, -1, sees.shape[2])), itself), dim=2)
        results = steps.organize(num_draft_tokens)
        return (*results.with_root(roots), results.ranks)

    def _likeliest(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return probabilities and tokens ``[bs, q, topk]`` of the likeliest."""
        probs, drafted = top_k(logits.softmax(dim=-1), self.topk)
        return probs, self._head.draft_ids[drafted]


class HeadDrafting:
    """An EAGLE head as the engine's :class:`~examples.serving.drafting.Drafting`.

    Parameters
    ----------
    pool : KVPool
        Whose slots the head's own entries have.
    head : EagleHead
    topk : int
        Branches at each node; 1: chains.
    spec_steps : int
    width : int
    """

    def __init__(
        self, pool: KVPool, head: EagleHead, topk: int, spec_steps: int, width: int
    ) -> None:
        if pool.max_context > head.max_context:
            message = (
                f"HeadDrafting: the pool's max_context is {pool.max_context}; expected at most the "
                f"{head.max_context} positions that the head is prepared for. Load it with more."
            )
            raise ValueError(message)
        self._runner = HeadRunner(head, pool.num_slots, topk, spec_steps)
        self.width, self.branches, self.taps = width, topk > 1, head.shape.taps
        self.spec_steps = self._runner.depth(width)
        self.reach = max(width, self._runner.entries)
        hidden, dtype = head.shape.hidden, head.dtype
        self.relay: dict[str, Any] = {"topk": topk, "hidden_size": hidden, "hidden_dtype": dtype}

    def prefill(  # noqa: D102
        self,
        rows: Tensor,
        start: Tensor,
        text: Tensor,
        count: Tensor,
        features: Tensor,
        slots: Tensor,
    ) -> RelayPayload:
        newest = text.gather(1, count.unsqueeze(1))[:, 0]
        return _relayed(newest, self._runner.extend(text[:, 1:], features, start, slots, count))

    def draft(  # noqa: D102
        self, rows: Tensor, lens: Tensor, relayed: RelayPayload, slots: Tensor
    ) -> tuple[Tensor, Tensor]:
        assert relayed.topk_p is not None  # as `relay` says
        assert relayed.topk_index is not None
        assert relayed.hidden_states is not None
        start = DraftStart(relayed.topk_p, relayed.topk_index, relayed.hidden_states)
        return self._runner.draft(start, relayed.next_token, lens, slots, self.width)[:2]

    def extend(self, step: VerifyStep, slots: Tensor) -> RelayPayload:  # noqa: D102
        result, committed = step.result, step.commit
        assert committed.hidden_states is not None  # for it has taps
        tokens, counts = committed.accept_tokens.clamp(min=0), result.accept_lens.long()
        features, lens = committed.hidden_states, lens_before(step)
        start = self._runner.extend(tokens, features, lens, slots, counts)
        return _relayed(result.bonus_tokens, start)


def _relayed(newest: Tensor, start: DraftStart) -> RelayPayload:
    return RelayPayload(newest, start.probs, start.tokens, start.features)
