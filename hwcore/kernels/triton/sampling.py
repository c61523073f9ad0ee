"""The sampled walk of the target through a draft tree."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from hwcore.kernels.triton import launching
from hwcore.kernels.triton.distribution import draw, is_kept, threshold
from hwcore.kernels.triton.rows import (
    first_of,
    highest_of,
    joined_highest,
    joined_softmax,
    part_of,
    scaled,
    softmax_of,
    valid_token,
)
from hwcore.kernels.triton.tuning import TUNED, splits_of_a_row
from hwcore.kernels.triton.walk import Walk, begin_walk, end_walk, note_level

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["verify_tree_sampling"]

_NAME = "verify_tree_sampling"


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Walk from the root as the coins decide, then draw one more token, as the reference does.

    Notes
    -----
    One launch, one program a request. With few requests: one launch a level, and one before it in
    which several programs read each row; what top-k and top-p look for, and the last token, are
    then still found by one program a request. No scratch but a few numbers a request.

    It adds up in another order than the reference: where a coin is within rounding of a bound the
    two may decide differently. Mutates: none. Host sync: no. Graph-safe: yes.
    """
    walk = Walk(draft_tokens, parents, spec_steps)
    vocab = logits.shape[2]
    splits = splits_of_a_row(walk.batch, vocab)
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    tops = logits.new_empty(walk.batch, splits, dtype=wide)
    totals = logits.new_empty(walk.batch, splits, dtype=torch.float32)
    found = logits.new_empty(walk.batch, splits, dtype=torch.int32)
    heat = temperatures.contiguous()
    filters = [None if each is None else each.contiguous() for each in (top_ks, top_ps, min_ps)]
    rows = (vocab, *logits.stride())
    sizes = {"SPLITS": splits, "ANY_GREEDY": any_greedy, "BLOCK": TUNED[_NAME].block}
    for first, last in walk.launches(splits):
        sizes["FIRST"] = first == 0
        if splits > 1:
            reading = (logits, heat, walk.at, tops, totals, found, *rows)
            launching.launch(_read_rows, _NAME, (walk.batch, splits), *reading, **sizes)
        launching.launch(
            _walk,
            _NAME,
            (walk.batch,),
            logits,
            heat,
            *filters,
            coins,
            final_coins,
            tops,
            totals,
            found,
            *walk.trees,
            *walk.outputs,
            *rows,
            *coins.stride(),
            *final_coins.stride(),
            float(threshold_single),
            max(float(threshold_acc), 1e-9),
            first,
            last,
            BY_K=top_ks is not None,
            BY_P=top_ps is not None,
            BY_MIN=min_ps is not None,
            **walk.sizes,
            **sizes,
        )
    return walk.results


@triton.jit
def _read_rows(
    logits,
    temperatures,
    at,
    tops,
    totals,
    found,
    vocab,
    request_stride,
    node_stride,
    token_stride,
    FIRST: tl.constexpr,
    SPLITS: tl.constexpr,
    ANY_GREEDY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Read a part of the row at each request's node."""
    request, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    node = request * 0
    if not FIRST:
        node = tl.load(at + request)
    if node >= 0:
        row = logits + request * request_stride + node * node_stride
        begin, end = part_of(vocab, split, SPLITS)
        out = request * SPLITS + split
        temperature = tl.load(temperatures + request)
        if ANY_GREEDY & (temperature <= 0):
            wide: tl.constexpr = tops.dtype.element_ty
            best, token = highest_of(row, token_stride, begin, end, wide, BLOCK)
            tl.store(tops + out, best)
            tl.store(found + out, token)
        else:
            divisor = tl.maximum(temperature, 1e-20)
            top, total = softmax_of(row, token_stride, begin, end, divisor, BLOCK)
            tl.store(tops + out, top)
            tl.store(totals + out, total)


@triton.jit(do_not_specialize=["first", "last", "threshold_single", "threshold_acc"])
def _walk(
    logits,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    coins,
    final_coins,
    tops,
    totals,
    found,
    draft_tokens,
    parents,
    draft_stride,
    draft_step,
    parent_stride,
    parent_step,
    nodes,
    spec_steps,
    predict,
    index,
    lens,
    bonus,
    status,
    at,
    vocab,
    request_stride,
    node_stride,
    token_stride,
    coin_stride,
    coin_step,
    final_stride,
    final_step,
    threshold_single,
    threshold_acc,
    first,
    last,
    BY_K: tl.constexpr,
    BY_P: tl.constexpr,
    BY_MIN: tl.constexpr,
    FIRST: tl.constexpr,
    SPLITS: tl.constexpr,
    ANY_GREEDY: tl.constexpr,
    NODES: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, NODES)
    there = column < nodes
    tokens = draft_tokens + request * draft_stride
    token_of = tl.load(tokens + column.to(tl.int64) * draft_step, mask=there, other=-1)
    token_of = token_of.to(tl.int64)
    tree = parents + request * parent_stride
    parent_of = tl.load(tree + column.to(tl.int64) * parent_step, mask=there, other=-1)
    parent_of = parent_of.to(tl.int64)
    # Nobody's child: a node whose token an earlier child of its parent has, or that has none.
    again = (token_of < 0) | (token_of >= vocab)
    for earlier in range(nodes):
        token = tl.load(tokens + tl.cast(earlier, tl.int64) * draft_step).to(tl.int64)
        parent = tl.load(tree + tl.cast(earlier, tl.int64) * parent_step).to(tl.int64)
        again = again | ((column > earlier) & (token_of == token) & (parent_of == parent))
    parent_of = tl.where(again, -2, parent_of)

    temperature = tl.load(temperatures + request)
    divisor = tl.maximum(temperature, 1e-20)
    node, said, path = begin_walk(
        request, predict, index, at, nodes, spec_steps, FIRST, NODES, STEPS
    )
    level = first
    while (node >= 0) & (level < last):
        row = logits + request * request_stride + node * node_stride
        part = request * SPLITS + tl.arange(0, SPLITS)
        is_child = (parent_of == node) & (level < spec_steps)
        if ANY_GREEDY & (temperature <= 0):
            if SPLITS == 1:
                wide: tl.constexpr = tops.dtype.element_ty
                best, highest = highest_of(row, token_stride, 0, vocab, wide, BLOCK)
            else:
                best, highest = joined_highest(tl.load(tops + part), tl.load(found + part))
            token = valid_token(best, highest)
            child = first_of(is_child & (token_of == token), column, nodes)
        else:
            if SPLITS == 1:
                top, total = softmax_of(row, token_stride, 0, vocab, divisor, BLOCK)
            else:
                parts = tl.load(tops + part).to(tl.float32)
                top, total = joined_softmax(parts, tl.load(totals + part))
            token = request * 0 - 1
            child = nodes
            if (top < float("inf")) & (total > 0):
                k, p, floor = 0, 1.0, 0.0
                if BY_K:
                    k = tl.load(top_ks + request)
                if BY_P:
                    p = tl.load(top_ps + request)
                if BY_MIN:
                    floor = tl.load(min_ps + request)
                least, total = threshold(
                    row, token_stride, vocab, divisor, top, total, k, p, floor,
                    BY_K, BY_P, BY_MIN, BLOCK,
                )  # fmt: skip
                logit = scaled(row, token_stride, token_of, is_child, divisor)
                chance = tl.where(is_kept(logit, least), tl.exp(logit - top), 0.0) / total
                chance = tl.where(is_child, chance, 0.0)
                coin = tl.load(coins + request * coin_stride + node * coin_step)
                accepts = coin < tl.cumsum(chance, 0) / threshold_acc
                # At 1 it accepts nothing more: a chance of 1 is beyond every coin.
                accepts = accepts | ((threshold_single < 1) & (chance >= threshold_single))
                child = first_of(accepts & (chance > 0), column, nodes)
                if child < nodes:
                    token = tl.load(tokens + child.to(tl.int64) * draft_step).to(tl.int64)
                else:
                    coin = tl.load(final_coins + request * final_stride + node * final_step)
                    token = draw(
                        row, token_stride, vocab, divisor, top, least, coin,
                        is_child, token_of, tokens, draft_step, nodes, BLOCK,
                    )  # fmt: skip
                    if token < 0:
                        # By rounding nothing is left; then it is the last child, which had it all.
                        final = tl.max(tl.where(chance > 0, column, 0), 0)
                        token = tl.load(tokens + final.to(tl.int64) * draft_step).to(tl.int64)
        node, said, path = note_level(
            request, node, level, token, child.to(tl.int64), said, path, lens, bonus, status,
            nodes, vocab, NODES, STEPS,
        )  # fmt: skip
        level += 1
    end_walk(request, node, said, path, predict, index, at, nodes, spec_steps, NODES, STEPS)
