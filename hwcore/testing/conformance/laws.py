"""What sampled verification emits, as a distribution: a tree of drafts, and its law.

The law is computed from the definition by going through the tree once, with no coin in it. It
holds for whatever samples: the core's reference, or a plugin's kernel.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from hwcore.kernels import build_tree
from hwcore.speculative import CoinPurpose, draw_coins

__all__ = ["PROBLEMS", "Problem", "arguments_for", "cells_of"]

_VOCABULARY, _STEPS = 24, 2
_DIGIT = _VOCABULARY + 1
CELLS = _DIGIT ** (_STEPS + 1)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A draft tree, the target's logits after each node, and how to sample from them.

    Attributes
    ----------
    tokens, parents : tuple of int
        Of each node, the root first.
    seed : int
        Of the logits.
    temperature : float
    top_k : int
        -1: all.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    seed: int
    temperature: float
    top_k: int = -1

    def logits(self) -> Tensor:
        """Return the logits, float32 ``[N, V]``: the lower tokens likelier, the last impossible."""
        generator = torch.Generator().manual_seed(self.seed)
        made = torch.randn(len(self.tokens), _VOCABULARY, generator=generator)
        made -= torch.arange(_VOCABULARY) / 6
        made[:, -2:] = float("-inf")
        return made

    def law(self, threshold_single: float, threshold_acc: float) -> Tensor:
        """Return the probability of each sequence of tokens that one step emits, ``[CELLS]``."""
        scaled = self.logits().double() / self.temperature
        if self.top_k > 0:
            least = scaled.topk(self.top_k).values[:, -1:]
            scaled = scaled.masked_fill(scaled < least, float("-inf"))
        probs = torch.softmax(scaled, 1)
        law = torch.zeros(CELLS, dtype=torch.float64)

        def visit(node: int, path: tuple[int, ...], chance: float) -> None:
            """Add what is emitted by a walk that is at a node, which it is with ``chance``."""
            left, acc, reached = probs[node].clone(), 0.0, 0.0
            children = [c for c, parent in enumerate(self.parents) if parent == node]
            for child in children if len(path) < _STEPS else ():
                token, mass = self.tokens[child], float(left[self.tokens[child]])
                if mass == 0:  # impossible, or offered before
                    continue
                acc, left[token] = acc + mass, 0.0
                upper = 1.0 if mass >= threshold_single else min(acc / threshold_acc, 1.0)
                if upper > reached:
                    visit(child, (*path, token), chance * (upper - reached))
                    reached = upper
            if reached < 1:
                for token, share in enumerate((left / left.sum()).tolist()):
                    law[_cell((*path, token))] += chance * (1 - reached) * share

        visit(0, (), 1.0)
        return law


PROBLEMS = (
    # Siblings, one of them twice and one impossible, and what follows each.
    Problem((0, 2, 1, 2, 23, 0, 3, 1), (-1, 0, 0, 0, 0, 1, 1, 2), seed=1, temperature=0.8),
    Problem((5, 1, 0, 4, 2, 3, 5, 6), (-1, 0, 0, 0, 1, 1, 2, -1), seed=2, temperature=1.3, top_k=6),
)


def _cell(tokens: tuple[int, ...]) -> int:
    """Return the number of a sequence, whose tokens are its digits; 0 past its end."""
    number = 0
    for place in range(_STEPS + 1):
        number = number * _DIGIT + (tokens[place] + 1 if place < len(tokens) else 0)
    return number


def arguments_for(
    samples: int, threshold_single: float, threshold_acc: float
) -> tuple[object, ...]:
    """Return arguments of ``verify_tree_sampling``, on the CPU: ``samples`` of each problem.

    Requests of the problems take turns, so that a neighbour's result is told from one's own.
    """
    bs = samples * len(PROBLEMS)
    which = torch.arange(bs) % len(PROBLEMS)

    def of_each(values: object) -> Tensor:
        return torch.as_tensor(values).index_select(0, which)

    tokens = of_each([problem.tokens for problem in PROBLEMS])
    parents = of_each([problem.parents for problem in PROBLEMS])
    lens = torch.full((bs,), 3)
    _, _, next_token, next_sibling = build_tree(parents, lens, _STEPS, 1, 0)
    # By node and not by position: a kernel that takes another node's coin shall not be right.
    nodes = torch.arange(tokens.shape[1]).expand(bs, -1)
    coins, final_coins = draw_coins(
        torch.arange(bs), nodes, (CoinPurpose.ACCEPT, CoinPurpose.RESIDUAL)
    )
    return (
        tokens,
        parents,
        next_token,
        next_sibling,
        of_each(torch.stack([problem.logits() for problem in PROBLEMS])),
        of_each([problem.temperature for problem in PROBLEMS]),
        of_each([problem.top_k for problem in PROBLEMS]),
        None,
        None,
        coins,
        final_coins,
        threshold_single,
        threshold_acc,
        _STEPS,
        False,
    )


def cells_of(results: tuple[Tensor, ...]) -> Tensor:
    """Return the number of each request's sequence, ``[bs]``, of what the operation returned.

    Accepted tokens are read from ``predict``, the last one is the bonus. What cannot be read as a
    sequence counts as one that is impossible.
    """
    predict, accept_index, accept_lens, bonus_tokens = (
        part.to(torch.int64) for part in results[:4]
    )
    place = torch.arange(_STEPS + 1)
    readable = (accept_index >= 0) & (accept_index < len(predict))
    path = predict[torch.where(readable, accept_index, 0)]
    last = accept_lens.unsqueeze(1) - 1
    tokens = torch.where(place == last, bonus_tokens.unsqueeze(1), path)
    sound = (place > last) | (readable & (tokens >= 0) & (tokens < _VOCABULARY))
    digits = torch.where(place > last, 0, tokens + 1)
    number = (digits * _DIGIT ** torch.arange(_STEPS, -1, -1)).sum(1)
    return torch.where(sound.all(1) & (last.squeeze(1) >= 0), number, 0)
