"""What every walk through draft trees takes and gives, and how it is cut into launches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from hwcore.kernels.triton.launching import power_of_two

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Walk", "begin_walk", "end_walk", "note_level"]


class Walk:
    """Trees, and memory for the results and for where each request stands between launches.

    Attributes
    ----------
    at : Tensor, int64, [bs]
        The node that each request stands at; -1: its walk has ended.
    trees : tuple
        The trees, as the kernels take them: tokens, parents, their strides, N, ``spec_steps``.
    outputs : tuple of Tensor
        As the kernels take them; the results, and ``at``.
    sizes : dict
        Of the blocks that hold a tree's nodes, and a path.
    """

    def __init__(self, draft_tokens: Tensor, parents: Tensor, spec_steps: int) -> None:
        (self.batch, n), self._width = parents.shape, spec_steps + 1
        predict = torch.empty(self.batch * n, dtype=torch.int32, device=parents.device)
        index = predict.new_empty(self.batch, self._width)
        lens, status = predict.new_empty(self.batch), predict.new_empty(self.batch)
        bonus = torch.empty(self.batch, dtype=torch.int64, device=parents.device)
        self.at = torch.empty_like(bonus)
        self.results = predict, index, lens, bonus, status
        self.outputs = *self.results, self.at
        strides = *draft_tokens.stride(), *parents.stride()
        self.trees = draft_tokens, parents, *strides, n, spec_steps
        self.sizes = {"NODES": power_of_two(n), "STEPS": power_of_two(self._width)}

    def launches(self, splits: int) -> list[tuple[int, int]]:
        """Return the first level of each launch, and the one after its last."""
        if splits == 1:
            return [(0, self._width)]
        return [(level, level + 1) for level in range(self._width)]


@triton.jit
def begin_walk(
    request,
    predict,
    index,
    at,
    nodes,
    spec_steps,
    FIRST: tl.constexpr,
    NODES: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Return the node, the tokens after each node and the path: of a new walk, or of one begun."""
    column, step = tl.arange(0, NODES), tl.arange(0, STEPS)
    if FIRST:
        node = request * 0
        said = tl.zeros([NODES], tl.int32)
        path = tl.full([STEPS], -1, tl.int32)
    else:
        node = tl.load(at + request)
        said = tl.load(predict + request * nodes + column, mask=column < nodes, other=0)
        place = index + request * (spec_steps + 1) + step
        path = tl.load(place, mask=step <= spec_steps, other=-1)
    return node, said, path


@triton.jit
def note_level(
    request,
    node,
    level,
    token,
    child,
    said,
    path,
    lens,
    bonus,
    status,
    nodes,
    vocab,
    NODES: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Note a node and the target's token after it, -1 where the logits are not valid.

    Returns the node to go on to, -1 where the walk ends, and what has been noted.
    """
    column, step = tl.arange(0, NODES), tl.arange(0, STEPS)
    path = tl.where(step == level, (request * nodes + node).to(tl.int32), path)
    last = tl.where(token < 0, vocab - 1, token)
    said = tl.where(column == node, last.to(tl.int32), said)
    # Each level overwrites what the one before it took for the end.
    tl.store(bonus + request, last)
    tl.store(status + request, tl.where(token < 0, 1, 0))
    tl.store(lens + request, level + 1)
    return tl.where(child < nodes, child, -1), said, path


@triton.jit
def end_walk(
    request,
    node,
    said,
    path,
    predict,
    index,
    at,
    nodes,
    spec_steps,
    NODES: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Write down what a launch has noted, and where the next one begins."""
    column, step = tl.arange(0, NODES), tl.arange(0, STEPS)
    tl.store(predict + request * nodes + column, said, mask=column < nodes)
    tl.store(index + request * (spec_steps + 1) + step, path, mask=step <= spec_steps)
    tl.store(at + request, node)
