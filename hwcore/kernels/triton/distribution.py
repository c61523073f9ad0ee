"""What top-k, top-p and min-p keep of a row, found without sorting; and a draw from what is left.

Each is a threshold on the scaled logit, as in the reference. Float32 numbers are compared by their
order, an integer: then halving the range between two of them ends.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hwcore.kernels.triton.rows import first_of, scaled

__all__ = ["draw", "is_kept", "threshold"]

_WHOLE = tl.constexpr(2**40)
"""The mass 1 in fixed point, so that the order of adding up does not matter."""

_NOTHING_BELOW = tl.constexpr(-0x7F800001)  # the order of -inf


@triton.jit
def order_of(number):
    """Return int32 numbers that are in the order of float32 ones; -0 counts as 0."""
    bits = tl.where(number == 0, 0.0, number).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def is_kept(logit, least):
    """Say which scaled logits are at or above a threshold, which is given by its order."""
    return order_of(logit) >= least


@triton.jit
def _amount(
    row, step, vocab, divisor, top, total, middle, BY_MASS: tl.constexpr, BLOCK: tl.constexpr
):
    """Return the number or the mass of the tokens at or above ``middle``, and who is nearest.

    Nearest: the lowest order at or above it, and the highest one below.
    """
    lane = tl.arange(0, BLOCK)
    reached = tl.zeros([BLOCK], tl.int64)
    above = tl.full([BLOCK], 0x7FFFFFFF, tl.int32)
    below = tl.full([BLOCK], -0x7F800001, tl.int32)
    for first in range(0, vocab, BLOCK):
        token = first + lane
        logit = scaled(row, step, token, token < vocab, divisor)
        order = order_of(logit)
        enough = (order >= middle) & (token < vocab)
        if BY_MASS:
            units = (tl.exp(logit - top) / total * _WHOLE).to(tl.int64)
            reached += tl.where(enough, units, 0)
        else:
            reached += tl.where(enough, 1, 0)
        above = tl.minimum(above, tl.where(enough, order, 0x7FFFFFFF))
        below = tl.maximum(below, tl.where(enough, -0x7F800001, order))
    return tl.sum(reached, 0), tl.min(above, 0).to(tl.int64), tl.max(below, 0).to(tl.int64)


@triton.jit
def _highest_that_reaches(
    need, low, row, step, vocab, divisor, top, total, BY_MASS: tl.constexpr, BLOCK: tl.constexpr
):
    """Return the highest order at or above which tokens reach ``need``; at ``low`` they do.

    Each round goes on to a token's own order, and so ends before 32 rounds have halved the range.
    """
    high = order_of(top).to(tl.int64) + 1
    while high - low > 1:
        middle = (low + high) >> 1
        reached, above, below = _amount(
            row, step, vocab, divisor, top, total, middle, BY_MASS, BLOCK
        )
        good = reached >= need
        low, high = tl.where(good, above, low), tl.where(good, high, below + 1)
    return low


@triton.jit
def threshold(
    row,
    step,
    vocab,
    divisor,
    top,
    total,
    k,
    p,
    floor,
    BY_K: tl.constexpr,
    BY_P: tl.constexpr,
    BY_MIN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return the order of the least scaled logit to keep, and the sum of the exponentials kept."""
    least = tl.full([], _NOTHING_BELOW, tl.int64)
    whole = tl.full([], _WHOLE, tl.int64)
    cut = vocab < 0
    if BY_K:
        if (k >= 1) & (k < vocab):
            cut = vocab > 0
            least = _highest_that_reaches(
                k, least, row, step, vocab, divisor, top, total, False, BLOCK
            )
            if BY_P:
                whole, _, _ = _amount(row, step, vocab, divisor, top, total, least, True, BLOCK)
    if BY_P:
        if p < 1:
            cut = vocab > 0
            need = tl.maximum((whole.to(tl.float32) * p).to(tl.int64), 1)
            least = _highest_that_reaches(
                need, least, row, step, vocab, divisor, top, total, True, BLOCK
            )
    if BY_MIN:
        if floor > 0:
            cut = vocab > 0
            least = tl.maximum(least, order_of(top + tl.log(floor)).to(tl.int64))
    if cut:
        lane = tl.arange(0, BLOCK)
        kept = tl.zeros([BLOCK], tl.float32)
        for first in range(0, vocab, BLOCK):
            token = first + lane
            logit = scaled(row, step, token, token < vocab, divisor)
            kept += tl.where(is_kept(logit, least), tl.exp(logit - top), 0.0)
        total = tl.sum(kept, 0)
    return least, total


@triton.jit
def _weights(
    first,
    row,
    step,
    vocab,
    divisor,
    top,
    least,
    is_child,
    token_of,
    tokens,
    draft_step,
    nodes,
    BLOCK: tl.constexpr,
):
    """Return what the tokens of a block weigh: nothing if they were rejected."""
    token = first + tl.arange(0, BLOCK)
    logit = scaled(row, step, token, token < vocab, divisor)
    weight = tl.where(is_kept(logit, least), tl.exp(logit - top), 0.0)
    rejected = is_child & (token_of >= first) & (token_of < first + BLOCK)
    if tl.max(rejected.to(tl.int32), 0) > 0:
        column = tl.arange(0, is_child.shape[0])
        for node in range(nodes):
            is_one = tl.max((rejected & (column == node)).to(tl.int32), 0) > 0
            drafted = tl.load(tokens + tl.cast(node, tl.int64) * draft_step)
            weight = tl.where(is_one & (token == drafted), 0.0, weight)
    return weight


@triton.jit
def draw(
    row,
    step,
    vocab,
    divisor,
    top,
    least,
    coin,
    is_child,
    token_of,
    tokens,
    draft_step,
    nodes,
    BLOCK: tl.constexpr,
):
    """Return the first token beyond the share of all weights that the coin says, else the last one.

    Only tokens that weigh something count; -1 where none does. int64.
    """
    total = coin * 0
    for first in range(0, vocab, BLOCK):
        weight = _weights(
            first, row, step, vocab, divisor, top, least,
            is_child, token_of, tokens, draft_step, nodes, BLOCK,
        )  # fmt: skip
        total += tl.sum(weight, 0)
    aim = coin * total
    reached = coin * 0
    last = vocab * 0 - 1  # the last token so far that weighs something
    found = last
    start = vocab * 0
    while (start < vocab) & (found < 0):
        weight = _weights(
            start, row, step, vocab, divisor, top, least,
            is_child, token_of, tokens, draft_step, nodes, BLOCK,
        )  # fmt: skip
        token = start + tl.arange(0, BLOCK)
        last = tl.maximum(last, tl.max(tl.where(weight > 0, token, -1), 0))
        after = reached + tl.sum(weight, 0)
        if after > aim:
            # Rounding within the block may leave none beyond: then it is the block's last.
            beyond = (weight > 0) & (reached + tl.cumsum(weight, 0) > aim)
            found = first_of(beyond, token, last)
        reached = after
        start += BLOCK
    return tl.where(found < 0, last, found).to(tl.int64)
