"""KV slots of what a step adds to each request, from the table of all requests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hwcore._checks import check_size, check_tensor, check_values, may_read
from hwcore.activation import current_backend
from hwcore.errors import ArgumentValueError, describe
from hwcore.kernels.torch_ops import explains_missing, torch_ops

if TYPE_CHECKING:
    from torch import Tensor

    from hwcore.backend import Backend

__all__ = ["cache_locs"]

_WHERE = "cache_locs"


def cache_locs(
    req_to_token: Tensor,
    rows: Tensor,
    seq_lens: Tensor,
    count: int,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """Return the KV slots of the entries that follow each request's last.

    Called once the slots are allocated, for the nodes of a tree (``count`` is ``N``), for the
    tokens of a draft-extend, and for what the draft steps write: ``topk * spec_steps``, which
    SGLang reads as ``[bs, topk, spec_steps]``, a branch in a row.

    Parameters
    ----------
    req_to_token : Tensor, int64 or int32, [pool, max_context]
        Slot of each entry of each request; contiguous.
    rows : Tensor, int64 or int32, [bs]
        Rows of the batch, which may repeat: padding.
    seq_lens : Tensor, int64 or int32, [bs]
        Entries before these; ``seq_lens + count`` at most ``max_context``.
    count : int
        At least 0.
    backend : Backend, optional
        By default the process's own.

    Returns
    -------
    Tensor, int64, [bs, count]

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        If a type, dtype, device or shape does not fit, the table is not contiguous, or a row or an
        entry lies outside it (content: CPU arguments always, others under ``HWCORE_DEBUG=1``).

    Notes
    -----
    Source: SGLang's ``assign_extend_cache_locs`` and ``assign_draft_cache_locs`` of pages of one
    slot. Mutates: none. Host sync: no. Graph-safe: yes.
    """
    _check(req_to_token, rows, seq_lens, count)
    max_context = req_to_token.shape[1]
    backend = backend or current_backend()
    # int64: an index into the whole table may pass 2^31.
    first = rows.to(torch.int64) * max_context + seq_lens
    places = first.unsqueeze(1) + torch.arange(count, device=first.device)  # [bs, count]
    with explains_missing(backend):
        slots: Tensor = torch_ops(backend).index_select(req_to_token.view(-1), 0, places.view(-1))
    return slots.to(torch.int64).view(places.shape)


def _check(req_to_token: Tensor, rows: Tensor, seq_lens: Tensor, count: int) -> None:
    index = (torch.int64, torch.int32)
    form = [("pool", None), ("max_context", None)]
    check_tensor(_WHERE, "req_to_token", req_to_token, index, form)
    if not req_to_token.is_contiguous():
        got, fix = req_to_token.stride(), "Pass the whole table"
        what = "req_to_token.stride()"
        raise ArgumentValueError(describe(_WHERE, what, got, "a contiguous table", fix))
    device = req_to_token.device
    check_tensor(_WHERE, "rows", rows, index, [("bs", None)], device)
    check_tensor(_WHERE, "seq_lens", seq_lens, index, [("bs", rows.shape[0])], device)
    check_size(_WHERE, "count", count, 0, "Pass how many entries follow")
    if not may_read(rows):
        return
    pool, max_context = req_to_token.shape
    bad = (rows < 0) | (rows >= pool)
    check_values(_WHERE, "rows", rows, bad, f"a row in [0, {pool})", "Pass rows of the table")
    bad = (seq_lens < 0) | (seq_lens > max_context - count)
    expected = f"at least 0, with {count} more entries within {max_context}"
    fix = "Draft fewer nodes, or end the request before"
    check_values(_WHERE, "seq_lens", seq_lens, bad, expected, fix)
