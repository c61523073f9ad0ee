"""The core's operations that a device may bring a kernel for, with reference and inputs.

A kernel takes what the reference takes and returns what it returns. A new operation of the core is
one more entry here; a plugin's kernel under any other name would never be called.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from hwcore.kernels import (
    assert_and_invalidate,
    gather_rows,
    verify_tree_greedy,
    verify_tree_sampling,
)
from hwcore.speculative import DraftTree, TreeMaskMode, build_tree, commit, verify_greedy

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["OPERATIONS", "Operation", "leaves", "mapped"]


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation of the core.

    Attributes
    ----------
    name : str
        Its key in ``kernels()``.
    reference : callable
        The portable implementation, which runs on any device.
    inputs : callable
        From a generator and a batch size to positional and named arguments on the CPU: tensors,
        dataclasses of tensors, plain values. Values random, the batch size 0 allowed.
    tolerance : float
        Relative and absolute; 0: bit for bit.
    """

    name: str
    reference: Callable[..., Any]
    inputs: Callable[[torch.Generator, int], tuple[tuple[Any, ...], dict[str, Any]]]
    tolerance: float = 0.0


def leaves(result: Any, name: str = "result") -> list[tuple[str, Any]]:
    """Return the tensors and plain values of a result, with names."""
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        fields = dataclasses.fields(result)
        return [leaf for f in fields for leaf in leaves(getattr(result, f.name), f.name)]
    if isinstance(result, (list, tuple)):
        return [leaf for n, part in enumerate(result) for leaf in leaves(part, f"{name}[{n}]")]
    return [(name, result)]


def mapped(change: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """Return a value with every tensor in it changed; dataclasses are looked into."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)(mapped(change, part) for part in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: mapped(change, getattr(value, f.name)) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value


_NODES, _VOCABULARY = 7, 3  # few tokens, so that paths are accepted and siblings repeat

_Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def _tree_inputs(generator: torch.Generator, bs: int) -> _Inputs:
    earlier = [torch.randint(0, node, (bs,), generator=generator) for node in range(1, _NODES)]
    parents = torch.stack([torch.full((bs,), -1), *earlier], dim=1)
    tokens = torch.randint(0, _VOCABULARY, (bs, _NODES), generator=generator)
    seq_lens = torch.randint(0, 40, (bs,), generator=generator)
    mode = TreeMaskMode(int(torch.randint(0, len(TreeMaskMode), (), generator=generator)))
    # The sum sizes a FULL mask; a device would have to be asked for it.
    named = {"tree_mask_mode": mode, "seq_lens_sum": int(seq_lens.sum())}
    return (tokens, parents, seq_lens), named


def _verify_inputs(generator: torch.Generator, bs: int) -> _Inputs:
    arguments, named = _tree_inputs(generator, bs)
    target = torch.rand(bs, _NODES, _VOCABULARY, generator=generator)
    return (*_links_of(build_tree(*arguments, **named)), target, _NODES - 1), {}


def _links_of(tree: DraftTree) -> tuple[torch.Tensor, ...]:
    links = tree.retrieve_next_token, tree.retrieve_next_sibling
    return tree.draft_tokens, tree.parents, *links


def _sampling_inputs(generator: torch.Generator, bs: int) -> _Inputs:
    arguments, named = _tree_inputs(generator, bs)
    logits = torch.randn(bs, _NODES, _VOCABULARY, generator=generator)
    temperatures = torch.rand(bs, generator=generator) + 0.5
    coins = torch.rand(2, bs, _NODES, generator=generator)
    ks, ps, floors = (
        torch.randint(1, _VOCABULARY + 1, (bs,), generator=generator),
        torch.rand(bs, generator=generator) * 0.5 + 0.5,
        torch.rand(bs, generator=generator) * 0.5,
    )
    # Each of them may be missing; a greedy request may be there.
    *there, greedy = torch.randint(0, 2, (4,), generator=generator).bool().tolist()
    filters = [one if used else None for one, used in zip((ks, ps, floors), there, strict=True)]
    if greedy:
        temperatures[:1] = 0
    tree = build_tree(*arguments, **named)
    rule = (1.0, 1.0, _NODES - 1, greedy)
    return (*_links_of(tree), logits, temperatures, *filters, *coins, *rule), {}


def _commit_inputs(generator: torch.Generator, bs: int) -> _Inputs:
    (_, _, seq_lens), _ = arguments = _tree_inputs(generator, bs)
    tree = build_tree(*arguments[0], **arguments[1])
    target = torch.rand(bs, _NODES, _VOCABULARY, generator=generator)
    slots = torch.randperm(bs * _NODES, generator=generator).view(bs, _NODES)
    return (tree, verify_greedy(tree, target), seq_lens, slots), {}


_POOL, _WORDS = 9, 6


def _gather_inputs(generator: torch.Generator, bs: int) -> _Inputs:
    words = torch.iinfo(torch.int64).max  # any bits
    rows = torch.randint(-words, words, (_POOL, _WORDS), generator=generator)
    dtype = (torch.int64, torch.int32)[int(torch.randint(0, 2, (), generator=generator))]
    indices = torch.randint(0, _POOL, (bs,), generator=generator).to(dtype)
    return (rows, indices, torch.zeros(bs, _WORDS, dtype=torch.int64)), {}


def _invalidate_inputs(generator: torch.Generator, bs: int) -> _Inputs:
    guards = torch.randint(-4, 40, (bs,), generator=generator)
    state = torch.randint(0, 40, (_POOL, 3), generator=generator, dtype=torch.int32)
    indices = torch.randint(0, _POOL, (bs,), generator=generator)
    return (guards, state, indices, torch.zeros((), dtype=torch.int64)), {}


OPERATIONS: dict[str, Operation] = {
    operation.name: operation
    for operation in (
        Operation("build_tree", build_tree, _tree_inputs),
        Operation("verify_tree_greedy", verify_tree_greedy, _verify_inputs),
        Operation("verify_tree_sampling", verify_tree_sampling, _sampling_inputs),
        Operation("commit", commit, _commit_inputs),
        Operation("gather_rows", gather_rows, _gather_inputs),
        Operation("assert_and_invalidate", assert_and_invalidate, _invalidate_inputs),
    )
}
"""Every operation that has a reference, by the name that ``kernels()`` uses for it."""
