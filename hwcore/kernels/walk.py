"""Walking through a batch of trees: who is where, what is written down, which rows are read."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, TypeAlias

import torch

from hwcore.kernels.thresholds import reads_are_free

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

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
    "parts",
    "walk_all",
    "walk_the_living",
]


class Tree:
    """What of a draft tree a walk needs, and the operations to do it with."""

    def __init__(
        self, draft_tokens: Tensor, parents: Tensor, spec_steps: int, ops: TorchOps
    ) -> None:
        self.draft_tokens, self.parents = draft_tokens, parents  # int64 [bs, N]
        self.spec_steps, self.ops = spec_steps, ops
        self.batch, self.nodes = parents.shape
        self.column = torch.arange(self.nodes, device=parents.device)

    def first_child(self, marks: Tensor) -> Tensor:
        """Return the first marked column ``[k]`` of ``marks [k, N]``; ``N`` where there is none."""
        found: Tensor = self.ops.amin(torch.where(marks, self.column, self.nodes), 1)
        return found


class Level:
    """Requests that stand at a node, and the nodes that led there.

    Attributes
    ----------
    requests, nodes : Tensor, int64, [k]
    at : Tensor, int64, [k]
        The node's place in the flat batch.
    path : list of Tensor, int64, [k]
        The root's nodes first; -1 once a walk has ended.
    may_go_on : Tensor, bool, [k], or bool
        Whether fewer than ``spec_steps`` drafts are accepted.
    last : bool or None
        Whether nobody goes on from here; None: it is found by looking.
    everyone : bool
        Whether all requests are here, in their order.
    """

    def __init__(
        self,
        tree: Tree,
        requests: Tensor,
        nodes: Tensor,
        path: list[Tensor],
        may_go_on: Tensor | bool,
        last: bool | None,
    ) -> None:
        self.tree, self.requests, self.nodes, self.path = tree, requests, nodes, path
        self.may_go_on, self.last = may_go_on, last
        self.at = requests * tree.nodes + nodes
        self.everyone = len(requests) == tree.batch

    def parts(self, size: int) -> list[Level]:
        """Cut into parts of so many requests; 0: one part."""
        if not size or len(self.requests) <= size:
            return [self]
        starts = range(0, len(self.requests), size)
        return [self._part(slice(start, start + size)) for start in starts]

    def of_requests(self, values: Tensor) -> Tensor:
        """Return the rows of ``values [bs, ...]`` that belong to the requests; to be read only."""
        if self.everyone:
            return values
        rows: Tensor = self.tree.ops.index_select(values, 0, self.requests)
        return rows

    def at_nodes(self, values: Tensor) -> Tensor:
        """Return ``values [bs, N]`` at each request's node, ``[k]``."""
        found: Tensor = self.tree.ops.index_select(values.reshape(-1), 0, self.at)
        return found

    def path_tokens(self) -> Tensor:
        """Return the tokens from the root to the node, ``[k, nodes]``; -1 where one ended."""
        path = torch.stack(self.path, dim=1)
        tokens = self.of_requests(self.tree.draft_tokens)
        return torch.where(path >= 0, self.tree.ops.gather(tokens, 1, path.clamp(min=0)), -1)

    def _part(self, cut: slice) -> Level:
        on = self.may_go_on if isinstance(self.may_go_on, bool) else self.may_go_on[cut]
        path = [nodes[cut] for nodes in self.path]
        requests, nodes = self.requests[cut], self.nodes[cut]
        return Level(self.tree, requests, nodes, path, on, self.last)


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Step:
    """What a level decides, for each of its requests."""

    tokens: Tensor  # int64 [k]: the target's token after the node; -1: its logits are not valid
    children: Tensor  # int64 [k]: the node that was accepted; N where the walk ends


class Rows:
    """The logits that a walk asks for, out of ``[bs, N, V]``; processed first, if so wished."""

    def __init__(self, logits: Tensor, ops: TorchOps, processor: Processor | None = None) -> None:
        bs, nodes, self.vocab = logits.shape
        self._logits, self._ops, self._processor = logits, ops, processor
        self.processed = processor is not None
        joined = bs == 1 or logits.stride(0) == nodes * logits.stride(1)
        shape, strides = (bs * nodes, self.vocab), logits.stride()[1:]
        self._flat = logits.as_strided(shape, strides) if bs and joined else None

    def of(self, level: Level, size: int) -> Iterable[Tensor]:
        """Give the logits ``[part, V]`` of a level's requests, in parts of a size; 0: one part.

        They may be the caller's own memory: to be read only. A processor is called once.
        """
        if self._processor is None:
            return self._read(level, size)
        (rows,) = self._read(level, 0)
        rows = rows.to(torch.float32, copy=True)
        return parts(self._processor(rows, level.requests, level.path_tokens()), size)

    def _read(self, level: Level, size: int) -> Iterable[Tensor]:
        logits, flat, ops = self._logits, self._flat, self._ops
        if len(level.path) == 1 and level.everyone:
            return parts(logits[:, 0], size)  # all at the root
        if flat is not None:
            return (ops.index_select(flat, 0, at) for at in parts(level.at, size))
        if reads_are_free(logits):
            places = zip(parts(level.requests, size), parts(level.nodes, size), strict=True)
            return (logits[place] for place in places)
        # Everyone is here. A device may lack what takes two indices.
        nodes = level.nodes.view(-1, 1, 1).expand(-1, 1, self.vocab)
        return parts(ops.gather(logits, 1, nodes).squeeze(1), size)


def parts(values: Tensor, size: int) -> tuple[Tensor, ...]:
    """Cut along the first dimension into parts of a size; 0: one part."""
    return torch.split(values, size or max(1, len(values)))


def walk_all(tree: Tree, vocab: int, choose: Callable[[Level], Step]) -> Verified:
    """Walk with everyone to the last level; whose walk has ended waits at its node."""
    bs, n, device = tree.batch, tree.nodes, tree.parents.device
    requests = torch.arange(bs, device=device)
    first_row = requests * n
    nodes = torch.zeros_like(requests)
    predict = torch.zeros(bs, n, dtype=torch.int32, device=device)
    path, index = [nodes], [first_row]
    for level in range(tree.spec_steps + 1):
        last = level == tree.spec_steps
        # Before the last level all have accepted fewer; there, those that have ended.
        may_go_on = path[-1] < 0 if last and level else not last
        step = choose(Level(tree, requests, nodes, path, may_go_on, last))
        tokens = torch.where(step.tokens < 0, vocab - 1, step.tokens)
        tree.ops.scatter_(predict, 1, nodes.unsqueeze(1), tokens.int().unsqueeze(1))
        if not last:
            moves = step.children < n
            nodes = torch.where(moves, step.children, nodes)
            path = [*path, torch.where(moves, nodes, -1)]
            index.append(torch.where(moves, first_row + nodes, -1))
    accept_index = torch.stack(index, dim=1).int()
    lens = tree.ops.sum(accept_index >= 0, 1, dtype=torch.int32)
    return predict.view(-1), accept_index, lens, tokens, (step.tokens < 0).int()


class Outputs:
    """What walks with some requests each write down; CPU only."""

    def __init__(self, tree: Tree, vocab: int) -> None:
        self.vocab, self.ops = vocab, tree.ops
        self.index = torch.full((tree.batch, tree.spec_steps + 1), -1, dtype=torch.int32)
        self.predict = torch.zeros(tree.batch * tree.nodes, dtype=torch.int32)
        self.bonus = torch.zeros(tree.batch, dtype=torch.int64)

    def write(self, level: Level, tokens: Tensor) -> None:
        """Write down a level's nodes, and the target's tokens after them."""
        self.index[level.requests, len(level.path) - 1] = level.at.int()
        self.predict[level.at] = tokens.int()
        self.bonus[level.requests] = tokens

    def results(self) -> Verified:
        """Return the results in the order of the operations' contract."""
        lens = self.ops.sum(self.index >= 0, 1, dtype=torch.int32)
        status = (self.bonus < 0).int()
        if bool(status.any()):  # within a path all are valid
            self.predict[self.predict < 0] = self.vocab - 1
            self.bonus[self.bonus < 0] = self.vocab - 1
        return self.predict, self.index, lens, self.bonus, status


def walk_the_living(
    tree: Tree, choose: Callable[[Level], Step], outputs: Outputs, requests: Tensor
) -> None:
    """Walk with some requests, at each level with those that still accept; CPU only."""
    nodes = torch.zeros_like(requests)
    path = [nodes]
    while len(requests):
        may_go_on = len(path) <= tree.spec_steps
        level = Level(tree, requests, nodes, path, may_go_on, None)
        step = choose(level)
        outputs.write(level, step.tokens)
        nodes = step.children
        (alive,) = torch.nonzero(nodes < tree.nodes, as_tuple=True)
        if not (may_go_on and len(alive)):
            break
        if len(alive) < len(requests):
            requests, nodes = requests[alive], nodes[alive]
            path = [before[alive] for before in path]
        path = [*path, nodes]
