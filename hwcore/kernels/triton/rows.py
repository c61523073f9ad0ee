"""Reading a row of logits: its highest, and its softmax as a highest and a sum.

``row`` is a pointer, ``step`` what is between two tokens; ``begin`` and ``end`` are tokens. A row
that is not valid (NaN or +inf in it, or nothing but -inf) has no finite highest.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "first_of",
    "highest_of",
    "joined_highest",
    "joined_softmax",
    "part_of",
    "scaled",
    "softmax_of",
    "valid_token",
]


@triton.jit
def first_of(marks, place, none):
    """Return the lowest marked place; ``none`` where there is none."""
    return tl.min(tl.where(marks, place, none), 0)


@triton.jit
def part_of(vocab, split, SPLITS: tl.constexpr):
    """Return where a part of the vocabulary begins and ends; the parts are in its order."""
    length = tl.cdiv(vocab, SPLITS)
    return split * length, tl.minimum(vocab, (split + 1) * length)


@triton.jit
def valid_token(top, token):
    """Return a row's highest token as int64; -1 where the row is not valid."""
    return tl.where((top > float("-inf")) & (top < float("inf")), token, -1).to(tl.int64)


@triton.jit
def scaled(row, step, token, there, divisor):
    """Return logits over temperature in float32, -inf where there is no token, +inf for NaN."""
    logit = tl.load(row + token.to(tl.int64) * step, mask=there, other=float("-inf"))
    found = tl.div_rn(logit.to(tl.float32), divisor)
    return tl.where(found != found, float("inf"), found)


@triton.jit
def highest_of(row, step, begin, end, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Return the highest logit, in the type ``WIDE``, and the lowest token that has it."""
    lane = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], float("-inf"), WIDE)
    found = tl.zeros([BLOCK], tl.int32)
    for first in range(begin, end, BLOCK):
        token = first + lane
        place = row + token.to(tl.int64) * step
        logit = tl.load(place, mask=token < end, other=float("-inf")).to(WIDE)
        logit = tl.where(logit != logit, float("inf"), logit)
        higher = logit > top
        top, found = tl.where(higher, logit, top), tl.where(higher, token, found)
    return joined_highest(top, found)


@triton.jit
def joined_highest(tops, tokens):
    """Join the highest logits of parts of a row; of equal ones the lowest token counts."""
    top = tl.max(tops, 0)
    return top, first_of(tops == top, tokens, 0x7FFFFFFF)


@triton.jit
def softmax_of(row, step, begin, end, divisor, BLOCK: tl.constexpr):
    """Return the highest of the scaled logits, and the sum of their exponentials relative to it."""
    lane = tl.arange(0, BLOCK)
    # Not -inf: what is relative to it would be NaN. Nothing finite lies below.
    top = tl.full([BLOCK], -3.4028234663852886e38, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(begin, end, BLOCK):
        token = first + lane
        logit = scaled(row, step, token, token < end, divisor)
        higher = tl.maximum(top, logit)
        total = total * tl.exp(top - higher) + tl.exp(logit - higher)
        top = higher
    return joined_softmax(top, total)


@triton.jit
def joined_softmax(tops, totals):
    """Join the softmax of parts of a row. Where all is -inf, the sum is 0."""
    top = tl.max(tops, 0)
    return top, tl.sum(totals * tl.exp(tops - top), 0)
