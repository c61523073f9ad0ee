"""The nodes of a tree, chosen among what all draft steps proposed."""

from __future__ import annotations

import collections.abc
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hwcore._checks import FLOATS, check_range, check_size, check_tensor, may_read
from hwcore.activation import current_backend
from hwcore.errors import ArgumentTypeError, ArgumentValueError, describe
from hwcore.kernels.torch_ops import explains_missing, torch_ops

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from hwcore.backend import Backend
    from hwcore.kernels.torch_ops import TorchOps

__all__ = ["DraftResults", "organize_draft_results"]


@dataclass(frozen=True, eq=False, slots=True)
class DraftResults:
    """The nodes that were chosen of all candidates, in the order of the steps.

    Attributes
    ----------
    parent_list : Tensor, int64, [bs, 1 + topk * (spec_steps - 1)], or [bs, 0]
        Entry ``c // topk`` names the candidate that proposed candidate ``c``; entry 0, -1, is the
        root. Empty where there was one step.
    selected_index : Tensor, int64, [bs, num_draft_tokens - 1]
        The chosen candidates, ascending.
    draft_tokens : Tensor, int64, [bs, num_draft_tokens - 1]
    ranks : Tensor, int64, [bs, num_draft_tokens]
        How many of the nodes score higher; the root, whose rank is 0, included. Those of rank below
        ``n`` are the tree of ``n`` nodes.
    topk : int
    """

    parent_list: Tensor
    selected_index: Tensor
    draft_tokens: Tensor
    ranks: Tensor
    topk: int
    _backend: Backend

    def with_root(self, roots: Tensor) -> tuple[Tensor, Tensor]:
        """Return the nodes with the root in front, as :func:`build_tree` takes them.

        Parameters
        ----------
        roots : Tensor, int64, [bs]
            The last token of each request.

        Returns
        -------
        draft_tokens, parents : Tensor, int64, [bs, num_draft_tokens]
        """
        bs, device = len(self.draft_tokens), self.draft_tokens.device
        check_tensor("with_root", "roots", roots, (torch.int64,), [("bs", bs)], device)
        none = self.selected_index.new_full((bs, 1), -1)
        tokens = torch.cat((roots.unsqueeze(1), self.draft_tokens), dim=1)
        return tokens, torch.cat((none, self._parents()), dim=1)

    def _parents(self) -> Tensor:
        """Return the node that each chosen candidate follows."""
        chosen = self.selected_index
        if self.topk == 1:
            return torch.arange(chosen.shape[1], device=chosen.device).repeat(len(chosen), 1)
        if self.parent_list.shape[1] == 0 or chosen.shape[1] == 0:
            return torch.zeros_like(chosen)
        ops = torch_ops(self._backend)
        with explains_missing(self._backend):
            parent = ops.gather(self.parent_list, 1, chosen // self.topk)
            # Ascending, so that the parent's place is found by bisection. It is there: a child is
            # only chosen with its parent. The root's, -1, is in front of all.
            place = ops.searchsorted(chosen, parent.contiguous(), right=True)
        return torch.where(parent < 0, 0, place)


def organize_draft_results(
    scores: Sequence[Tensor],
    tokens: Sequence[Tensor],
    parents: Sequence[Tensor],
    num_draft_tokens: int,
    *,
    backend: Backend | None = None,
) -> DraftResults:
    """Choose the likeliest candidates of all draft steps.

    Called once a step, after the last draft step.

    Parameters
    ----------
    scores : sequence of Tensor, float, [bs, 1, topk], then [bs, topk, topk]
        Product of the probabilities on the path to each candidate, one tensor a step.
    tokens : sequence of Tensor, int64, [bs, topk], then [bs, topk * topk]
    parents : sequence of Tensor, int64, [bs, topk + 1], then [bs, topk]
        The candidates that each step's beam is, which propose those of the next step, numbered
        through all steps; in front of the first step's -1, the root.
    num_draft_tokens : int
        Nodes of the tree, its root included: at least 1, at most one more than the candidates.
    backend : Backend, optional
        By default the process's own.

    Returns
    -------
    DraftResults

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        If a type, dtype, device or shape does not fit, or there are too few candidates.

    Notes
    -----
    A candidate is never chosen without the one that proposed it: it counts for no more than that
    one, NaN for nothing, and of equals the earlier is chosen. SGLang's choice among equals is
    torch.topk's, which leaves most trees of saturated scores with orphans.

    Source: SGLang's ``organize_draft_results``. Mutates: none. Host sync: no. Graph-safe: yes.
    """
    bs, topk = _check_lists(scores, tokens, parents)
    candidates = sum(step.shape[1] for step in tokens)
    check_size(
        "organize_draft_results", "num_draft_tokens", num_draft_tokens, 1, "Count the root as well"
    )
    if num_draft_tokens - 1 > candidates:
        expected = f"at most {candidates + 1}: the root and all candidates"
        fix = "Draft more steps or branches, or verify a smaller tree"
        what = "num_draft_tokens"
        where = "organize_draft_results"
        raise ArgumentValueError(describe(where, what, num_draft_tokens, expected, fix))
    backend = backend or current_backend()
    ops = torch_ops(backend)
    proposed = torch.cat(list(tokens), dim=1)
    listed = torch.cat(list(parents[:-1]), dim=1) if len(parents) > 1 else proposed[:, :0]
    if topk == 1:
        # A chain: its nodes are in order, and the likeliest are the first.
        ranks = torch.arange(num_draft_tokens, device=proposed.device).repeat(bs, 1)
        drafted = proposed[:, : num_draft_tokens - 1]
        return DraftResults(listed, ranks[:, :-1], drafted, ranks, topk, backend)
    with explains_missing(backend):
        worth = _worth(scores, parents, topk, ops)
        order = ops.sort(worth, dim=1, descending=True, stable=True).indices
        chosen, place = ops.sort(order[:, : num_draft_tokens - 1], dim=1)
        drafted = ops.gather(proposed, 1, chosen)
    ranks = torch.cat((place.new_zeros(bs, 1), place + 1), dim=1)
    return DraftResults(listed, chosen, drafted, ranks, topk, backend)


def _worth(scores: Sequence[Tensor], parents: Sequence[Tensor], topk: int, ops: TorchOps) -> Tensor:
    """Return the scores of all candidates in a row, none above its parent's."""
    flat = [torch.where(step.isnan(), float("-inf"), step).flatten(1) for step in scores]
    worth = flat[0]
    for step in range(1, len(flat)):
        proposer = parents[step - 1][:, -topk:]  # the beam, without the root in front
        most = ops.gather(worth, 1, proposer).repeat_interleave(topk, dim=1)
        worth = torch.cat((worth, torch.minimum(flat[step], most)), dim=1)
    return worth


def _check_lists(
    scores: Sequence[Tensor], tokens: Sequence[Tensor], parents: Sequence[Tensor]
) -> tuple[int, int]:
    where = "organize_draft_results"
    for name, value in (("scores", scores), ("tokens", tokens), ("parents", parents)):
        if not isinstance(value, collections.abc.Sequence):
            fix = "Pass the lists of DraftSteps"
            raise ArgumentTypeError(describe(where, name, value, "a list of tensors", fix))
    lengths = len(scores), len(tokens), len(parents)
    if len(set(lengths)) != 1 or not lengths[0]:
        expected, fix = "lists of one length, an entry a step", "Pass the lists of DraftSteps"
        raise ArgumentValueError(describe(where, "scores, tokens, parents", lengths, expected, fix))
    check_tensor(where, "scores[0]", scores[0], FLOATS, [("bs", None), ("1", 1), ("topk", None)])
    (bs, _, topk), device = scores[0].shape, scores[0].device
    for step in range(len(scores)):
        beam = 1 if step == 0 else topk
        form = [("bs", bs), ("beam", beam), ("topk", topk)]
        check_tensor(where, f"scores[{step}]", scores[step], FLOATS, form, device)
        int64 = (torch.int64,)
        form = [("bs", bs), ("beam * topk", beam * topk)]
        check_tensor(where, f"tokens[{step}]", tokens[step], int64, form, device)
        form = [("bs", bs), ("beam", topk + 1 if step == 0 else topk)]
        check_tensor(where, f"parents[{step}]", parents[step], int64, form, device)
        if may_read(parents[step]):
            most = topk + topk * topk * step  # candidates up to this step
            expected = f"a candidate of this step or one before, in [0, {most})"
            what, fix = f"the beam in parents[{step}]", "Pass the lists of DraftSteps"
            check_range(where, what, parents[step][:, -topk:], 0, most, expected, fix)
    return bs, topk
