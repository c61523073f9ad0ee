"""One level of a sampled walk: weigh the children, accept one or draw a token."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch

from hwcore.kernels.distribution import are_valid, divisors_of, draw_with_total, weights
from hwcore.kernels.thresholds import reads_are_free
from hwcore.kernels.vocabulary import lowest_argmax
from hwcore.kernels.walk import Step, parts

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from hwcore.kernels.thresholds import Filters
    from hwcore.kernels.walk import Level, Rows, Tree

__all__ = ["PART", "Sampler"]

PART = 2**18
"""Logits that a CPU works on at a time, 1 MiB of float32: they stay in its cache from one pass to
the next."""

# Weights that are kept until a level has been decided, by many requests at once.
_KEPT = 8 * PART
_NOBODY = -2  # parent of a node that is never accepted


class Sampler:
    """Decides for the requests of a level; see ``verify_tree_sampling``."""

    def __init__(
        self,
        tree: Tree,
        rows: Rows,
        temperatures: Tensor,
        filters: Filters,
        coins: Tensor,
        final_coins: Tensor,
        thresholds: tuple[float, float],
    ) -> None:
        self.greedy: Tensor | None = None  # bool [bs]
        self._tree, self._rows = tree, rows
        self._divisors, self._filters = divisors_of(temperatures), filters
        self._coins, self._final_coins = coins, final_coins
        self._single, self._acc = thresholds
        self._offered, parents = tree.draft_tokens, tree.parents
        if not reads_are_free(coins):
            # Nobody has looked whether a token is one: a node with none such is not accepted.
            self._offered = tree.draft_tokens.clamp(0, rows.vocab - 1)
            parents = torch.where(self._offered == tree.draft_tokens, parents, _NOBODY)
        self._parents = _without_repeats(parents, tree, rows.vocab)
        self._at_once = self._kept = 0  # all
        self._scratch: Tensor | None = None
        self._weights: Tensor | None = None
        if reads_are_free(coins):
            bs, vocab = len(temperatures), rows.vocab
            self._at_once = max(1, PART // vocab)
            # A processor wants to see a level at once.
            self._kept = bs if rows.processed else max(1, _KEPT // vocab)
            self._scratch = torch.empty(min(bs, self._at_once), vocab, dtype=torch.float32)
            self._weights = torch.empty(min(bs, self._kept), vocab, dtype=torch.float32)

    def choose(self, level: Level) -> Step:
        """Decide on the children of each request's node."""
        steps = [self._decide(part) for part in level.parts(self._kept)]
        if len(steps) == 1:
            return steps[0]
        tokens = torch.cat([step.tokens for step in steps])
        return Step(tokens, torch.cat([step.children for step in steps]))

    def _decide(self, level: Level) -> Step:
        tree, ops = self._tree, self._tree.ops
        found, total, highest = self._weigh(level)
        offered = level.of_requests(self._offered)  # [k, N]
        if level.may_go_on is False:
            mass, children = None, torch.full_like(level.nodes, tree.nodes)
        else:
            mass, children = self._offer(level, offered, found, total, highest)
        walks = len(children)
        ending = walks if level.last else 0
        if level.last is None:
            ending = int((children == tree.nodes).count_nonzero())
        if ending == walks:
            tokens = self._draw(level, offered, found, mass)
        else:
            at = children.clamp(max=tree.nodes - 1).unsqueeze(1)
            tokens = ops.gather(offered, 1, at).squeeze(1)
            if ending:
                drawn = self._draw(level, offered, found, mass)
                tokens = torch.where(children == tree.nodes, drawn, tokens)
        if highest is not None and self.greedy is not None:
            tokens = torch.where(level.of_requests(self.greedy), highest, tokens)
        return Step(tokens, children)

    def _weigh(self, level: Level) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the weights ``[k, V]`` and sums of a level's rows, and the highest logits.

        A few rows at a time where that is faster.
        """
        ops, size = self._tree.ops, self._at_once
        found = None if self._weights is None else self._weights[: len(level.requests)]
        totals = []
        for rows, out, divisors, *filters in zip(
            self._rows.of(level, size),
            _parts(found, size),
            parts(level.of_requests(self._divisors), size),
            *(_parts(None if f is None else level.of_requests(f), size) for f in self._filters),
            strict=False,  # None goes on for ever
        ):
            scratch = None if self._scratch is None else self._scratch[: len(rows)]
            part, total = weights(rows, divisors, tuple(filters), ops, scratch, out)
            if total is not None:
                totals.append(total)
        highest = None if self.greedy is None else lowest_argmax(rows, ops)  # of all: one part
        return part if found is None else found, torch.cat(totals) if totals else None, highest

    def _offer(
        self,
        level: Level,
        offered: Tensor,
        found: Tensor,
        total: Tensor | None,
        highest: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return the weight of each child ``[k, N]``, and the child that is accepted ``[k]``."""
        tree, ops = self._tree, self._tree.ops
        is_child = level.of_requests(self._parents) == level.nodes.unsqueeze(1)
        if isinstance(level.may_go_on, torch.Tensor):
            is_child &= level.may_go_on.unsqueeze(1)
        mass = torch.where(is_child, ops.gather(found, 1, offered), 0.0)
        chance = mass if total is None else mass / total
        if highest is not None and self.greedy is not None:
            is_highest = (offered == highest.unsqueeze(1)) & is_child
            greedy = level.of_requests(self.greedy).unsqueeze(1)
            chance = torch.where(greedy, is_highest.to(torch.float32), chance)
        reached = ops.cumsum(chance, 1)
        if self._acc != 1:
            reached = reached / max(self._acc, 1e-9)
        accepts = level.at_nodes(self._coins).unsqueeze(1) < reached
        if self._single < 1:  # else nothing more: a chance of 1 is beyond every coin
            accepts |= chance >= self._single
        return mass, tree.first_child(accepts & (chance > 0))

    def _draw(self, level: Level, offered: Tensor, found: Tensor, mass: Tensor | None) -> Tensor:
        """Draw from what is left, ``[k]``; for those whose children were all rejected."""
        ops = self._tree.ops
        if mass is not None:
            # A weight minus itself is exactly 0. Of those that go on it is not needed any more.
            ops.scatter_add_(found, 1, offered, -mass)
        tokens, left = draw_with_total(found, level.at_nodes(self._final_coins), ops)
        if left is None:
            return tokens
        if mass is not None:
            # By rounding nothing may be left; then it is the last child, which all but had it.
            final = ops.amax(torch.where(mass > 0, self._tree.column, 0), 1, keepdim=True)
            final = ops.gather(offered, 1, final).squeeze(1)
            tokens = torch.where(left > 0, tokens, final)
        return torch.where(are_valid(found), tokens, -1)


def _parts(values: Tensor | None, size: int) -> Iterable[Tensor | None]:
    return itertools.repeat(None) if values is None else parts(values, size)


def _without_repeats(parents: Tensor, tree: Tree, vocab: int) -> Tensor:
    """Take from its parent each node whose token an earlier child of that parent has."""
    keys, node = tree.ops.sort(parents * vocab + tree.draft_tokens, stable=True, dim=1)
    again = keys[:, 1:] == keys[:, :-1]
    if reads_are_free(again) and not bool(again.any()):
        return parents
    repeats = torch.zeros_like(keys, dtype=torch.bool)
    repeats[:, 1:] = again
    parents = torch.where(repeats, _NOBODY, tree.ops.gather(parents, 1, node))
    without: Tensor = tree.ops.scatter_(torch.empty_like(parents), 1, node, parents)
    return without
