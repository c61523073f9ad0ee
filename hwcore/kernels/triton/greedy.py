"""The greedy walk of the target through a draft tree."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from hwcore.kernels.triton import launching
from hwcore.kernels.triton.rows import first_of, highest_of, joined_highest, part_of, valid_token
from hwcore.kernels.triton.tuning import TUNED, splits_of_a_row
from hwcore.kernels.triton.walk import Walk, begin_walk, end_walk, note_level

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["verify_tree_greedy"]

_NAME = "verify_tree_greedy"


def verify_tree_greedy(
    draft_tokens: Tensor,
    parents: Tensor,
    next_token: Tensor,
    next_sibling: Tensor,
    target: Tensor,
    spec_steps: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Walk from the root to the first child whose token is the target's, as the reference does.

    Notes
    -----
    One launch, one program a request. From logits with few requests: one launch a level for each,
    and one before it in which several programs read each row. Mutates: none. Host sync: no.
    Graph-safe: yes.
    """
    walk = Walk(draft_tokens, parents, spec_steps)
    given = not target.is_floating_point()
    vocab = 0 if given else target.shape[2]
    splits = 1 if given else splits_of_a_row(walk.batch, vocab)
    wide = torch.float64 if target.dtype == torch.float64 else torch.float32
    tops = target.new_empty(walk.batch, splits, dtype=wide)
    found = target.new_empty(walk.batch, splits, dtype=torch.int32)
    strides = (*target.stride(), 0) if given else target.stride()
    sizes = {"SPLITS": splits, "BLOCK": TUNED[_NAME].block}
    for first, last in walk.launches(splits):
        sizes["FIRST"] = first == 0
        if splits > 1:
            reading = (target, walk.at, tops, found, vocab, *strides)
            launching.launch(_read_rows, _NAME, (walk.batch, splits), *reading, **sizes)
        launching.launch(
            _walk,
            _NAME,
            (walk.batch,),
            target,
            tops,
            found,
            *walk.trees,
            *walk.outputs,
            vocab,
            *strides,
            first,
            last,
            GIVEN=given,
            **walk.sizes,
            **sizes,
        )
    return walk.results


@triton.jit
def _read_rows(
    logits,
    at,
    tops,
    found,
    vocab,
    request_stride,
    node_stride,
    token_stride,
    FIRST: tl.constexpr,
    SPLITS: tl.constexpr,
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
        top, token = highest_of(row, token_stride, begin, end, tops.dtype.element_ty, BLOCK)
        tl.store(tops + request * SPLITS + split, top)
        tl.store(found + request * SPLITS + split, token)


@triton.jit(do_not_specialize=["first", "last"])
def _walk(
    target,
    tops,
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
    first,
    last,
    GIVEN: tl.constexpr,
    FIRST: tl.constexpr,
    SPLITS: tl.constexpr,
    NODES: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, NODES)
    there = column < nodes
    place = draft_tokens + request * draft_stride + column.to(tl.int64) * draft_step
    token_of = tl.load(place, mask=there, other=-1).to(tl.int64)
    place = parents + request * parent_stride + column.to(tl.int64) * parent_step
    parent_of = tl.load(place, mask=there, other=-1).to(tl.int64)
    node, said, path = begin_walk(
        request, predict, index, at, nodes, spec_steps, FIRST, NODES, STEPS
    )
    level = first
    while (node >= 0) & (level < last):
        row = target + request * request_stride + node * node_stride
        if GIVEN:
            token = tl.load(row).to(tl.int64)
        elif SPLITS == 1:
            top, highest = highest_of(row, token_stride, 0, vocab, tops.dtype.element_ty, BLOCK)
            token = valid_token(top, highest)
        else:
            part = request * SPLITS + tl.arange(0, SPLITS)
            top, highest = joined_highest(tl.load(tops + part), tl.load(found + part))
            token = valid_token(top, highest)
        child = first_of((parent_of == node) & (token_of == token) & there, column, nodes)
        node, said, path = note_level(
            request, node, level, token, child.to(tl.int64), said, path, lens, bonus, status,
            nodes, vocab, NODES, STEPS,
        )  # fmt: skip
        level += 1
    end_walk(request, node, said, path, predict, index, at, nodes, spec_steps, NODES, STEPS)
