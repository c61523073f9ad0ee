"""The two kinds of step: one token, or a tree of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hwcore.speculative import TreeMaskMode, build_tree, commit, verify_greedy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from examples.serving.model import Model


def plain_step(model: Model, tokens: Sequence[int]) -> int:
    """Append tokens to the model's cache and return the one that follows."""
    batch = torch.tensor([list(tokens)], device=model.device)
    return int(model.forward(batch, last=True)[0, -1].argmax())


def tree_step(
    model: Model, tokens: Sequence[int], parents: Sequence[int], spec_steps: int
) -> list[int]:
    """Run a draft tree through the model, keep the path that it agrees with, return what follows.

    Parameters
    ----------
    model : Model
        Its cache ends before the root, and afterwards with the last accepted node.
    tokens, parents : sequence of int
        As in :func:`hwcore.speculative.build_tree`, for the one request there is.
    spec_steps : int
        Greatest depth of a node.

    Returns
    -------
    tokens : list of int
        The accepted drafts and the model's own next token: at least one.
    """
    device, length, size = model.device, model.length, len(tokens)
    seq_lens = torch.tensor([length], device=device)
    tree = build_tree(
        torch.tensor([list(tokens)], device=device),
        torch.tensor([list(parents)], device=device),
        seq_lens,
        spec_steps=spec_steps,
        tree_mask_mode=TreeMaskMode.QLEN_ONLY,
    )
    logits = model.forward(tree.draft_tokens, tree.positions.unsqueeze(0), tree.tree_mask)
    slots = model.slots[:, length : length + size]
    committed = commit(tree, verify_greedy(tree, logits), seq_lens, slots)
    assert committed.kv_src is not None
    assert committed.kv_dst is not None
    model.move(committed.kv_src[0], committed.kv_dst[0])
    # One copy to the host tells tokens and length: -1 stands past the last token.
    emitted = [token for token in committed.accept_tokens[0].tolist() if token >= 0]
    model.length = length + len(emitted)
    return emitted
