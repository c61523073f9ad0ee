"""Verification: how far the target model agrees with a draft tree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hwcore._checks import check_instance, check_tensor, check_values, may_read
from hwcore.errors import ArgumentTypeError, ArgumentValueError, describe
from hwcore.speculative.tree import DraftTree

if TYPE_CHECKING:
    from torch import Tensor

_WHERE = "verify_greedy"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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
    """

    predict: Tensor
    accept_index: Tensor
    accept_lens: Tensor
    bonus_tokens: Tensor

    @property
    def num_correct_drafts(self) -> Tensor:
        """Accepted draft tokens, int32 ``[bs]``: ``accept_lens`` without the bonus."""
        return self.accept_lens - 1


def verify_greedy(tree: DraftTree, target: Tensor) -> VerifyResult:
    """Accept the path of a draft tree on which every token is the target's own argmax.

    Called once a step, after the target's forward over the tree. Token for token it gives what
    decoding with that target one token at a time would give.

    From the root on, the walk moves to the first child, in index order, whose token is the
    target's at the current node, and stops where there is none. Of equal siblings the first wins.

    Parameters
    ----------
    tree : DraftTree
        From :func:`build_tree`.
    target : Tensor
        Either logits, float32, bfloat16, float16 or float64, [bs, N, vocab]: only the rows that
        the walk visits are read, ``spec_steps + 1`` of ``N`` at most. Or the target's token after
        each node, int64, [bs, N], in [0, 2^31). On the device of ``tree``.

    Returns
    -------
    VerifyResult
        An empty batch gives empty tensors.

    Raises
    ------
    ArgumentTypeError
        If an argument's type, dtype, rank or device is wrong.
    ArgumentValueError
        If a shape does not fit, or a token is out of range (content: CPU arguments always, others
        under ``HWCORE_DEBUG=1``).

    Notes
    -----
    NaN in a request's logits may change that request's tokens, which stay within the vocabulary;
    no other request is touched. Equal logits: the lowest token, on devices whose argmax says so.

    Source: SGLang's ``verify_tree_greedy``. Mutates: none. Host sync: no (under ``HWCORE_DEBUG=1``
    yes). Graph-safe: yes; the number of steps is ``spec_steps``, whatever is accepted.
    """
    _check(tree, target)
    bs, n = tree.draft_tokens.shape
    device = tree.draft_tokens.device
    request = torch.arange(bs, device=device)
    first_row = (request * n).unsqueeze(1)
    column = torch.arange(n, device=device)

    def target_token(node: Tensor) -> Tensor:
        """Return the target's token ``[bs, 1]`` after ``node [bs, 1]``."""
        if target.is_floating_point():
            return target[request, node.squeeze(1)].argmax(-1, keepdim=True)
        return target.gather(1, node)

    node = torch.zeros(bs, 1, dtype=torch.int64, device=device)
    alive = torch.ones(bs, 1, dtype=torch.bool, device=device)
    token = target_token(node)
    predict = torch.zeros(bs, n, dtype=torch.int32, device=device)
    predict.scatter_(1, node, token.to(torch.int32))
    path = [first_row]
    # A request whose walk has ended stays at its last node, whatever an argmax that is free to
    # choose among equal logits says there the next time.
    for _ in range(tree.spec_steps):
        agrees = (tree.parents == node) & (tree.draft_tokens == token)  # [bs, N]
        child = torch.where(agrees, column, n).amin(1, keepdim=True)
        alive = alive & (child < n)
        node = torch.where(alive, child, node)
        path.append(torch.where(alive, first_row + node, -1))
        token = target_token(node)
        predict.scatter_(1, node, token.to(torch.int32))
    accept_index = torch.cat(path, dim=1).to(torch.int32)
    return VerifyResult(
        predict=predict.view(-1),
        accept_index=accept_index,
        accept_lens=(accept_index >= 0).sum(1, dtype=torch.int32),
        bonus_tokens=token.squeeze(1),
    )


def _check(tree: DraftTree, target: object) -> None:
    check_instance(_WHERE, "tree", tree, DraftTree, "build_tree")
    bs, n = tree.draft_tokens.shape
    device = tree.draft_tokens.device
    if not isinstance(target, torch.Tensor):
        fix = "Pass the target's logits, or its token at each node"
        raise ArgumentTypeError(describe(_WHERE, "target", target, "a tensor", fix))
    tokens = tree.draft_tokens
    if target.is_floating_point():
        form = [("bs", bs), ("N", n), ("vocab", None)]
        check_tensor(_WHERE, "target", target, _FLOATS, form, device)
        vocab = target.shape[2]
        if vocab == 0:
            fix = "Pass the logits of a whole vocabulary"
            got = list(target.shape)
            raise ArgumentValueError(describe(_WHERE, "target.shape", got, "vocab >= 1", fix))
        if may_read(tokens):
            fix = "Draft with the target's own tokenizer"
            expected = f"a token below {vocab}, the vocabulary of target"
            check_values(_WHERE, "tree.draft_tokens", tokens, tokens >= vocab, expected, fix)
        return
    check_tensor(_WHERE, "target", target, (torch.int64,), [("bs", bs), ("N", n)], device)
    if may_read(target):
        bad = (target < 0) | (target >= 2**31)
        fix = "Pass the target's argmax at each node"
        check_values(_WHERE, "target", target, bad, "a token in [0, 2^31)", fix)
