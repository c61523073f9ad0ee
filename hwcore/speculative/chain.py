"""Chain verification: drafts sampled one after the other, held against what they came from."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from hwcore._checks import check_instance, check_tensor, check_values, may_read
from hwcore.activation import current_backend
from hwcore.errors import ArgumentTypeError, ArgumentValueError, describe
from hwcore.kernels.distribution import draw
from hwcore.kernels.thresholds import reads_are_free
from hwcore.kernels.torch_ops import explains_missing, torch_ops
from hwcore.speculative.chain_rules import (
    Chain,
    TargetRows,
    at_nodes,
    by_block,
    by_token,
    leftover,
)
from hwcore.speculative.coins import CoinPurpose, block_positions, draw_coins
from hwcore.speculative.sampling_params import SamplingParams
from hwcore.speculative.verify import VerifyResult, VerifyStatus

if TYPE_CHECKING:
    from torch import Tensor

    from hwcore.backend import Backend
    from hwcore.speculative.processors import LogitProcessor, WalkedRows

__all__ = ["verify_chain"]

_WHERE = "verify_chain"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_F32, _INT64 = (torch.float32,), (torch.int64,)


def verify_chain(
    candidates: Tensor,
    logits: Tensor,
    draft_probs: Tensor,
    params: SamplingParams,
    *,
    seq_lens: Tensor | None = None,
    seeds: Tensor | None = None,
    coins: Tensor | None = None,
    final_coins: Tensor | None = None,
    block_verification: bool = False,
    processor: LogitProcessor | None = None,
    backend: Backend | None = None,
) -> VerifyResult:
    """Accept a chain of sampled drafts as far as the target's distribution allows.

    Called once a step, after the target's forward over the chain, where each draft was sampled from
    a distribution that is at hand. The tokens of one step after the other are distributed as the
    target's own samples are, whatever the draft's distribution is; only how many are accepted
    depends on it. Where drafts were chosen and not sampled, use ``verify_sampling``.

    A draft is accepted if ``coin * q < p``. Where the first is rejected, the target's token is
    drawn from what it has beyond the draft, ``max(p - q, 0)``; after the last, from ``p``.

    Parameters
    ----------
    candidates : Tensor, int64, [bs, S]
        The root, then ``S - 1`` drafts; in [0, V).
    logits : Tensor, float32, bfloat16, float16 or float64, [bs, S, V]
        The target's, after each of them. Rows after a rejected draft do not matter.
    draft_probs : Tensor, float32, [bs, S - 1, V]
        Distribution that each draft was sampled from. What is no probability (NaN, not above 0,
        above 1) counts as 0, and a draft of such a probability is rejected.
    params : SamplingParams
        Of the target, per request. Temperature 0: greedy, a draft is accepted iff it is the
        target's argmax, whatever ``draft_probs`` says.
    seq_lens : Tensor, int64 or int32, [bs], with ``seeds``
        Tokens in the KV cache before the root, which is the root's position.
    seeds : Tensor, int64, [bs]
        Coins are drawn from them: see :func:`draw_coins`.
    coins : Tensor, float32, [bs, S], in place of ``seeds``
        In [0, 1), column ``s`` for the draft that follows node ``s``; the last is not used.
    final_coins : Tensor, float32, [bs], with ``coins``
        In [0, 1), for the token that the target draws itself.
    block_verification : bool
        Decide on the prefixes of the chain as a whole. Distributed alike, never fewer drafts in
        expectation, but every row of the chain is read. Drafts must then be sampled with the coins
        of :func:`block_positions`.
    processor : callable, optional
        Takes the :class:`WalkedRows` of a step and returns its logits changed, [k, V], before
        temperature; called for each step, and on a device once more. ``p`` is then the processed
        distribution. See :class:`HostLogitProcessor` for one that runs on the host.
    backend : Backend, optional
        Default the current one.

    Returns
    -------
    VerifyResult
        Of the chain as a tree: node ``s + 1`` follows node ``s``, ``spec_steps`` is ``S - 1``. An
        empty batch gives empty tensors.

    Raises
    ------
    ArgumentTypeError
        If an argument's type, dtype, rank or device is wrong.
    ArgumentValueError
        If a shape does not fit, coins come from nowhere or from two sources, or a value is out of
        range (content: CPU arguments always, others under ``HWCORE_DEBUG=1``).
    CaptureError
        If a processor on the host is met while a graph is being captured.
    CapabilityError
        If the device lacks a torch operation, and its plugin said that it does not.

    Notes
    -----
    NaN, +inf or nothing but -inf in a row that is needed ends that request's walk there: status
    INVALID_LOGITS, bonus token V - 1. No other request changes by a bit. A block ends before such a
    row if it can: of the shorter block all that is said above holds.

    Where ``p`` and ``q`` agree to the last bit, nothing is left over. Acceptance was certain there
    but for rounding, or the draft did not come from ``q``; the token is then drawn from ``p``, the
    only distribution at hand that the target has.

    Source: Leviathan et al. (2023), Sun et al. (2024), and the semantics of SGLang's chain kernel
    but for its fall to token ``V - 1`` by rounding. Mutates: none. Host sync: no (under
    ``HWCORE_DEBUG=1`` yes, and with a processor on the host). Graph-safe: yes, with a processor
    that is.
    """
    _check(candidates, logits, draft_probs, params, processor)
    _check_coins(candidates, seq_lens, seeds, coins, final_coins)
    if may_read(logits):
        _check_content(candidates, logits.shape[2], seq_lens, coins, final_coins)
    backend = backend or current_backend()
    ops = torch_ops(backend)
    size = candidates.shape[1]
    greedy = params.temperatures == 0
    with explains_missing(backend), torch.no_grad():
        ends = None
        if seeds is not None and seq_lens is not None:
            coins, ends = _drawn(seeds, seq_lens, size, block_verification)
        assert coins is not None
        drafts = candidates[:, 1:]
        # What lies beyond the vocabulary has no chance with the target: `target_chance`.
        known = drafts.clamp(0, logits.shape[2] - 1).unsqueeze(2)
        chances = ops.gather(draft_probs, 2, known).squeeze(2)
        chances = torch.where((chances > 0) & (chances <= 1), chances, 0.0)
        chances = torch.where(greedy.unsqueeze(1), 1.0, chances)
        chain = Chain(drafts, chances, coins, draft_probs, greedy, ops)
        checked = None if processor is None else functools.partial(_processed, processor)
        target = TargetRows(candidates, logits, params, checked, ops)
        accepted, ratios = (by_block if block_verification else by_token)(chain, target)
        if ends is not None:
            final_coins = ops.gather(ends, 1, accepted.unsqueeze(1)).squeeze(1)
        assert final_coins is not None
        bonus, valid = _end(chain, target, accepted, ratios, final_coins)
        return _result(candidates, accepted, bonus, valid)


def _end(
    chain: Chain, target: TargetRows, nodes: Tensor, ratios: Tensor | None, coins: Tensor
) -> tuple[Tensor, Tensor]:
    """Draw each request's last token ``[bs]``; say whether its logits could be sampled from."""
    ops, steps = chain.ops, chain.drafts.shape[1]
    bonus, valid = torch.zeros_like(nodes), torch.zeros_like(chain.greedy)
    for requests, probs, good in target.ends(nodes):

        def of(values: Tensor, requests: Tensor | None = requests) -> Tensor:
            return values if requests is None else values.index_select(0, requests)

        if steps > 0:
            node = of(nodes)
            drafted = at_nodes(chain.draft_probs, node.clamp(max=steps - 1), ops, requests)
            whole = of(chain.greedy) | (node == steps)
            beyond = leftover(probs, drafted, None if ratios is None else of(ratios), whole)
            some = ops.amax(beyond, 1, keepdim=True) > 0
            plain = reads_are_free(some) and bool(some.all())
            probs = beyond if plain else torch.where(some, beyond, probs)
        drawn = torch.where(good, draw(probs, of(coins), ops), probs.shape[1] - 1)
        if requests is None:
            return drawn, good
        bonus[requests], valid[requests] = drawn, good
    return bonus, valid


def _processed(processor: LogitProcessor, rows: WalkedRows) -> Tensor:
    """Return what a processor makes of rows, checked."""
    changed = processor(rows)
    k, vocabulary = rows.logits.shape
    name, form = "what the processor returned", [("k", k), ("V", vocabulary)]
    check_tensor(_WHERE, name, changed, _F32, form, rows.logits.device)
    return changed


def _drawn(
    seeds: Tensor, seq_lens: Tensor, size: int, block_verification: bool
) -> tuple[Tensor, Tensor]:
    """Return the coins of the drafts that follow each node, and of tokens drawn there."""
    node = torch.arange(size, device=seeds.device)
    after = seq_lens.to(torch.int64).unsqueeze(1) + node + 1
    if not block_verification:
        coins = draw_coins(seeds, after, (CoinPurpose.ACCEPT, CoinPurpose.RESIDUAL))
        return coins[0], coins[1]
    held = block_positions(seq_lens, size)
    return (
        draw_coins(seeds, held, CoinPurpose.ACCEPT),
        draw_coins(seeds, after, CoinPurpose.RESIDUAL),
    )


def _result(candidates: Tensor, accepted: Tensor, bonus: Tensor, valid: Tensor) -> VerifyResult:
    bs, size = candidates.shape
    node = torch.arange(size, device=candidates.device)
    end = accepted.unsqueeze(1)
    following = torch.cat([candidates[:, 1:], candidates[:, :1]], 1)
    following = torch.where(node < end, following, 0)
    predict = torch.where(node == end, bonus.unsqueeze(1), following)
    flat = node + size * torch.arange(bs, device=candidates.device).unsqueeze(1)
    return VerifyResult(
        predict=predict.to(torch.int32).view(-1),
        accept_index=torch.where(node <= end, flat, -1).to(torch.int32),
        accept_lens=(accepted + 1).to(torch.int32),
        bonus_tokens=bonus,
        status=torch.where(valid, VerifyStatus.OK, VerifyStatus.INVALID_LOGITS).to(torch.int32),
    )


def _check(
    candidates: Tensor,
    logits: Tensor,
    draft_probs: Tensor,
    params: SamplingParams,
    processor: object,
) -> None:
    check_tensor(_WHERE, "candidates", candidates, _INT64, [("bs", None), ("S", None)])
    (bs, size), device = candidates.shape, candidates.device
    if size == 0:
        fix = "Give each request its root token in column 0"
        got, expected = list(candidates.shape), "[bs, S] with S at least 1"
        raise ArgumentValueError(describe(_WHERE, "candidates.shape", got, expected, fix))
    form = [("bs", bs), ("S", size), ("V", None)]
    check_tensor(_WHERE, "logits", logits, _FLOATS, form, device)
    vocabulary = logits.shape[2]
    if vocabulary == 0:
        fix = "Pass the logits of a whole vocabulary"
        raise ArgumentValueError(
            describe(_WHERE, "logits.shape", list(logits.shape), "V >= 1", fix)
        )
    form = [("bs", bs), ("S - 1", size - 1), ("V", vocabulary)]
    check_tensor(_WHERE, "draft_probs", draft_probs, _F32, form, device)
    check_instance(_WHERE, "params", params, SamplingParams, "SamplingParams.of")
    params.check(_WHERE, bs, device)
    if processor is not None and not callable(processor):
        fix = "Pass a function of WalkedRows, or a HostLogitProcessor"
        raise ArgumentTypeError(describe(_WHERE, "processor", processor, "a callable", fix))


def _check_coins(
    candidates: Tensor,
    seq_lens: Tensor | None,
    seeds: Tensor | None,
    coins: Tensor | None,
    final_coins: Tensor | None,
) -> None:
    (bs, size), device = candidates.shape, candidates.device
    given = [
        name
        for name, value in (("seeds", seeds), ("coins", coins), ("final_coins", final_coins))
        if value is not None
    ]
    if given not in (["seeds"], ["coins", "final_coins"]):
        fix = "Pass seeds and seq_lens, or coins and final_coins"
        expected = "either seeds, or coins and final_coins"
        raise ArgumentValueError(describe(_WHERE, "the source of coins", given, expected, fix))
    if seeds is not None:
        check_tensor(_WHERE, "seeds", seeds, _INT64, [("bs", bs)], device)
        lengths = (torch.int64, torch.int32)
        check_tensor(_WHERE, "seq_lens", seq_lens, lengths, [("bs", bs)], device)
    else:
        check_tensor(_WHERE, "coins", coins, _F32, [("bs", bs), ("S", size)], device)
        check_tensor(_WHERE, "final_coins", final_coins, _F32, [("bs", bs)], device)


def _check_content(
    candidates: Tensor,
    vocabulary: int,
    seq_lens: Tensor | None,
    coins: Tensor | None,
    final_coins: Tensor | None,
) -> None:
    bad = (candidates < 0) | (candidates >= vocabulary)
    fix = "Draft with the target's own tokenizer"
    expected = f"a token in [0, {vocabulary}), the vocabulary of logits"
    check_values(_WHERE, "candidates", candidates, bad, expected, fix)
    for name, value in (("coins", coins), ("final_coins", final_coins)):
        if value is not None:
            fix = "Draw them with draw_coins"
            bad = ~((value >= 0) & (value < 1))
            check_values(_WHERE, name, value, bad, "a coin in [0, 1)", fix)
    if seq_lens is not None:
        fix = "Pass the tokens in the KV cache before the root"
        check_values(_WHERE, "seq_lens", seq_lens, seq_lens < 0, "at least 0", fix)
