"""Positions on three axes, from those of the text and what each request is ahead of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from hwcore.kernels.triton import launching
from hwcore.kernels.triton.tuning import TUNED

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["mrope_positions"]


def mrope_positions(
    deltas: Tensor, rows: Tensor, positions: Tensor, starts: Tensor | None
) -> Tensor:
    """Add to each position its request's delta, for three axes, as the reference of this name does.

    Notes
    -----
    One launch. Mutates: none. Host sync: no. Graph-safe: yes.
    """
    bs, tokens = rows.shape[0], positions.shape[0]
    if bs == 0:
        return positions.new_zeros(3, tokens)
    out = positions.new_empty(3, tokens)
    block = TUNED["mrope_positions"].block
    launching.launch(
        _mrope_positions,
        "mrope_positions",
        (triton.cdiv(tokens, block),),
        deltas,
        rows,
        positions,
        starts,
        out,
        bs,
        tokens,
        bs.bit_length(),
        deltas.stride(0),
        rows.stride(0),
        positions.stride(0),
        0 if starts is None else starts.stride(0),
        STARTS=starts is not None,
        BLOCK=block,
    )
    return out


@triton.jit
def _mrope_positions(
    deltas,
    rows,
    positions,
    starts,
    out,
    bs,
    tokens,
    rounds,
    delta_step,
    row_step,
    position_step,
    start_step,
    STARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = token < tokens
    if STARTS:
        # The last request that starts at the token or before it, by halving.
        request = tl.zeros([BLOCK], tl.int64)
        beyond = request + bs
        for _ in range(rounds):
            middle = (request + beyond) // 2
            start = tl.load(starts + middle * start_step, mask=there, other=0)
            begun = start.to(tl.int64) <= token
            request, beyond = tl.where(begun, middle, request), tl.where(begun, beyond, middle)
    else:
        request = token // (tokens // bs)
    row = tl.load(rows + request * row_step, mask=there, other=0).to(tl.int64)
    ahead = tl.load(deltas + row * delta_step, mask=there, other=0)
    moved = tl.load(positions + token * position_step, mask=there, other=0) + ahead
    for _ in tl.static_range(3):
        tl.store(out + token, moved, mask=there)
        out += tokens
