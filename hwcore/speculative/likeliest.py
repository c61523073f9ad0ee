"""The likeliest tokens of each row, the same on every device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hwcore._checks import check_size, check_tensor, check_values, may_read
from hwcore.activation import current_backend
from hwcore.errors import ArgumentTypeError, ArgumentValueError, describe
from hwcore.kernels.thresholds import reads_are_free
from hwcore.kernels.torch_ops import explains_missing, torch_ops

if TYPE_CHECKING:
    from torch import Tensor

    from hwcore.backend import Backend
    from hwcore.kernels.torch_ops import TorchOps

__all__ = ["top_k"]

_WHERE = "top_k"


def top_k(
    values: Tensor,
    topk: int,
    *,
    draft_ids: Tensor | None = None,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the largest values and where they are; of equals those in front.

    Called after each forward of the draft head.

    Parameters
    ----------
    values : Tensor, float, [..., vocab]
        Probabilities or logits. NaN counts as the least.
    topk : int
        At least 1, at most ``vocab``.
    draft_ids : Tensor, int64, [vocab], optional
        For a head with a reduced vocabulary: the target's token of each place. (The ``d2t`` of an
        EAGLE-3 checkpoint holds differences: ``d2t + torch.arange(vocab)``.)
    backend : Backend, optional
        By default the process's own.

    Returns
    -------
    values : Tensor, dtype of ``values``, [..., topk]
        Largest first; equals in the order of their places.
    tokens : Tensor, int64, [..., topk]
        Their places, or with ``draft_ids`` the target's tokens.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        If ``values`` is no tensor of floats, ``topk`` or ``draft_ids`` does not fit, or
        ``draft_ids`` holds a number below 0 (content: CPU arguments always, others under
        ``HWCORE_DEBUG=1``).

    Notes
    -----
    ``torch.topk`` chooses among equals as it likes, and differently on different devices.

    Mutates: none. Host sync: no. Graph-safe: yes.
    """
    if not isinstance(values, torch.Tensor) or not values.is_floating_point():
        expected, fix = "a tensor of floats [..., vocab]", "Pass probabilities or logits"
        raise ArgumentTypeError(describe(_WHERE, "values", values, expected, fix))
    check_size(_WHERE, "topk", topk, 1, "Pass how many tokens to draft")
    vocab = values.shape[-1] if values.dim() else 0
    if topk > vocab:
        expected, fix = f"at most {vocab}, the last dimension of values", "Draft fewer tokens"
        raise ArgumentValueError(describe(_WHERE, "topk", topk, expected, fix))
    if draft_ids is not None:
        form = [("vocab", vocab)]
        check_tensor(_WHERE, "draft_ids", draft_ids, (torch.int64,), form, values.device)
        if may_read(draft_ids):
            fix = "Pass the target's tokens, not their distances from the draft's"
            check_values(_WHERE, "draft_ids", draft_ids, draft_ids < 0, "at least 0", fix)
    backend = backend or current_backend()
    with explains_missing(backend):
        ops = torch_ops(backend)
        found, places = _top_k(values, topk, ops)
        if draft_ids is not None:
            places = ops.index_select(draft_ids, 0, places.view(-1)).view(places.shape)
    return found, places


def _top_k(values: Tensor, topk: int, ops: TorchOps) -> tuple[Tensor, Tensor]:
    vocab = values.shape[-1]
    if not reads_are_free(values) or topk == vocab:
        return _in_front(values, topk, ops)
    # Where nothing repeats among the best and one more, there is but one answer. NaN, which torch
    # puts first, is greater than nothing.
    rows = values.reshape(-1, vocab)
    most, where = ops.topk(rows, topk + 1, dim=1)
    repeats = ~(most[:, :-1] > most[:, 1:]).all(dim=1)
    best, places = most[:, :-1].contiguous(), where[:, :-1].contiguous()
    if bool(repeats.any()):
        best[repeats], places[repeats] = _in_front(rows[repeats], topk, ops)
    shape = *values.shape[:-1], topk
    return best.view(shape), places.view(shape)


def _in_front(values: Tensor, topk: int, ops: TorchOps) -> tuple[Tensor, Tensor]:
    lowest = float("-inf")
    known = torch.where(values.isnan(), lowest, values)
    if topk == 1:
        best = ops.amax(known, dim=-1, keepdim=True)
        places = torch.arange(known.shape[-1], device=known.device)
        place = ops.amin(torch.where(known == best, places, known.shape[-1]), dim=-1, keepdim=True)
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
