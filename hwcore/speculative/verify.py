"""Verification: how far the target model agrees with a draft tree."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hwcore._checks import (
    check_instance,
    check_range,
    check_size,
    check_tensor,
    check_values,
    may_read,
)
from hwcore._env import debug_enabled
from hwcore.activation import current_backend
from hwcore.errors import ArgumentTypeError, ArgumentValueError, describe
from hwcore.kernels.selection import kernel
from hwcore.kernels.torch_ops import explains_missing
from hwcore.kernels.verify import verify_tree_greedy
from hwcore.speculative.tree import DraftTree, is_as_built

if TYPE_CHECKING:
    from torch import Tensor

    from hwcore.backend import Backend

__all__ = ["VerifyResult", "VerifyStatus", "check_logits", "check_tree", "verify_greedy"]

_WHERE = "verify_greedy"
_INTS = (torch.int64, torch.int32)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class VerifyStatus(enum.IntEnum):
    """How the verification of one request went."""

    OK = 0
    INVALID_LOGITS = 1
    """A row that the walk came to holds NaN or +inf, or nothing but -inf. The path before it is
    good; the bonus token is V - 1, an arbitrary token of the vocabulary."""


@dataclass(frozen=True, eq=False, slots=True)
class VerifyResult:
    """The path that the target accepts in each tree, and the token that it adds itself.

    Attributes
    ----------
    predict : Tensor, int32, [bs * N]
        The target's token after each node of the accepted path; 0 at all other nodes. int32 as
        the kernels that may stand in for this reference write it; a token id always fits.
    accept_index : Tensor, int32, [bs, spec_steps + 1]
        The accepted path from the root on, as indices into ``predict``; -1 past its end.
    accept_lens : Tensor, int32, [bs]
        Tokens to commit: accepted drafts and the bonus; in [1, spec_steps + 1].
    bonus_tokens : Tensor, int64, [bs]
        The target's own token after the last accepted node: the root of the next tree.
    status : Tensor, int32, [bs]
        A :class:`VerifyStatus` for each request.
    """

    predict: Tensor
    accept_index: Tensor
    accept_lens: Tensor
    bonus_tokens: Tensor
    status: Tensor

    @property
    def num_correct_drafts(self) -> Tensor:
        """Accepted draft tokens, int32 ``[bs]``: ``accept_lens`` without the bonus."""
        return self.accept_lens - 1


def verify_greedy(
    tree: DraftTree, target: Tensor, *, backend: Backend | None = None
) -> VerifyResult:
    """Accept the path of a draft tree on which every token is the target's own argmax.

    Called once a step, after the target's forward over the tree. Token for token it gives what
    decoding with that target one token at a time would give.

    From the root on, the walk moves to the first child, in index order, whose token is the
    target's at the current node, and stops where there is none. Of equal logits the lowest token
    is the target's; of equal siblings the first wins.

    Parameters
    ----------
    tree : DraftTree
        From :func:`build_tree`.
    target : Tensor
        Either logits, float32, bfloat16, float16 or float64, [bs, N, vocab]: only the rows that
        the walk visits are read, ``spec_steps + 1`` of ``N`` at most. Or the target's token after
        each node, int64, [bs, N], in [0, 2^31). On the device of ``tree``.
    backend : Backend, optional
        Whose kernel runs, if it has one; by default the process's own.

    Returns
    -------
    VerifyResult
        An empty batch gives empty tensors.

    Raises
    ------
    ArgumentTypeError
        If an argument's type, dtype, rank or device is wrong.
    ArgumentValueError
        If a shape does not fit, a token is out of range, or the tree's links are no tree's
        (content: CPU arguments always, others under ``HWCORE_DEBUG=1``).
    CapabilityError
        If the device lacks a torch operation, and its plugin said that it does not.

    Notes
    -----
    NaN, +inf or nothing but -inf in a row that a request's walk comes to ends that walk, with
    ``status`` saying so; no other request changes by a bit.

    Source: SGLang's ``verify_tree_greedy``. Mutates: none. Host sync: no (under ``HWCORE_DEBUG=1``
    yes). Graph-safe: yes; the number of steps is ``spec_steps``, whatever is accepted.
    """
    _check(tree, target)
    backend = backend or current_backend()
    verify = kernel(backend, verify_tree_greedy)
    with explains_missing(backend), torch.no_grad():
        return VerifyResult(
            *verify(
                tree.draft_tokens,
                tree.parents,
                tree.retrieve_next_token,
                tree.retrieve_next_sibling,
                target,
                tree.spec_steps,
            )
        )


def _check(tree: DraftTree, target: object) -> None:
    check_tree(_WHERE, tree)
    if not isinstance(target, torch.Tensor):
        fix = "Pass the target's logits, or its token at each node"
        raise ArgumentTypeError(describe(_WHERE, "target", target, "a tensor", fix))
    if target.is_floating_point():
        check_logits(_WHERE, "target", target, tree)
        return
    bs, n = tree.draft_tokens.shape
    form, device = [("bs", bs), ("N", n)], tree.draft_tokens.device
    check_tensor(_WHERE, "target", target, (torch.int64,), form, device)
    if may_read(target):
        fix = "Pass the target's argmax at each node"
        check_range(_WHERE, "target", target, 0, 2**31, "a token in [0, 2^31)", fix)


def check_logits(where: str, name: str, logits: object, tree: DraftTree) -> None:
    """Raise unless ``logits`` are logits of the tree's nodes, over a vocabulary with its tokens."""
    tokens = tree.draft_tokens
    bs, n = tokens.shape
    form = [("bs", bs), ("N", n), ("vocab", None)]
    check_tensor(where, name, logits, _FLOATS, form, tokens.device)
    assert isinstance(logits, torch.Tensor)
    vocab = logits.shape[2]
    if vocab == 0:
        fix, got = "Pass the logits of a whole vocabulary", list(logits.shape)
        raise ArgumentValueError(describe(where, f"{name}.shape", got, "vocab >= 1", fix))
    if may_read(tokens):
        fix = "Draft with the target's own tokenizer"
        expected = f"a token below {vocab}, the vocabulary of {name}"
        check_range(where, "tree.draft_tokens", tokens, 0, vocab, expected, fix)


def check_tree(where: str, tree: object) -> None:
    """Raise unless ``tree`` is a DraftTree whose links, in each request, are its parents'.

    They are looked at unless they are known to be; under ``HWCORE_DEBUG=1`` always.
    """
    check_form(where, tree)
    assert isinstance(tree, DraftTree)
    parents, first, sibling = tree.parents, tree.retrieve_next_token, tree.retrieve_next_sibling
    if not may_read(parents) or (is_as_built(tree) and not debug_enabled()):
        return
    # They are read here anyway, and a device may lack what looks at them.
    parents, first, sibling = parents.cpu(), first.cpu(), sibling.cpu()
    n = parents.shape[1]
    node = torch.arange(n)
    if not parents.numel() or _are_links(parents, first, sibling, node):
        return
    has_first, has_sibling, is_child = first != -1, sibling != -1, parents >= 0
    of_first, of_sibling = (parents.gather(1, links.clamp(0, n - 1)) for links in (first, sibling))
    linked = torch.zeros(parents.shape[0], n + 1, dtype=torch.int64)
    for links in (first, sibling):
        there = torch.where((links < 0) | (links >= n), n, links).to(torch.int64)
        linked.scatter_add_(1, there, torch.ones_like(there))
    # A parent before its child and a sibling after it: no way through the tree comes back.
    below = f"-1 or a node before it, of {n} in its request"
    after = f"-1 or a node after it, of {n} in its request"
    child, another = "a child of its node", "another child of the same parent"
    once = "one link to each node that has a parent, from it or from a sibling"
    first_name, sibling_name = "tree.retrieve_next_token", "tree.retrieve_next_sibling"
    for name, values, bad, expected in (
        ("tree.parents", parents, (parents < -1) | (parents >= node), below),
        (first_name, first, has_first & ((first <= node) | (first >= n)), after),
        (sibling_name, sibling, has_sibling & ((sibling <= node) | (sibling >= n)), after),
        (first_name, first, has_first & (of_first != node), child),
        (sibling_name, sibling, has_sibling & ((of_sibling != parents) | ~is_child), another),
        ("links to a node of tree", linked[:, :n], is_child & (linked[:, :n] != 1), once),
    ):
        check_values(where, name, values, bad, expected, "Pass what build_tree returned, unchanged")


def _are_links(parents: Tensor, first: Tensor, sibling: Tensor, node: Tensor) -> bool:
    """Say whether the links are those of the parents, and these are before their children.

    In few operations, for it is asked at each step. Every link leads forwards, to a child of its
    node or of its node's parent: none is less than the one that belongs there, nor is there one
    where none belongs. So, if there are as many links as children, their sum tells whether one is
    greater than it should be.
    """
    n, is_child = len(node), parents >= 0
    links = torch.stack([first, sibling])
    owner = torch.stack([node.expand_as(parents), torch.where(is_child, parents, -2)])
    leads_to = parents.expand(2, -1, -1).gather(2, links.clamp(0, n - 1))
    fits = ((leads_to == owner) & (links > node)) | (links == -1)
    linked, children = links + 1, torch.where(is_child, node + 1, 0)  # 0: none
    return (
        bool(fits.all())
        and int(links.amax()) < n
        and int(parents.amin()) >= -1
        and int(linked.count_nonzero()) == int(is_child.count_nonzero())
        and int(linked.sum()) == int(children.sum())
    )


def check_form(where: str, tree: object) -> None:
    """Raise unless ``tree`` is a DraftTree whose tensors have the shapes that its class says."""
    check_instance(where, "tree", tree, DraftTree, "build_tree")
    assert isinstance(tree, DraftTree)
    tokens = tree.draft_tokens
    check_tensor(where, "tree.draft_tokens", tokens, _INTS, [("bs", None), ("N", None)])
    (bs, n), device = tokens.shape, tokens.device
    for name in ("parents", "retrieve_next_token", "retrieve_next_sibling"):
        form = [("bs", bs), ("N", n)]
        check_tensor(where, f"tree.{name}", getattr(tree, name), _INTS, form, device)
    check_tensor(where, "tree.positions", tree.positions, _INTS, [("bs * N", bs * n)], device)
    check_size(where, "tree.spec_steps", tree.spec_steps, 0, "Pass what build_tree returned")
