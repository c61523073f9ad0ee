"""Drafts: from the head's likeliest tokens, step by step, to the nodes of a tree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hwcore._checks import FLOATS, check_size, check_tensor
from hwcore.errors import ArgumentTypeError, ArgumentValueError, describe
from hwcore.kernels.torch_ops import explains_missing, torch_ops

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from hwcore.backend import Backend
    from hwcore.kernels.torch_ops import TorchOps

__all__ = ["Beam", "DraftResults", "DraftSteps", "organize_draft_results", "top_k"]


def top_k(values: Tensor, topk: int, *, backend: Backend | None = None) -> tuple[Tensor, Tensor]:
    """Return the largest values and where they are; of equals those in front.

    Parameters
    ----------
    values : Tensor, float, [..., vocab]
        Probabilities or logits. NaN counts as the least.
    topk : int
        At least 1, at most ``vocab``.
    backend : Backend, optional
        By default the process's own.

    Returns
    -------
    values : Tensor, dtype of ``values``, [..., topk]
        Largest first; equals in the order of their places.
    indices : Tensor, int64, [..., topk]

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        If ``values`` is no tensor of floats, or ``topk`` does not fit.

    Notes
    -----
    ``torch.topk`` chooses among equals as it likes, and differently on different devices.

    Mutates: none. Host sync: no. Graph-safe: yes.
    """
    if not isinstance(values, torch.Tensor) or not values.is_floating_point():
        expected, fix = "a tensor of floats [..., vocab]", "Pass probabilities or logits"
        raise ArgumentTypeError(describe("top_k", "values", values, expected, fix))
    check_size("top_k", "topk", topk, 1, "Pass how many tokens to draft")
    vocab = values.shape[-1] if values.dim() else 0
    if topk > vocab:
        expected, fix = f"at most {vocab}, the last dimension of values", "Draft fewer tokens"
        raise ArgumentValueError(describe("top_k", "topk", topk, expected, fix))
    backend = _resolved(backend)
    with explains_missing(backend):
        return _top_k(values, topk, torch_ops(backend))


def _top_k(values: Tensor, topk: int, ops: TorchOps) -> tuple[Tensor, Tensor]:
    lowest = float("-inf")
    known = torch.where(values.isnan(), lowest, values)
    if topk == 1:
        best = ops.amax(known, dim=-1, keepdim=True)
        place = ops.argmax((known == best).to(torch.int8), dim=-1, keepdim=True)
        return ops.gather(values, -1, place), place
    # The values are certain, only the places are not. Ranks count from the front of each value.
    best = ops.topk(known, topk, dim=-1).values  # [..., topk], largest first
    last = best[..., -1:]
    above = known > last
    # All that is above the last value is in; of the last value's equals the first few.
    missing = topk - ops.sum(above, dim=-1, keepdim=True)
    equal = known == last
    chosen = above | (equal & (ops.cumsum(equal.to(torch.int32), dim=-1) <= missing))
    # The chosen, in the order of their places: the n-th is where the count reaches n.
    count = ops.cumsum(chosen.to(torch.int32), dim=-1)
    wanted = torch.arange(1, topk + 1, dtype=torch.int32, device=values.device)
    wanted = wanted.expand(*values.shape[:-1], topk).contiguous()
    places = ops.searchsorted(count, wanted)
    found = ops.gather(known, -1, places)
    order = ops.sort(found, dim=-1, descending=True, stable=True).indices
    places = ops.gather(places, -1, order)
    return ops.gather(values, -1, places), places


@dataclass(frozen=True, eq=False, slots=True)
class Beam:
    """The nodes of a draft step that the head runs next.

    Attributes
    ----------
    tokens : Tensor, int64, [bs, topk]
    origin : Tensor, int64, [bs, topk]
        Which node of the beam before each follows: whose hidden state and KV path it goes on with.
        In the first beam 0, for they all follow the root.
    scores : Tensor, float32, [bs, topk]
        Product of the probabilities on the path to each.
    """

    tokens: Tensor
    origin: Tensor
    scores: Tensor


class DraftSteps:
    """What the steps of one draft proposed, and which nodes to go on with.

    >>> steps = DraftSteps(topk=4)
    >>> beam = steps.first(probs, tokens)  # [bs, 4], of the token after the root
    >>> for _ in range(spec_steps - 1):
    ...     probs, tokens = head(beam.tokens, ...)  # [bs, 4, 4]
    ...     beam = steps.next(probs, tokens)
    >>> draft_tokens, parents = steps.organize(num_draft_tokens).with_root(roots)

    Each step proposes ``topk`` tokens after each of ``topk`` nodes, and the head goes on with the
    ``topk`` of them whose paths are likeliest. With ``topk`` 1 there is nothing to choose.

    Parameters
    ----------
    topk : int
        At least 1.
    backend : Backend, optional
        By default the process's own.

    Attributes
    ----------
    scores, tokens, parents : list of Tensor
        As :func:`organize_draft_results` takes them, a step an entry.

    Notes
    -----
    A child is never likelier than its parent here, whatever the head says: a probability above 1
    counts as 1, NaN as 0. Equals keep their order, so that the same draft comes out everywhere.

    Source: EAGLE-2 (Li et al. 2024) §4; SGLang's ``select_top_k_tokens``. Host sync: no.
    Graph-safe: yes.
    """

    def __init__(self, topk: int, *, backend: Backend | None = None) -> None:
        check_size("DraftSteps", "topk", topk, 1, "Pass the branches at each node")
        self.topk = topk
        self.scores: list[Tensor] = []
        self.tokens: list[Tensor] = []
        self.parents: list[Tensor] = []
        self._backend = _resolved(backend)
        self._ops = torch_ops(self._backend)
        self._beam: Beam | None = None

    def first(self, probs: Tensor, tokens: Tensor) -> Beam:
        """Take what may follow the root.

        Parameters
        ----------
        probs : Tensor, float, [bs, topk]
            Probabilities, largest first.
        tokens : Tensor, int64, [bs, topk]
        """
        where = "DraftSteps.first"
        form = [("bs", None), ("topk", self.topk)]
        check_tensor(where, "probs", probs, FLOATS, form)
        bs, device = probs.shape[0], probs.device
        form = [("bs", bs), ("topk", self.topk)]
        check_tensor(where, "tokens", tokens, (torch.int64,), form, device)
        scores = _chances(probs)
        self.scores, self.tokens = [scores.unsqueeze(1)], [tokens]
        candidates = torch.arange(-1, self.topk, device=device)
        self.parents = [candidates.repeat(bs, 1)]
        self._beam = Beam(tokens, torch.zeros_like(tokens), scores)
        return self._beam

    def next(self, probs: Tensor, tokens: Tensor) -> Beam:
        """Take what may follow each node of the last beam, and return the next one.

        Parameters
        ----------
        probs : Tensor, float, [bs, topk, topk]
            After each node: probabilities, largest first.
        tokens : Tensor, int64, [bs, topk, topk]
        """
        where, topk = "DraftSteps.next", self.topk
        if self._beam is None:
            message = f"{where}: there is no beam yet; expected first() before. Call first()."
            raise ArgumentValueError(message)
        (bs, _), device = self._beam.tokens.shape, self._beam.tokens.device
        form = [("bs", bs), ("topk", topk), ("topk", topk)]
        check_tensor(where, "probs", probs, FLOATS, form, device)
        check_tensor(where, "tokens", tokens, (torch.int64,), form, device)
        scores = self._beam.scores.unsqueeze(2) * _chances(probs)  # [bs, topk, topk]
        flat, proposed = scores.view(bs, -1), tokens.reshape(bs, -1)
        # The candidates of this step are numbered after those of the steps before.
        offset = topk + topk * topk * (len(self.tokens) - 1)
        if topk == 1:
            origin, best, chosen = torch.zeros_like(proposed), flat, proposed
            listed = torch.full_like(proposed, offset)
        else:
            with explains_missing(self._backend):
                # Stable: of equals the first. topk * topk candidates are few to sort.
                order = self._ops.sort(flat, dim=1, descending=True, stable=True)
                picked = order.indices[:, :topk]
                best = order.values[:, :topk]
                chosen = self._ops.gather(proposed, 1, picked)
            origin, listed = picked // topk, picked + offset
        self.scores.append(scores)
        self.tokens.append(proposed)
        self.parents.append(listed)
        self._beam = Beam(chosen, origin, best)
        return self._beam

    def organize(self, num_draft_tokens: int) -> DraftResults:
        """Choose the likeliest nodes; see :func:`organize_draft_results`."""
        return organize_draft_results(
            self.scores, self.tokens, self.parents, num_draft_tokens, backend=self._backend
        )


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
    backend = _resolved(backend)
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


def _chances(probs: Tensor) -> Tensor:
    return torch.where(probs.isnan(), 0.0, probs.float()).clamp(0.0, 1.0)


def _resolved(backend: Backend | None) -> Backend:
    from hwcore.activation import current_backend

    return backend or current_backend()


def _check_lists(
    scores: Sequence[Tensor], tokens: Sequence[Tensor], parents: Sequence[Tensor]
) -> tuple[int, int]:
    where = "organize_draft_results"
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
    return bs, topk
