"""Multimodal rotary positions of drafts, from a device buffer of the requests' deltas."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from hwcore._checks import check_tensor, check_values, may_read
from hwcore.errors import ArgumentValueError, describe
from hwcore.kernels import kernel, mrope_positions
from hwcore.kernels.torch_ops import explains_missing
from hwcore.overlap import recomputes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from hwcore.backend import Backend

__all__ = ["MropeContext", "compute_spec_mrope_positions"]

_WHERE = "compute_spec_mrope_positions"


def compute_spec_mrope_positions(
    deltas: Tensor,
    rows: Tensor,
    positions: Tensor,
    *,
    starts: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Return the positions on three axes of tokens that follow the prompt.

    Called for the nodes of draft trees before the target's forward, and for the accepted tokens
    before the head is brought up to date.

    Past its prompt a multimodal request's three axes agree, and are ahead of the text's positions,
    or behind, by a number that its prompt decides: 0 for text, less than 0 for an image, whose
    many tokens take few positions, greater than 0 for a video that takes more positions than
    tokens.

    Parameters
    ----------
    deltas : Tensor, int64, [pool] or [pool, 1]
        That number for each row of the request pool; written once, when a prompt has been read.
    rows : Tensor, int64 or int32, [bs]
        Rows of the batch, padding row included.
    positions : Tensor, int64, [tokens]
        In the text, request after request: ``DraftTree.positions``, or of a draft-extend.
    starts : Tensor, int64 or int32, [bs], optional
        Number of each request's first token, ascending, the first 0: for a draft-extend of
        accepted paths, which differ in length. Default: all requests have as many tokens.
    backend : Backend, optional
        By default the process's own.

    Returns
    -------
    Tensor, int64, [3, tokens]
        An empty batch gives ``[3, 0]``.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        If a type, dtype, device or shape does not fit, or a row or start is out of range (content:
        CPU arguments always, others under ``HWCORE_DEBUG=1``).

    Notes
    -----
    Some devices do not trust what a plan stream made of positions of the main stream: their policy
    names ``mrope_positions``, and ``EagleVerifyWorker`` calls this again after the join.

    Source: SGLang's mrope positions for target verify and draft extend, which stack the deltas on
    the host and copy them at each step. Mutates: none. Host sync: no. Graph-safe: yes.
    """
    from hwcore.activation import current_backend

    _check(deltas, rows, positions, starts)
    backend = backend or current_backend()
    with explains_missing(backend):
        return kernel(backend, mrope_positions)(deltas.reshape(-1), rows, positions, starts)


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class MropeContext:
    """What ``PlanStream.join`` is told of a batch, to compute ``mrope_positions`` again.

    The block put ``positions`` and ``mrope_positions`` among its outputs.

    Attributes
    ----------
    deltas, rows : Tensor
        As :func:`compute_spec_mrope_positions` takes them.
    backend : Backend or None
    """

    deltas: Tensor
    rows: Tensor
    backend: Backend | None = None


@recomputes("mrope_positions")
def _recompute(outputs: Mapping[str, Any], context: MropeContext) -> Tensor:
    return compute_spec_mrope_positions(
        context.deltas, context.rows, outputs["positions"], backend=context.backend
    )


def _check(deltas: Tensor, rows: Tensor, positions: Tensor, starts: Tensor | None) -> None:
    int64, index = (torch.int64,), (torch.int64, torch.int32)
    wide = isinstance(deltas, torch.Tensor) and deltas.dim() == 2
    form = [("pool", None), ("1", 1)] if wide else [("pool", None)]
    check_tensor(_WHERE, "deltas", deltas, int64, form)
    device = deltas.device
    check_tensor(_WHERE, "rows", rows, index, [("bs", None)], device)
    check_tensor(_WHERE, "positions", positions, int64, [("tokens", None)], device)
    bs, tokens = rows.shape[0], positions.shape[0]
    if starts is not None:
        check_tensor(_WHERE, "starts", starts, index, [("bs", bs)], device)
    elif (bs and tokens % bs) or (not bs and tokens):
        expected = f"as many for each of {bs} requests"
        fix = "Pass `starts` where requests differ in length"
        raise ArgumentValueError(describe(_WHERE, "len(positions)", tokens, expected, fix))
    if not may_read(positions):
        return
    pool = deltas.shape[0]
    fix = "Pass rows of the request pool"
    bad = (rows < 0) | (rows >= pool)
    check_values(_WHERE, "rows", rows, bad, f"a row in [0, {pool})", fix)
    if starts is not None and bs:
        fix = "Pass the exclusive sum of the requests' lengths"
        bad = (starts < 0) | (starts > tokens)
        bad[1:] |= starts[1:] < starts[:-1]
        bad[:1] |= starts[:1] != 0
        expected = f"0, then ascending to at most {tokens}"
        check_values(_WHERE, "starts", starts, bad, expected, fix)
