"""Commit: what a verified step leaves behind in the sequence and in the KV cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hwcore._checks import check_instance, check_tensor, check_values, may_read
from hwcore.speculative.tree import DraftTree
from hwcore.speculative.verify import VerifyResult

if TYPE_CHECKING:
    from torch import Tensor

_WHERE = "commit"


@dataclass(frozen=True, eq=False, slots=True)
class CommitResult:
    """The tokens of one step, the lengths after it, and the KV entries to move.

    Attributes
    ----------
    accept_tokens : Tensor, int64, [bs, spec_steps + 1]
        The tokens that the step emits, in order, the bonus last; -1 past ``accept_lens``.
    accept_lens : Tensor, int32, [bs]
        How many those are, bonus included; in [1, spec_steps + 1].
    bonus_tokens : Tensor, int64, [bs]
        The last of them, whose KV entry the next step writes.
    new_seq_lens : Tensor, dtype of ``seq_lens``, [bs]
        ``seq_lens + accept_lens``: the root and the accepted drafts are now in the KV cache.
    kv_src, kv_dst : Tensor, int64, [bs, spec_steps + 1], or None
        Slots to copy from and to, so that the accepted path fills the request's first slots. Every
        entry may be executed: those past ``accept_lens`` copy the root's slot onto itself, a slot
        that the request keeps in any case. None without ``cache_locs``.
    """

    accept_tokens: Tensor
    accept_lens: Tensor
    bonus_tokens: Tensor
    new_seq_lens: Tensor
    kv_src: Tensor | None
    kv_dst: Tensor | None


def commit(
    tree: DraftTree, result: VerifyResult, seq_lens: Tensor, cache_locs: Tensor | None = None
) -> CommitResult:
    """Turn a verified tree into emitted tokens, new lengths and a list of KV moves.

    Called once a step, after verify, on the same stream; the moves must be executed before the
    request's next forward.

    Parameters
    ----------
    tree : DraftTree
        What was verified.
    result : VerifyResult
        Of verifying ``tree``.
    seq_lens : Tensor, int64 or int32, [bs]
        Tokens in the KV cache before the root, as given to :func:`build_tree`.
    cache_locs : Tensor, int64, [bs, N], optional
        KV slot of each tree node; at least 0, no slot of a request twice.

    Returns
    -------
    CommitResult
        An empty batch gives empty tensors.

    Raises
    ------
    ArgumentTypeError
        If an argument's type, dtype, rank or device is wrong.
    ArgumentValueError
        If a shape does not fit, or a value is out of range (content: CPU arguments always, others
        under ``HWCORE_DEBUG=1``).

    Notes
    -----
    The moves may be executed as one gather followed by one scatter, or one column after the other
    from the left: a path only ever moves towards the front, so no column overwrites what a later
    one reads.

    Source: SGLang's compaction after verify, which fails for ``N < spec_steps + 1``. Mutates: none.
    Host sync: no (under ``HWCORE_DEBUG=1`` yes). Graph-safe: yes.
    """
    _check(tree, result, seq_lens, cache_locs)
    bs, n = tree.draft_tokens.shape
    device = tree.draft_tokens.device
    accepted = result.accept_index >= 0  # [bs, W]
    flat = result.accept_index.to(torch.int64).clamp(min=0)
    tokens = result.predict.gather(0, flat.view(-1)).view_as(flat).to(torch.int64)
    kv_src = kv_dst = None
    if cache_locs is not None:
        step = torch.arange(flat.shape[1], device=device)
        first_row = (torch.arange(bs, device=device) * n).unsqueeze(1)
        # Node 0, the root, stands in where the path has ended: it always moves onto itself.
        kv_src = cache_locs.gather(1, torch.where(accepted, flat - first_row, 0))
        kv_dst = cache_locs.gather(1, torch.where(accepted, step, 0))
    return CommitResult(
        accept_tokens=torch.where(accepted, tokens, -1),
        accept_lens=result.accept_lens,
        bonus_tokens=result.bonus_tokens,
        new_seq_lens=seq_lens + result.accept_lens.to(seq_lens.dtype),
        kv_src=kv_src,
        kv_dst=kv_dst,
    )


def _check(
    tree: DraftTree, result: VerifyResult, seq_lens: Tensor, cache_locs: Tensor | None
) -> None:
    check_instance(_WHERE, "tree", tree, DraftTree, "build_tree")
    check_instance(_WHERE, "result", result, VerifyResult, "verify_greedy")
    (bs, n), width = tree.draft_tokens.shape, tree.spec_steps + 1
    device = tree.draft_tokens.device
    int32, int64 = (torch.int32,), (torch.int64,)
    check_tensor(_WHERE, "result.predict", result.predict, int32, [("bs * N", bs * n)], device)
    form = [("bs", bs), ("spec_steps + 1", width)]
    check_tensor(_WHERE, "result.accept_index", result.accept_index, int32, form, device)
    check_tensor(_WHERE, "result.accept_lens", result.accept_lens, int32, [("bs", bs)], device)
    check_tensor(_WHERE, "result.bonus_tokens", result.bonus_tokens, int64, [("bs", bs)], device)
    check_tensor(_WHERE, "seq_lens", seq_lens, (*int64, *int32), [("bs", bs)], device)
    if cache_locs is not None:
        check_tensor(_WHERE, "cache_locs", cache_locs, int64, [("bs", bs), ("N", n)], device)
    if may_read(seq_lens):
        _check_content(result, seq_lens, cache_locs, n)


def _check_content(
    result: VerifyResult, seq_lens: Tensor, cache_locs: Tensor | None, n: int
) -> None:
    fix = "Pass the lengths that build_tree got"
    check_values(_WHERE, "seq_lens", seq_lens, seq_lens < 0, "at least 0", fix)
    index = result.accept_index
    request = torch.arange(index.shape[0], device=index.device).unsqueeze(1)
    # Column 0 is the root itself; -1 may only follow it. // rounds down, so -1 belongs to no one.
    bad = (index // n != request) & (index != -1)
    bad[:, 0] |= index[:, 0] != request[:, 0] * n
    fix = "Pass the result of verifying this very tree"
    expected = f"the request's own node ({n} a request), root first, or -1 after it"
    check_values(_WHERE, "result.accept_index", index, bad, expected, fix)
    lens, counted = result.accept_lens, (index >= 0).sum(1)
    expected = "the number of nodes in its row of accept_index"
    check_values(_WHERE, "result.accept_lens", lens, lens != counted, expected, fix)
    if cache_locs is not None:
        fix = "Pass the slots that the forward wrote the tree's KV entries to"
        check_values(_WHERE, "cache_locs", cache_locs, cache_locs < 0, "at least 0", fix)
