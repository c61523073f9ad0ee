"""Draft trees: from parent pointers to what the target's forward and the verify step need."""

from __future__ import annotations

import enum
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hwcore import kernels
from hwcore._checks import check_size, check_tensor, check_values, may_read
from hwcore.errors import ArgumentTypeError, ArgumentValueError, describe
from hwcore.kernels import kernel
from hwcore.kernels.torch_ops import explains_missing

if TYPE_CHECKING:
    from torch import Tensor

    from hwcore.backend import Backend

_WHERE = "build_tree"

MAX_MASK_BYTES = 2**30
"""What a FULL mask may take by default. Its bytes, prefix times N, are written at every step."""


class TreeMaskMode(enum.IntEnum):
    """Layout of a tree mask; set bits mark what a node may attend. The numbers are SGLang's."""

    FULL = 0
    """Flat bool: per request ``N`` rows of ``seq_len + N``, requests one after the other."""
    QLEN_ONLY = 1
    """Bool ``[bs, N, N]``: tree columns only; the attention kernel sees the whole prefix."""
    BITPACKED = 2
    """QLEN_ONLY in bits, uint8 ``[bs, N, B]``: column ``c`` is bit ``c % 8`` of byte ``c // 8``.

    ``B`` is 1 up to 8 nodes, 2 up to 16, and beyond that a multiple of 4, so that
    ``mask.view(torch.uint32)`` gives the words that kernels of that kind read.
    """


@dataclass(frozen=True, eq=False, slots=True, weakref_slot=True)
class DraftTree:
    """One draft tree a request, in the forms that attention, positions and verify want.

    Attributes
    ----------
    draft_tokens : Tensor, int64, [bs, N]
        Token of each node; column 0 is the root. The caller's tensor, not a copy.
    parents : Tensor, int64, [bs, N]
        Index of each node's parent in its own request; -1 for the root and for padding nodes. The
        caller's tensor, not a copy.
    positions : Tensor, int64, [bs * N]
        ``seq_len + depth``; a padding node has depth 0.
    tree_mask : Tensor
        As ``tree_mask_mode`` says; see :class:`TreeMaskMode`.
    retrieve_index : Tensor, int64, [bs, N]
        Index of each node in the flat batch, ``request * N + node``.
    retrieve_next_token : Tensor, int64, [bs, N]
        First child of each node, as an index in its request; -1 = none.
    retrieve_next_sibling : Tensor, int64, [bs, N]
        Next child of the same parent, as an index in its request; -1 = none.
    spec_steps : int
        Bound on the depth of any node.
    tree_mask_mode : TreeMaskMode
    """

    draft_tokens: Tensor
    parents: Tensor
    positions: Tensor
    tree_mask: Tensor
    retrieve_index: Tensor
    retrieve_next_token: Tensor
    retrieve_next_sibling: Tensor
    spec_steps: int
    tree_mask_mode: TreeMaskMode


_built: weakref.WeakKeyDictionary[DraftTree, tuple[int, ...]] = weakref.WeakKeyDictionary()


def is_as_built(tree: DraftTree) -> bool:
    """Say whether the links of a tree are known to be the parents', as the reference made them.

    False where that is not known: after a write in place, which torch counts, from the kernel of a
    plugin, and for tensors of inference mode, whose writes are not counted.
    """
    return tree in _built and _built[tree] == _writes(tree)


def _writes(tree: DraftTree) -> tuple[int, ...] | None:
    links = tree.parents, tree.retrieve_next_token, tree.retrieve_next_sibling
    if any(each.is_inference() for each in links):
        return None
    return tuple(each._version for each in links)


def build_tree(
    draft_tokens: Tensor,
    parents: Tensor,
    seq_lens: Tensor,
    *,
    spec_steps: int | None = None,
    tree_mask_mode: TreeMaskMode = TreeMaskMode.FULL,
    seq_lens_sum: int | None = None,
    max_mask_bytes: int = MAX_MASK_BYTES,
    backend: Backend | None = None,
) -> DraftTree:
    """Build the mask, positions and links of a batch of draft trees from their parent pointers.

    Called once a step, between drafting and the target's forward over the tree.

    Parameters
    ----------
    draft_tokens : Tensor, int64, [bs, N]
        Token ids, at least 0; column 0 is the root, the last token emitted.
    parents : Tensor, int64, [bs, N]
        Index of each node's parent within its request. Column 0 is -1; a parent precedes its
        children. -1 elsewhere makes a padding node: it attends the prefix and itself, has no links
        and is never accepted.
    seq_lens : Tensor, int64 or int32, [bs]
        Tokens in the KV cache before the root, at least 0.
    spec_steps : int, optional
        Static bound on the depth of any node, at least 0; default ``N - 1``. It sets the width of
        what verify returns, and the number of rounds here.
    tree_mask_mode : TreeMaskMode
        Layout of the mask.
    seq_lens_sum : int, optional
        Sum of ``seq_lens``, which sizes a FULL mask. On the CPU it is computed; on any other device
        it is required, because computing it would stall the device.

    Returns
    -------
    DraftTree
        An empty batch gives empty tensors.

    Raises
    ------
    ArgumentTypeError
        If an argument's type, dtype, rank or device is wrong.
    ArgumentValueError
        If a shape or size does not fit, ``seq_lens_sum`` is missing, a FULL mask would be too
        large, or the content breaks the rules above (content: CPU arguments always, others under
        ``HWCORE_DEBUG=1``).

    Notes
    -----
    Siblings of one token, which merged trees can have, stay apart. Verify counts the first alone,
    so that the others, and what follows them, are only forward passes lost: hang their children on
    the first before.

    Source: the tree layouts of SGLang's ``build_tree_kernel_efficient``. Mutates: none. Host sync:
    no (under ``HWCORE_DEBUG=1`` yes). Graph-safe: yes, FULL excepted: its size follows the lengths.
    """
    from hwcore.activation import current_backend

    _check_kinds(draft_tokens, parents, seq_lens, spec_steps, tree_mask_mode)
    bs, num_draft_tokens = draft_tokens.shape
    steps = num_draft_tokens - 1 if spec_steps is None else spec_steps
    readable = may_read(draft_tokens)
    if readable:
        _check_content(draft_tokens, parents, seq_lens)
    total = 0
    if tree_mask_mode is TreeMaskMode.FULL:
        check_size(_WHERE, "max_mask_bytes", max_mask_bytes, 0, "Pass a number of bytes")
        total = _prefix_total(seq_lens, seq_lens_sum)
        _check_mask_size(total, bs, num_draft_tokens, max_mask_bytes)
    backend = backend or current_backend()
    build = kernel(backend, kernels.build_tree)
    with explains_missing(backend):
        positions, mask, next_token, next_sibling = build(
            parents, seq_lens, steps, int(tree_mask_mode), total
        )
    if readable:
        depth = positions - seq_lens.unsqueeze(1)
        expected = f"a node at most {steps} deep (spec_steps)"
        fix = "Raise spec_steps or prune the tree"
        check_values(_WHERE, "depth of node", depth, depth > steps, expected, fix)
    tree = DraftTree(
        draft_tokens=draft_tokens,
        parents=parents,
        positions=positions.flatten(),
        tree_mask=mask,
        retrieve_index=torch.arange(bs * num_draft_tokens, device=parents.device).view_as(parents),
        retrieve_next_token=next_token,
        retrieve_next_sibling=next_sibling,
        spec_steps=steps,
        tree_mask_mode=tree_mask_mode,
    )
    writes = _writes(tree)
    if readable and build is kernels.build_tree and writes is not None:
        _built[tree] = writes
    return tree


def _check_mask_size(seq_lens_sum: int, bs: int, n: int, most: int) -> None:
    size = n * (seq_lens_sum + bs * n)
    if size > most:
        expected = f"at most {most} bytes (max_mask_bytes)"
        fix = "Use TreeMaskMode.QLEN_ONLY, whose mask does not grow with the prefix"
        raise ArgumentValueError(describe(_WHERE, "size of the FULL mask", size, expected, fix))


def _prefix_total(seq_lens: Tensor, seq_lens_sum: int | None) -> int:
    if seq_lens_sum is None:
        if seq_lens.device.type != "cpu":
            expected = f"an int for a FULL mask on {seq_lens.device}"
            fix = "Pass sum(seq_lens), which the host knows, or use TreeMaskMode.QLEN_ONLY"
            raise ArgumentValueError(describe(_WHERE, "seq_lens_sum", None, expected, fix))
        return int(seq_lens.sum())
    check_size(_WHERE, "seq_lens_sum", seq_lens_sum, 0, "Pass sum(seq_lens) as a Python int")
    if may_read(seq_lens) and seq_lens_sum != (total := int(seq_lens.cpu().sum())):
        expected = f"{total}, the sum of seq_lens"
        fix = "Recompute it for this batch"
        raise ArgumentValueError(describe(_WHERE, "seq_lens_sum", seq_lens_sum, expected, fix))
    return seq_lens_sum


def _check_kinds(
    draft_tokens: Tensor,
    parents: Tensor,
    seq_lens: Tensor,
    spec_steps: int | None,
    tree_mask_mode: object,
) -> None:
    int64 = (torch.int64,)
    check_tensor(_WHERE, "draft_tokens", draft_tokens, int64, [("bs", None), ("N", None)])
    (bs, n), device = draft_tokens.shape, draft_tokens.device
    if n == 0:
        expected = "[bs, N] with N at least 1"
        fix = "Give each request its root token in column 0"
        got = list(draft_tokens.shape)
        raise ArgumentValueError(describe(_WHERE, "draft_tokens.shape", got, expected, fix))
    check_tensor(_WHERE, "parents", parents, int64, [("bs", bs), ("N", n)], device)
    lens_dtypes = (torch.int64, torch.int32)
    check_tensor(_WHERE, "seq_lens", seq_lens, lens_dtypes, [("bs", bs)], device)
    if spec_steps is not None:
        check_size(_WHERE, "spec_steps", spec_steps, 0, "Pass the greatest depth of the tree")
    if not isinstance(tree_mask_mode, TreeMaskMode):
        names = ", ".join(f"TreeMaskMode.{mode.name}" for mode in TreeMaskMode)
        fix = "Pass a member of TreeMaskMode"
        raise ArgumentTypeError(describe(_WHERE, "tree_mask_mode", tree_mask_mode, names, fix))


def _check_content(draft_tokens: Tensor, parents: Tensor, seq_lens: Tensor) -> None:
    draft_tokens, parents, seq_lens = draft_tokens.cpu(), parents.cpu(), seq_lens.cpu()
    n = parents.shape[1]
    node = torch.arange(n, device=parents.device)
    fix = "Pass token ids; padding nodes too need one that the model can embed"
    check_values(_WHERE, "draft_tokens", draft_tokens, draft_tokens < 0, "at least 0", fix)
    fix = "Pass the tokens in the KV cache before the root"
    check_values(_WHERE, "seq_lens", seq_lens, seq_lens < 0, "at least 0", fix)
    fix = "Put the root in column 0 and give it no parent"
    bad = (parents >= 0) & (node == 0)
    check_values(_WHERE, "parents", parents, bad, "-1 in column 0", fix)
    fix = "Use indices within the request's own tree"
    bad = (parents < -1) | (parents >= n)
    check_values(_WHERE, "parents", parents, bad, f"-1 or a node index below {n}", fix)
    fix = "Order the nodes so that a parent precedes its children"
    check_values(_WHERE, "parents", parents, parents >= node, "a node before its child", fix)
    bad = (parents > 0) & (parents.gather(1, parents.clamp(min=0)) < 0)
    fix = "Attach the node to the root or to a node of the tree"
    check_values(_WHERE, "parents", parents, bad, "no padding node as parent", fix)
