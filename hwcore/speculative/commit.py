"""Commit: what a verified step leaves behind in the sequence and in the KV cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hwcore._checks import FLOATS, check_instance, check_size, check_tensor, check_values, may_read
from hwcore.kernels import commit_paths, kernel
from hwcore.kernels.torch_ops import explains_missing, torch_ops
from hwcore.speculative.verify import VerifyResult, check_form

if TYPE_CHECKING:
    from torch import Tensor

    from hwcore.backend import Backend
    from hwcore.kernels.torch_ops import TorchOps
    from hwcore.speculative.tree import DraftTree

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
    keep_lens : Tensor, int64, [bs]
        How many of the tree's slots the request keeps once the moves are done, from the first on:
        as many as ``accept_lens``, or to the end of the page that the last of them is in. The
        others may be freed, whole pages all.
    kv_src, kv_dst : Tensor, int64, [bs, spec_steps + 1], or None
        Slots to copy from and to, so that the accepted path fills the request's first slots. Every
        entry may be executed: those past ``accept_lens`` copy the root's slot onto itself, a slot
        that the request keeps in any case. None without ``cache_locs``.
    hidden_states : Tensor, dtype of those given, [bs, spec_steps + 1, hidden], or None
        Of the accepted path, the root first: entry ``i`` belongs to the token before
        ``accept_tokens[:, i]``. 0 past ``accept_lens``. None without ``hidden_states``.
    """

    accept_tokens: Tensor
    accept_lens: Tensor
    bonus_tokens: Tensor
    new_seq_lens: Tensor
    keep_lens: Tensor
    kv_src: Tensor | None
    kv_dst: Tensor | None
    hidden_states: Tensor | None


def commit(
    tree: DraftTree,
    result: VerifyResult,
    seq_lens: Tensor,
    cache_locs: Tensor | None = None,
    *,
    page_size: int = 1,
    pool_size: int | None = None,
    hidden_states: Tensor | None = None,
    backend: Backend | None = None,
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
        KV slot of each tree node; at least 0, no slot of a request twice. Node ``i`` lies where
        entry ``seq_lens + i`` of the request does: with pages, at that place of its page.
    page_size : int
        Slots of a page, which are taken and freed together.
    pool_size : int, optional
        Slots that there are: ``cache_locs`` must lie below it.
    hidden_states : Tensor, float, [bs, N, hidden] or [bs * N, hidden], optional
        The target's, at each node: what the next draft starts from.
    backend : Backend, optional
        By default the process's own.

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
    from hwcore.activation import current_backend

    _check(tree, result, seq_lens, cache_locs, page_size, pool_size, hidden_states)
    backend = backend or current_backend()
    hidden = None
    with explains_missing(backend):
        tokens, new_lens, keep_lens, kv_src, kv_dst = kernel(backend, commit_paths)(
            result.predict, result.accept_index, result.accept_lens, seq_lens, cache_locs, page_size
        )
        if hidden_states is not None:
            hidden = _of_path(hidden_states, result.accept_index, torch_ops(backend))
    return CommitResult(
        accept_tokens=tokens,
        accept_lens=result.accept_lens,
        bonus_tokens=result.bonus_tokens,
        new_seq_lens=new_lens,
        keep_lens=keep_lens,
        kv_src=kv_src,
        kv_dst=kv_dst,
        hidden_states=hidden,
    )


def _of_path(hidden_states: Tensor, accept_index: Tensor, ops: TorchOps) -> Tensor:
    rows = hidden_states.flatten(0, -2)
    flat = accept_index.to(torch.int64).clamp(min=0)
    picked = ops.index_select(rows, 0, flat.view(-1)).view(*flat.shape, rows.shape[1])
    # Not a product with 0: what lies there may be NaN. In place: the rows are large, and new.
    filled: Tensor = picked.masked_fill_((accept_index < 0).unsqueeze(2), 0)
    return filled


def _check(
    tree: DraftTree,
    result: VerifyResult,
    seq_lens: Tensor,
    cache_locs: Tensor | None,
    page_size: int,
    pool_size: int | None,
    hidden_states: Tensor | None,
) -> None:
    check_form(_WHERE, tree)
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
    check_size(_WHERE, "page_size", page_size, 1, "Pass the slots of a page; 1: no pages")
    if pool_size is not None:
        check_size(_WHERE, "pool_size", pool_size, 1, "Pass the slots of the KV pool")
    if hidden_states is not None:
        flat = isinstance(hidden_states, torch.Tensor) and hidden_states.dim() == 2
        nodes = [("bs * N", bs * n)] if flat else [("bs", bs), ("N", n)]
        shape = [*nodes, ("hidden", None)]
        check_tensor(_WHERE, "hidden_states", hidden_states, FLOATS, shape, device)
    if may_read(seq_lens):
        _check_content(tree, result, seq_lens)
        if cache_locs is not None:
            _check_slots(seq_lens, cache_locs, page_size, pool_size)


def _check_content(tree: DraftTree, result: VerifyResult, seq_lens: Tensor) -> None:
    n, parents = tree.draft_tokens.shape[1], tree.parents.cpu()
    fix = "Pass the lengths that build_tree got"
    check_values(_WHERE, "seq_lens", seq_lens, seq_lens < 0, "at least 0", fix)
    past = seq_lens.to(torch.int64) + result.accept_lens > torch.iinfo(seq_lens.dtype).max
    expected = f"room for accept_lens more in {seq_lens.dtype}"
    check_values(_WHERE, "seq_lens", seq_lens, past, expected, "Pass int64")
    index = result.accept_index.cpu()
    request = torch.arange(index.shape[0]).unsqueeze(1)
    # Column 0 is the root itself; -1 may only follow it. // rounds down, so -1 belongs to no one.
    bad = (index // n != request) & (index != -1)
    bad[:, 0] |= index[:, 0] != request[:, 0] * n
    fix = "Pass the result of verifying this very tree"
    # A path: after the root each node is a child of the one before, so that -1 ends it.
    local = torch.where(index >= 0, index - request * n, -1)
    parent = parents.gather(1, local[:, 1:].clamp(0, n - 1))
    bad[:, 1:] |= (local[:, 1:] >= 0) & (parent != local[:, :-1])
    expected = f"a path of the request's own nodes ({n} a request) from its root, or -1 after it"
    check_values(_WHERE, "result.accept_index", index, bad, expected, fix)
    lens, counted = result.accept_lens.cpu(), (index >= 0).sum(1)
    expected = "the number of nodes in its row of accept_index"
    check_values(_WHERE, "result.accept_lens", lens, lens != counted, expected, fix)


def _check_slots(
    seq_lens: Tensor, cache_locs: Tensor, page_size: int, pool_size: int | None
) -> None:
    seq_lens, cache_locs = seq_lens.cpu(), cache_locs.cpu()
    fix = "Pass the slots that the forward wrote the tree's KV entries to"
    bad = cache_locs < 0
    check_values(_WHERE, "cache_locs", cache_locs, bad, "at least 0", fix)
    if pool_size is not None:
        expected = f"below {pool_size}, the slots of the pool"
        check_values(_WHERE, "cache_locs", cache_locs, cache_locs >= pool_size, expected, fix)
    if page_size == 1:
        return
    entry = seq_lens.to(torch.int64).unsqueeze(1) + torch.arange(
        cache_locs.shape[1], device=cache_locs.device
    )
    bad = cache_locs % page_size != entry % page_size
    # Within a page each slot follows the one before.
    bad[:, 1:] |= (entry[:, 1:] % page_size != 0) & (cache_locs.diff(dim=1) != 1)
    expected = f"the place of entry seq_lens + node in its page of {page_size}"
    check_values(_WHERE, "cache_locs", cache_locs, bad, expected, fix)
