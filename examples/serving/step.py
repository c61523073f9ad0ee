"""The two kinds of step: one token, or a tree of them; greedy, or drawn with a request's coins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hwcore.speculative import (
    SamplingParams,
    TreeMaskMode,
    build_tree,
    commit,
    verify_greedy,
    verify_sampling,
)

if TYPE_CHECKING:
    from torch import Tensor

    from examples.serving.model import Model
    from hwcore.speculative import DraftTree, VerifyResult


@dataclass(frozen=True)
class Sampling:
    """How a text's tokens are chosen.

    Attributes
    ----------
    temperature : float
        0: the likeliest token, always.
    seed : int
        Of the text's coins: the coin of a place does not depend on the step that decides it.
    """

    temperature: float = 0.0
    seed: int = 0


GREEDY = Sampling()


@dataclass
class Emitted:
    """What a step gave.

    Attributes
    ----------
    tokens : list of int
        At least one.
    features : Tensor, float, [1, n, taps * hidden]
        The model's, at the token before each.
    path : list of int
        Nodes of the tree that were accepted, the root first.
    """

    tokens: list[int]
    features: Tensor
    path: list[int]


def plain_step(model: Model, tokens: list[int], sampling: Sampling = GREEDY) -> Emitted:
    """Append tokens to the model's cache, and choose the one that follows.

    The features are those of all the tokens.
    """
    device = model.device
    batch = torch.tensor([tokens], device=device)
    logits, features = model.forward(batch, last=True)
    # A tree that is nothing but its root: what is verified is the token after it.
    lens = torch.tensor([model.length - 1], device=device)
    tree = root_only(batch[:, -1:], lens)
    token = int(_verify(tree, logits, sampling).bonus_tokens)
    return Emitted([token], features, [0])


def root_only(roots: Tensor, lens: Tensor) -> DraftTree:
    """Return trees that are nothing but roots ``[bs, 1]``, after ``lens [bs]`` entries."""
    none = torch.full_like(roots, -1)
    return build_tree(roots, none, lens, spec_steps=0, tree_mask_mode=TreeMaskMode.QLEN_ONLY)


def tree_step(
    model: Model,
    nodes: Tensor,
    parents: Tensor,
    spec_steps: int,
    sampling: Sampling = GREEDY,
) -> Emitted:
    """Run a draft tree through the model, keep the path that it agrees with, add its own token.

    Parameters
    ----------
    model : Model
        Its cache ends before the root, and afterwards with the last accepted node.
    nodes, parents : Tensor, int64, [1, n]
        As in :func:`hwcore.speculative.build_tree`, for the one request there is.
    spec_steps : int
        Greatest depth of a node.
    sampling : Sampling
    """
    device, length, size = model.device, model.length, nodes.shape[1]
    seq_lens = torch.tensor([length], device=device)
    tree = build_tree(
        nodes,
        parents,
        seq_lens,
        spec_steps=spec_steps,
        tree_mask_mode=TreeMaskMode.QLEN_ONLY,
    )
    logits, features = model.forward(tree.draft_tokens, tree.positions.unsqueeze(0), tree.tree_mask)
    result = _verify(tree, logits, sampling)
    slots = model.slots[:, length : length + size]
    committed = commit(tree, result, seq_lens, slots, hidden_states=features)
    assert committed.kv_src is not None
    assert committed.kv_dst is not None
    model.move(committed.kv_src[0], committed.kv_dst[0])
    # One copy to the host tells tokens and path: -1 stands past the last.
    both = torch.cat((committed.accept_tokens, result.accept_index.to(torch.int64)))
    tokens, path = ([number for number in row if number >= 0] for row in both.tolist())
    model.length = length + len(tokens)
    assert committed.hidden_states is not None
    return Emitted(tokens, committed.hidden_states[:, : len(tokens)], path)


def _verify(tree: DraftTree, logits: Tensor, sampling: Sampling) -> VerifyResult:
    if not sampling.temperature:
        return verify_greedy(tree, logits)
    params = SamplingParams.of([sampling.temperature], device=logits.device)
    seeds = torch.tensor([sampling.seed], device=logits.device)
    return verify_sampling(tree, logits, params, seeds=seeds)
