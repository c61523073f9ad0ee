"""What the target's forward is given: by name, eagerly and in a graph alike."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

from hwcore._checks import check_size
from hwcore.errors import ArgumentTypeError, ArgumentValueError, describe
from hwcore.graphs.slots import BATCH, TOKENS, TOKENS_PER_REQUEST, Slot
from hwcore.speculative.tree import TreeMaskMode

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

__all__ = ["logits_and_hidden", "names_of", "verify_slots"]


def names_of(where: str, forward: Callable[..., Any]) -> frozenset[str] | None:
    """Return the inputs that a forward names; None where it takes whatever there is."""
    if not callable(forward):
        expected, fix = "a callable", "Pass the target's forward over a tree"
        raise ArgumentTypeError(describe(where, "`forward`", forward, expected, fix))
    parameters = inspect.signature(forward).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return frozenset(
        parameter.name
        for parameter in parameters
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    )


def verify_slots(
    forward: Callable[..., Any],
    *,
    mrope: bool = False,
    tree_mask_mode: TreeMaskMode = TreeMaskMode.QLEN_ONLY,
    num_draft_tokens: int | None = None,
    pad_seq_len: int = 1,
    extra: Mapping[str, Slot] | None = None,
) -> dict[str, Slot]:
    """Return the static inputs of a graph of ``forward``, as the worker fills them.

    Parameters
    ----------
    forward : callable
        The worker's. Of the inputs those get a slot that it names; all if it takes ``**kwargs``.
    mrope : bool
        The model takes ``mrope_positions``.
    tree_mask_mode : TreeMaskMode
        The worker's; the shape of a FULL mask follows the lengths, so that no graph can have it.
    num_draft_tokens : int, optional
        ``N`` of all buckets, which sizes a BITPACKED mask.
    pad_seq_len : int
        Length of a padded request; :class:`~hwcore.graphs.GraphRunner`'s of that name.
    extra : Mapping of str to Slot, optional
        Of ``VerifyBatch.extra``.

    Returns
    -------
    dict of str to Slot
        For :class:`~hwcore.graphs.GraphRunner`. Padding is written to KV slot 0 and row 0.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        If ``forward`` is no callable, or the mask has no static shape.
    """
    where, names = "verify_slots", names_of("verify_slots", forward)
    nodes = (BATCH, TOKENS_PER_REQUEST)
    slots = {
        "draft_tokens": Slot(torch.int64, nodes),
        "positions": Slot(torch.int64, (TOKENS,)),
        "cache_locs": Slot(torch.int64, nodes),
        "seq_lens": Slot(torch.int64, (BATCH,), fill=pad_seq_len),
        "rows": Slot(torch.int64, (BATCH,)),
        **(extra or {}),
    }
    if mrope:
        slots["mrope_positions"] = Slot(torch.int64, (3, TOKENS))
    if names is None or "tree_mask" in names:
        # Some kernels make NaN of a node that attends to nothing, and a pool would keep it.
        if tree_mask_mode is TreeMaskMode.QLEN_ONLY:
            slots["tree_mask"] = Slot(torch.bool, (*nodes, TOKENS_PER_REQUEST), fill=True)
        elif tree_mask_mode is TreeMaskMode.BITPACKED:
            fix = "Pass the N of the buckets"
            check_size(where, "num_draft_tokens", num_draft_tokens, 1, fix)
            size_bytes = -(-(num_draft_tokens or 0) // 8)
            if size_bytes > 2:
                size_bytes = -(-size_bytes // 4) * 4
            slots["tree_mask"] = Slot(torch.uint8, (*nodes, size_bytes), fill=255)
        else:
            expected = "QLEN_ONLY or BITPACKED, whose shape is that of the bucket"
            fix = "Choose one of them, or leave tree_mask out of the forward"
            raise ArgumentValueError(
                describe(where, "tree_mask_mode", tree_mask_mode, expected, fix)
            )
    return {name: slot for name, slot in slots.items() if names is None or name in names}


def logits_and_hidden(where: str, out: Any, bs: int, n: int) -> tuple[Tensor, Tensor | None]:
    """Return what a forward returned: ``[bs, N, vocab]`` or ``[bs, N]``, and ``[bs, N, hidden]``.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        If it is neither a tensor of these or ``[bs * N, …]``, nor a pair of such.
    """
    pair = isinstance(out, (tuple, list)) and len(out) == 2
    logits, hidden = out if pair else (out, None)
    return _by_request(where, "logits", logits, bs, n), (
        None if hidden is None else _by_request(where, "hidden states", hidden, bs, n)
    )


def _by_request(where: str, name: str, value: object, bs: int, n: int) -> Tensor:
    what = f"the {name} that forward returned"
    fix = "Return logits, or (logits, hidden_states), of every node"
    if not isinstance(value, torch.Tensor):
        raise ArgumentTypeError(describe(where, what, value, "a tensor", fix))
    if value.shape[:2] == (bs, n):
        return value
    if value.dim() in (1, 2) and value.shape[0] == bs * n:
        return value.view(bs, n, *value.shape[1:])
    expected = f"[{bs}, {n}, …] or [{bs * n}, …]"
    raise ArgumentValueError(describe(where, what, list(value.shape), expected, fix))
