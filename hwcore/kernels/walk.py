"""Walking through a batch of trees: who is where, what is written down, which rows are read."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, TypeAlias

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from hwcore.kernels.torch_ops import TorchOps

    Processor: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
    Verified: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

__all__ = [
    "Level",
    "Outputs",
    "Processor",
    "Rows",
    "Step",
    "Tree",
    "Verified",
    "walk_all",
    "walk_the_living",
]


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Tree:
    """What of a draft tree a walk needs, and the operations to do it with."""

    draft_tokens: Tensor  # int64 [bs, N]
    parents: Tensor  # int64 [bs, N]
    spec_steps: int
    ops: TorchOps

    @property
    def nodes(self) -> int:
        """``N``."""
        return self.parents.shape[1]

    def first_child(self, marks: Tensor) -> Tensor:
        """Return the first marked column ``[k]`` of ``marks [k, N]``; ``N`` where there is none."""
        column = torch.arange(self.nodes, device=marks.device)
        found: Tensor = self.ops.amin(torch.where(marks, column, self.nodes), 1)
        return found


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Level:
    """Requests that stand at a node, and the nodes that led there."""

    tree: Tree
    requests: Tensor  # int64 [k]
    nodes: Tensor  # int64 [k]
    path: list[Tensor]  # of int64 [k], the root's first; -1 once a walk has ended
    may_go_on: Tensor | bool  # bool [k]: fewer than spec_steps drafts are accepted
    last: bool | None  # whether nobody goes on from here; None: it is known by looking

    def parts(self, size: int) -> Iterator[Level]:
        """Cut into parts of so many requests; 0: one part."""
        if not size or len(self.requests) <= size:
            yield self
            return
        for start in range(0, len(self.requests), size):
            yield self._part(slice(start, start + size))

    def of_requests(self, values: Tensor) -> Tensor:
        """Return the rows of ``values [bs, ...]`` that belong to the requests."""
        rows: Tensor = self.tree.ops.index_select(values, 0, self.requests)
        return rows

    def at_nodes(self, values: Tensor) -> Tensor:
        """Return ``values [bs, N]`` at each request's node, ``[k]``."""
        rows = self.of_requests(values)
        found: Tensor = self.tree.ops.gather(rows, 1, self.nodes.unsqueeze(1)).squeeze(1)
        return found

    def path_tokens(self) -> Tensor:
        """Return the tokens from the root to the node, ``[k, nodes]``; -1 where one ended."""
        path = torch.stack(self.path, dim=1)
        tokens = self.tree.ops.gather(
            self.of_requests(self.tree.draft_tokens), 1, path.clamp(min=0)
        )
        return torch.where(path >= 0, tokens, -1)

    def _part(self, cut: slice) -> Level:
        on = self.may_go_on if isinstance(self.may_go_on, bool) else self.may_go_on[cut]
        path = [nodes[cut] for nodes in self.path]
        return Level(self.tree, self.requests[cut], self.nodes[cut], path, on, self.last)


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Step:
    """What a level decides, for each of its requests."""

    tokens: Tensor  # int64 [k]: the target's token after the node
    children: Tensor  # int64 [k]: the node that was accepted; N where the walk ends
    valid: Tensor  # bool [k]: whether the logits of the node were


class Rows:
    """The logits that a walk asks for, out of ``[bs, N, V]``; processed first, if so wished."""

    def __init__(self, logits: Tensor, ops: TorchOps, processor: Processor | None = None) -> None:
        bs, nodes, self.vocab = logits.shape
        self._logits, self._ops, self._nodes = logits, ops, nodes
        self._processor = processor
        self.processed = processor is not None
        joined = bs == 1 or logits.stride(0) == nodes * logits.stride(1)
        shape, strides = (bs * nodes, self.vocab), logits.stride()[1:]
        self._flat = logits.as_strided(shape, strides) if bs and joined else None

    def parts(self, level: Level, size: int) -> Iterator[tuple[Level, Tensor]]:
        """Give a level in parts of so many requests, each with the logits ``[part, V]`` there.

        A processor is called once for the level.
        """
        if self._processor is None:
            for part in level.parts(size):
                yield part, self._at(part)
            return
        rows = self._at(level).to(torch.float32, copy=True)
        rows = self._processor(rows, level.requests, level.path_tokens())
        done = 0
        for part in level.parts(size):
            yield part, rows[done : done + len(part.requests)]
            done += len(part.requests)

    def _at(self, level: Level) -> Tensor:
        """Return the logits at each node of a level; they may be the caller's own memory."""
        if len(level.path) == 1 and len(level.requests) == len(self._logits):
            return self._logits[:, 0]  # everybody at the root
        if self._flat is None:
            return self._logits[level.requests, level.nodes]
        at = level.requests * self._nodes + level.nodes
        rows: Tensor = self._ops.index_select(self._flat, 0, at)
        return rows


def walk_all(tree: Tree, choose: Callable[[Level], Step]) -> Verified:
    """Walk with everyone to the last level; whose walk has ended waits at its node."""
    bs, n = tree.parents.shape
    requests = torch.arange(bs, device=tree.parents.device)
    first_row = requests * n
    nodes = torch.zeros_like(requests)
    predict = torch.zeros(bs, n, dtype=torch.int32, device=nodes.device)
    path, index = [nodes], [first_row]
    for level in range(tree.spec_steps + 1):
        last = level == tree.spec_steps
        # All have accepted fewer before the last level; there, those that ended before have.
        may_go_on = path[-1] < 0 if last and level else not last
        step = choose(Level(tree, requests, nodes, path, may_go_on, last))
        tree.ops.scatter_(predict, 1, nodes.unsqueeze(1), step.tokens.int().unsqueeze(1))
        if not last:
            moves = step.children < n
            nodes = torch.where(moves, step.children, nodes)
            path = [*path, torch.where(moves, nodes, -1)]
            index.append(torch.where(moves, first_row + nodes, -1))
    accept_index = torch.stack(index, dim=1).to(torch.int32)
    lens = tree.ops.sum(accept_index >= 0, 1, dtype=torch.int32)
    return predict.view(-1), accept_index, lens, step.tokens, (~step.valid).int()


class Outputs:
    """What walks write down as they go."""

    def __init__(self, tree: Tree) -> None:
        bs, n = tree.parents.shape
        self.predict = torch.zeros(bs * n, dtype=torch.int32)
        self.accept_index = torch.full((bs, tree.spec_steps + 1), -1, dtype=torch.int32)
        self.accept_index[:, 0] = torch.arange(0, bs * n, n)
        self.bonus_tokens = torch.zeros(bs, dtype=torch.int64)
        self.status = torch.zeros(bs, dtype=torch.int32)

    def results(self) -> Verified:
        """Return them in the order of the operations' contract."""
        lens = (self.accept_index >= 0).sum(1, dtype=torch.int32)
        return self.predict, self.accept_index, lens, self.bonus_tokens, self.status


def walk_the_living(
    tree: Tree, choose: Callable[[Level], Step], outputs: Outputs, requests: Tensor
) -> None:
    """Walk with some requests, at each level with those that still accept; CPU only."""
    n = tree.nodes
    nodes = torch.zeros_like(requests)
    path = [nodes]
    for level in range(tree.spec_steps + 1):
        if not len(requests):
            break
        step = choose(Level(tree, requests, nodes, path, level < tree.spec_steps, None))
        outputs.predict[requests * n + nodes] = step.tokens.int()
        outputs.bonus_tokens[requests] = step.tokens  # the last level that writes is right
        outputs.status[requests] = (~step.valid).int()
        if level == tree.spec_steps:
            break
        (alive,) = torch.nonzero(step.children < n, as_tuple=True)
        requests, nodes = requests[alive], step.children[alive]
        path = [*(before[alive] for before in path), nodes]
        outputs.accept_index[requests, level + 1] = (requests * n + nodes).int()
