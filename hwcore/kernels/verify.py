"""The walk of the target through a draft tree, greedy and sampled.

Only the rows of logits that a request's walk visits are read, ``spec_steps + 1`` of ``N`` at most.

Where a host read costs nothing (``reads_are_free``), the walk goes on with the requests that still
accept, and so reads each row once. Elsewhere every level is evaluated for every request, and one
whose walk has ended stays at its node: shapes are static, and the last level has everyone's last
row. Both evaluate a row by the same calls, and these treat each row by itself: results are the
same to the bit.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from hwcore.kernels.sampler import PART, Sampler
from hwcore.kernels.thresholds import reads_are_free
from hwcore.kernels.torch_ops import TORCH
from hwcore.kernels.vocabulary import lowest_argmax
from hwcore.kernels.walk import Outputs, Rows, Step, Tree, walk_all, walk_the_living

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from hwcore.kernels.torch_ops import TorchOps
    from hwcore.kernels.walk import Level, Processor, Verified

__all__ = ["verify_tree_greedy", "verify_tree_sampling"]


def verify_tree_greedy(
    draft_tokens: Tensor,
    parents: Tensor,
    next_token: Tensor,
    next_sibling: Tensor,
    target: Tensor,
    spec_steps: int,
    *,
    ops: TorchOps = TORCH,
) -> Verified:
    """Walk from the root to the first child whose token is the target's, until there is none.

    Parameters
    ----------
    draft_tokens : Tensor, int64, [bs, N], device
        Column 0 is the root.
    parents : Tensor, int64, [bs, N], device
        -1 for the root and for padding. Another kernel may rather follow the links.
    next_token, next_sibling : Tensor, int64, [bs, N], device
        First child and next sibling; -1 = none.
    target : Tensor, device
        Logits, float, [bs, N, V], or the target's token after each node, int64, [bs, N].
    spec_steps : int
        Most drafts to accept; ``W = spec_steps + 1``.

    Returns
    -------
    predict : Tensor, int32, [bs * N]
        The target's token after each node of the path; 0 elsewhere.
    accept_index : Tensor, int32, [bs, W]
        The path as indices into ``predict``, root first; -1 past its end.
    accept_lens : Tensor, int32, [bs]
        Nodes in the path.
    bonus_tokens : Tensor, int64, [bs]
        The target's token after the last of them.
    status : Tensor, int32, [bs]
        1 where the path ended at a row of logits with NaN or +inf in it, or nothing but -inf. The
        token after it is V - 1. Otherwise 0.

    Notes
    -----
    Of equal logits the lowest token wins, of equal siblings the first. Source: SGLang's
    ``verify_tree_greedy``, which is given the argmax of every row. Mutates: none. Host sync: no.
    Graph-safe: yes.
    """
    tree = Tree(draft_tokens, parents, spec_steps, ops)
    living = reads_are_free(target)
    vocab = target.shape[2] if target.is_floating_point() else 0  # 0: every token is valid
    choose: Callable[[Level], Step]
    if vocab:
        choose = functools.partial(_by_highest, rows=Rows(target, ops), living=living)
    else:
        choose = functools.partial(_by_given, target=target)
    if not living:
        return walk_all(tree, vocab, choose)
    outputs = Outputs(tree, vocab)
    walk_the_living(tree, choose, outputs, torch.arange(tree.batch))
    return outputs.results()


def verify_tree_sampling(
    draft_tokens: Tensor,
    parents: Tensor,
    next_token: Tensor,
    next_sibling: Tensor,
    logits: Tensor,
    temperatures: Tensor,
    top_ks: Tensor | None,
    top_ps: Tensor | None,
    min_ps: Tensor | None,
    coins: Tensor,
    final_coins: Tensor,
    threshold_single: float,
    threshold_acc: float,
    spec_steps: int,
    any_greedy: bool = True,
    *,
    processor: Processor | None = None,
    ops: TorchOps = TORCH,
) -> Verified:
    """Walk from the root as the coins decide, then draw one more token.

    At a node the children are offered in index order. One is accepted if it has a probability and
    the coin lies below ``acc / max(threshold_acc, 1e-9)``, ``acc`` being the probability of the
    children up to it; or if its own probability is at least ``threshold_single``. Where none is,
    the walk ends, and a token is drawn from what the rejected ones leave of the distribution. A
    child with the token of an earlier one is passed over.

    Parameters
    ----------
    draft_tokens, parents, next_token, next_sibling, spec_steps
        As in :func:`verify_tree_greedy`.
    logits : Tensor, float, [bs, N, V], device
    temperatures, top_ks, top_ps, min_ps
        One a request, ``[bs]``; as in ``probabilities``. At temperature 0 the request walks as in
        :func:`verify_tree_greedy`.
    coins : Tensor, float32, [bs, N], device
        In [0, 1); the one of a node decides on its children.
    final_coins : Tensor, float32, [bs, N], device
        In [0, 1); the one of the node where the walk ends draws the token there.
    threshold_single, threshold_acc : float
        In [0, 1]; 1 gives the target's own distribution.
    any_greedy : bool
        False: no temperature is 0.
    processor : callable, optional
        Changes logits before temperature: from ``[k, V]`` float32, the requests ``[k]`` and the
        tokens of their paths ``[k, depth]`` to ``[k, V]``. A kernel is never asked for it.
    ops : TorchOps
        Torch's operations as the device runs them.

    Returns
    -------
    predict, accept_index, accept_lens, bonus_tokens, status
        As from :func:`verify_tree_greedy`.

    Notes
    -----
    Where rounding leaves nothing to draw from, the last child of positive probability is the
    token. Source: SGLang's ``tree_speculative_sampling_target_only``, which takes the softmax of
    every row, and a scratch of that size. Mutates: none. Host sync: no. Graph-safe: yes.
    """
    tree = Tree(draft_tokens, parents, spec_steps, ops)
    rows = Rows(logits, ops, processor)
    filters = (top_ks, top_ps, min_ps)
    rule = (threshold_single, threshold_acc)
    sampler = Sampler(tree, rows, temperatures, filters, coins, final_coins, rule)
    if not reads_are_free(logits):
        sampler.greedy = temperatures <= 0 if any_greedy else None
        return walk_all(tree, rows.vocab, sampler.choose)
    outputs = Outputs(tree, rows.vocab)
    requests = torch.arange(tree.batch)
    if any_greedy:
        greedy = temperatures <= 0
        choose = functools.partial(_by_highest, rows=rows, living=True)
        walk_the_living(tree, choose, outputs, requests[greedy])
        requests = requests[~greedy]
    walk_the_living(tree, sampler.choose, outputs, requests)
    return outputs.results()


def _by_token(level: Level, tokens: Tensor) -> Step:
    """Go on to the first child that has the target's token; -1, which is no token: to none."""
    tree = level.tree
    agrees = level.of_requests(tree.parents) == level.nodes.unsqueeze(1)
    agrees &= level.of_requests(tree.draft_tokens) == tokens.unsqueeze(1)
    return Step(tokens, tree.first_child(agrees))


def _by_given(level: Level, target: Tensor) -> Step:
    return _by_token(level, level.at_nodes(target))


def _by_highest(level: Level, rows: Rows, living: bool) -> Step:
    size = max(1, PART // rows.vocab) if living else 0
    tokens = [lowest_argmax(part, level.tree.ops) for part in rows.of(level, size)]
    return _by_token(level, tokens[0] if len(tokens) == 1 else torch.cat(tokens))
