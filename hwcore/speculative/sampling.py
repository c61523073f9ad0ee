"""Sampled verification: the target's own distribution, whatever the drafts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hwcore._checks import (
    check_callable,
    check_instance,
    check_range,
    check_tensor,
    is_number,
    may_read,
)
from hwcore.activation import current_backend
from hwcore.errors import ArgumentTypeError, ArgumentValueError, describe
from hwcore.kernels.selection import kernel
from hwcore.kernels.torch_ops import explains_missing, torch_ops
from hwcore.kernels.verify import verify_tree_greedy, verify_tree_sampling
from hwcore.speculative.coins import CoinPurpose, draw_coins
from hwcore.speculative.processors import WalkedRows
from hwcore.speculative.sampling_params import SamplingParams
from hwcore.speculative.verify import VerifyResult, check_logits, check_tree

if TYPE_CHECKING:
    from torch import Tensor

    from hwcore.backend import Backend
    from hwcore.speculative.processors import LogitProcessor
    from hwcore.speculative.tree import DraftTree

__all__ = ["SamplingParams", "verify_sampling"]

_WHERE = "verify_sampling"


def verify_sampling(
    tree: DraftTree,
    logits: Tensor,
    params: SamplingParams,
    *,
    seeds: Tensor | None = None,
    coins: Tensor | None = None,
    final_coins: Tensor | None = None,
    threshold_single: float = 1.0,
    threshold_acc: float = 1.0,
    processor: LogitProcessor | None = None,
    backend: Backend | None = None,
) -> VerifyResult:
    """Accept drafts so that the tokens emitted are distributed as if the target had drawn them.

    Called once a step, after the target's forward over the tree. With both thresholds at 1 the
    tokens follow the target's distribution exactly, however they were drafted: temperature, top-k,
    top-p, min-p and logit processors included. A request at temperature 0 gets what
    :func:`verify_greedy` gives.

    From the root on, a node's children are offered in index order. The first is accepted whose
    probability and those of the ones before it together exceed the node's coin. Where none is, the
    walk ends with a token drawn from the distribution less the tokens that were rejected. A child
    with the token of an earlier one is passed over, for its probability has been offered.

    Parameters
    ----------
    tree : DraftTree
        From :func:`build_tree`. One of a single node makes this plain sampling.
    logits : Tensor, float32, bfloat16, float16 or float64, [bs, N, vocab]
        Of the target, on the device of ``tree``. Computed with in float32. Only the rows that the
        walk visits are read, ``spec_steps + 1`` of ``N`` at most.
    params : SamplingParams
        For each request.
    seeds : Tensor, int64, [bs], optional
        Coins are made from them and the absolute position of the token that a coin decides: a
        request's tokens do not depend on its batch, and no coin is used twice.
    coins : Tensor, float32, [bs, N], optional
        In [0, 1); the one of a node decides on its children. Instead of ``seeds``.
    final_coins : Tensor, float32, [bs], optional
        In [0, 1); draws the last token of each request. With ``coins``.
    threshold_single : float
        In [0, 1]. A child is also accepted if its own probability is at least this; below 1 this
        favours likely tokens.
    threshold_acc : float
        In [0, 1]. Probabilities are divided by it before they are compared with the coin; below 1
        this favours drafts.
    processor : callable, optional
        Takes the :class:`WalkedRows` of a level and returns its logits changed, [k, vocab], before
        temperature; called for each level. The distribution is the processed one. With a processor
        the portable walk runs, even where the backend has a kernel. See
        :class:`HostLogitProcessor` for one that runs on the host.
    backend : Backend, optional
        Whose kernel runs, if it has one; by default the process's own.

    Returns
    -------
    VerifyResult
        An empty batch gives empty tensors.

    Raises
    ------
    ArgumentTypeError
        If an argument's type, dtype, rank or device is wrong.
    ArgumentValueError
        If a shape does not fit; if there are not either seeds or both kinds of coins; if a token,
        a parameter or a coin is out of range, or the tree's links are no tree's (content: CPU
        arguments always, others under ``HWCORE_DEBUG=1``).
    CaptureError
        If a processor on the host is met while a graph is being captured.
    CapabilityError
        If the device lacks a torch operation, and its plugin said that it does not.

    Notes
    -----
    NaN, +inf or nothing but -inf in a row that a request's walk comes to ends that walk, with
    ``status`` saying so; no other request changes by a bit.

    Source: SGLang's ``tree_speculative_sampling_target_only``, but for repeated siblings, whose
    probability it counts twice. Mutates: none. Host sync: no (under ``HWCORE_DEBUG=1`` yes, and
    with a processor on the host). Graph-safe: yes, with a processor that is.
    """
    _check(tree, logits, params, threshold_single, threshold_acc, processor)
    backend = backend or current_backend()
    with explains_missing(backend), torch.no_grad():
        if params.all_greedy and processor is None:
            found = kernel(backend, verify_tree_greedy)(*_tree_of(tree), logits, tree.spec_steps)
            return VerifyResult(*found)
        ours, last = _coins(tree, seeds, coins, final_coins)
        arguments = (
            *_tree_of(tree),
            logits,
            params.temperatures,
            params.top_ks,
            params.top_ps,
            params.min_ps,
            ours,
            last,
            threshold_single,
            threshold_acc,
            tree.spec_steps,
            params.any_greedy,
        )
        if processor is None:
            return VerifyResult(*kernel(backend, verify_tree_sampling)(*arguments))
        processed = _Processed(processor)
        ops = torch_ops(backend)
        return VerifyResult(*verify_tree_sampling(*arguments, processor=processed, ops=ops))


class _Processed:
    """A processor as the reference calls it, with what it returns checked."""

    def __init__(self, processor: LogitProcessor) -> None:
        self._processor = processor

    def __call__(self, rows: Tensor, requests: Tensor, path_tokens: Tensor) -> Tensor:
        form = [("k", rows.shape[0]), ("vocab", rows.shape[1])]
        changed = self._processor(WalkedRows(rows, requests, path_tokens))
        check_tensor(_WHERE, "processor(...)", changed, (torch.float32,), form, rows.device)
        return changed


def _tree_of(tree: DraftTree) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    links = tree.retrieve_next_token, tree.retrieve_next_sibling
    return tree.draft_tokens, tree.parents, *links


def _coins(
    tree: DraftTree, seeds: Tensor | None, coins: Tensor | None, final_coins: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return both kinds of coins for each node, float32 ``[bs, N]``."""
    (bs, n), device = tree.draft_tokens.shape, tree.draft_tokens.device
    given = [seeds is not None, coins is not None, final_coins is not None]
    if given not in ([True, False, False], [False, True, True]):
        names = ("seeds", "coins", "final_coins")
        got = [name for name, there in zip(names, given, strict=True) if there]
        fix = "Pass seeds=, or both coins= and final_coins="
        what = "either seeds, or coins and final_coins"
        raise ArgumentValueError(describe(_WHERE, "the source of coins", got, what, fix))
    if seeds is not None:
        check_tensor(_WHERE, "seeds", seeds, (torch.int64,), [("bs", bs)], device)
        # A node's coins decide the token after it.
        positions = tree.positions.view(bs, n) + 1
        ours, last = draw_coins(seeds, positions, [CoinPurpose.ACCEPT, CoinPurpose.RESIDUAL])
        return ours, last
    assert coins is not None
    assert final_coins is not None
    form = [("bs", bs), ("N", n)]
    check_tensor(_WHERE, "coins", coins, (torch.float32,), form, device)
    check_tensor(_WHERE, "final_coins", final_coins, (torch.float32,), form[:1], device)
    if may_read(coins):
        fix = "Draw them with torch.rand, or pass seeds"
        for name, values in (("coins", coins), ("final_coins", final_coins)):
            check_range(_WHERE, name, values, 0, 1, "a number in [0, 1)", fix)
    return coins, final_coins.unsqueeze(1).expand(bs, n)


def _check(
    tree: DraftTree,
    logits: Tensor,
    params: SamplingParams,
    threshold_single: object,
    threshold_acc: object,
    processor: object,
) -> None:
    check_tree(_WHERE, tree)
    check_logits(_WHERE, "logits", logits, tree)
    check_instance(_WHERE, "params", params, SamplingParams, "SamplingParams.of")
    params.check(_WHERE, len(tree.draft_tokens), tree.draft_tokens.device)
    check_rules(_WHERE, threshold_single, threshold_acc, processor)


def check_rules(where: str, threshold_single: object, threshold_acc: object, proc: object) -> None:
    """Raise unless thresholds and logit processor are as ``verify_sampling`` takes them."""
    thresholds = {"threshold_single": threshold_single, "threshold_acc": threshold_acc}
    for name, value in thresholds.items():
        fix = "Pass 1.0 for the target's own distribution"
        if not is_number(value):
            raise ArgumentTypeError(describe(where, name, value, "a number in [0, 1]", fix))
        if not 0 <= value <= 1:
            raise ArgumentValueError(describe(where, name, value, "a number in [0, 1]", fix))
    fix = "Pass a function of WalkedRows, or a HostLogitProcessor"
    check_callable(where, "processor", proc, fix)
