"""Drafts of one text by the head: a chain of the likeliest tokens, or a tree (EAGLE-2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from examples.eagle_head.head import EagleHead


class Draft(NamedTuple):
    """A tree of tokens, its root the first; parents as in ``hwcore.speculative.build_tree``."""

    tokens: list[int]
    parents: list[int]


class _Node(NamedTuple):
    score: float  # log probability of the path to it
    token: int
    parent: int  # index of a node; -1: the root
    depth: int


class Drafter:
    """A head, its KV entries for a single text, and what it says next.

    Parameters
    ----------
    head : EagleHead
    capacity : int
        Tokens of the text, and of the widest draft.
    """

    def __init__(self, head: EagleHead, capacity: int) -> None:
        self.head = head
        self._kv = head.new_kv(1 + capacity)
        self._slots = torch.arange(1, 1 + capacity, device=head.device).unsqueeze(0)
        self.length = 0

    def extend(self, tokens: Tensor, features: Tensor) -> None:
        """Take in what the text has gained.

        Parameters
        ----------
        tokens : Tensor, int64, [1, n]
            The new tokens, the last of which the target has not seen yet.
        features : Tensor, float, [1, n, taps * hidden]
            The target's, of the token before each.
        """
        fused = self.head.fuse(features)
        self._logits, self._features = self._forward(tokens, fused, self.length, last=True)
        self.length += tokens.shape[1]

    def _forward(
        self,
        tokens: Tensor,
        features: Tensor,
        length: int,
        positions: Tensor | None = None,
        tree_mask: Tensor | None = None,
        last: bool = False,
    ) -> tuple[Tensor, Tensor]:
        lens = torch.tensor([length], device=self.head.device)
        slots = self._slots[:, : length + tokens.shape[1]]
        return self.head.forward(
            self._kv,
            tokens,
            features,
            lens,
            slots,
            positions=positions,
            tree_mask=tree_mask,
            last=last,
        )

    def chain(self, root: int, spec_steps: int) -> Draft:
        """Return ``spec_steps`` tokens after the root, each the likeliest."""
        logits, features, tokens = self._logits, self._features, [root]
        for step in range(spec_steps):
            if step:
                last = torch.tensor([tokens[-1:]], device=self.head.device)
                logits, features = self._forward(last, features, self.length + step - 1)
            tokens.append(int(self.head.draft_ids[logits[0, -1].argmax()]))
        return Draft(tokens, list(range(-1, spec_steps)))

    def tree(self, root: int, spec_steps: int, topk: int, size: int) -> Draft:
        """Return the ``size - 1`` likeliest nodes of a beam of ``topk``, and the root."""
        device, length = self.head.device, self.length
        scores, chosen = self._logits[0, -1].log_softmax(-1).topk(topk)
        tokens = self.head.draft_ids[chosen].tolist()
        nodes = [_Node(*pair, -1, 1) for pair in zip(scores.tolist(), tokens, strict=True)]
        beam = list(range(topk))
        features = self._features.expand(1, topk, -1)
        entry: dict[int, int] = {}  # which entry after the text belongs to a node
        for depth in range(2, spec_steps + 1):
            first = len(entry)
            entry |= {node: first + index for index, node in enumerate(beam)}
            sees = torch.zeros(1, topk, len(entry), dtype=torch.bool)
            for index, node in enumerate(beam):
                while node >= 0:
                    sees[0, index, entry[node]] = True
                    node = nodes[node].parent
            logits, features = self._forward(
                torch.tensor([[nodes[node].token for node in beam]], device=device),
                features,
                length + first,
                torch.full((1, topk), length + depth - 2, device=device),
                sees.to(device),
            )
            scores, chosen = logits[0].log_softmax(-1).topk(topk)  # [topk, topk]
            tokens = self.head.draft_ids[chosen].tolist()
            grown = [
                _Node(nodes[node].score + score, token, node, depth)
                for node, row, line in zip(beam, scores.tolist(), tokens, strict=True)
                for score, token in zip(row, line, strict=True)
            ]
            best = sorted(range(len(grown)), key=lambda one: -grown[one].score)[:topk]
            beam = [len(nodes) + one for one in best]
            nodes += grown
            features = features[:, [one // topk for one in best]]
        # A child is never likelier than its parent and comes after it: what is kept is a tree.
        kept = sorted(sorted(range(len(nodes)), key=lambda one: -nodes[one].score)[: size - 1])
        place = {node: index + 1 for index, node in enumerate(kept)} | {-1: 0}
        parents = [-1, *(place[nodes[node].parent] for node in kept)]
        return Draft([root, *(nodes[node].token for node in kept)], parents)
