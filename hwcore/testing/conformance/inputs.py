"""Random inputs for the core's operations, on which any right kernel gives the same result.

Probabilities and coins of sampling are multiples of 1/64 and odd multiples of 1/128. A sum of some
of the former is then at least 1/8192 away from any product that it is compared with: however a
kernel rounds, it decides alike.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Generator, Tensor

from hwcore.kernels import build_tree, verify_tree_greedy

__all__ = [
    "commit_inputs",
    "gather_inputs",
    "greedy_inputs",
    "invalidate_inputs",
    "move_inputs",
    "mrope_inputs",
    "sampling_inputs",
    "tree_inputs",
]

Inputs: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]

_PARTS = 64  # what probabilities are multiples of
_QLEN_ONLY = 1


def _one_of(generator: Generator, *choices: Any) -> Any:
    return choices[int(torch.randint(0, len(choices), (), generator=generator))]


def _in_turn(generator: Generator, *choices: Any) -> Any:
    """Choose by the seed, so that successive seeds go through all choices."""
    return choices[generator.initial_seed() % len(choices)]


def _integers(generator: Generator, low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape, generator=generator)


# --- Trees ----------------------------------------------------------------------------------------


def _parents(generator: Generator, bs: int, nodes: int) -> Tensor:
    """Random trees, some of whose nodes are padding."""
    rows = torch.full((bs, nodes), -1)
    for node in range(1, nodes):
        parent = _integers(generator, 0, node, bs)
        there = (parent == 0) | (rows.gather(1, parent.unsqueeze(1)).squeeze(1) >= 0)
        pads = torch.rand(bs, generator=generator) < 0.1
        rows[:, node] = torch.where(there & ~pads, parent, -1)
    return rows


def tree_inputs(generator: Generator, bs: int) -> Inputs:
    """Make inputs of ``build_tree``: every mask mode, lengths of either type, up to 70 nodes."""
    nodes = _in_turn(generator, 7, 70, 40, 1)
    mode = _in_turn(generator, 2, 0, 1)
    parents = _parents(generator, bs, nodes)
    dtype = _one_of(generator, torch.int64, torch.int32)
    lens = _integers(generator, 0, 40, bs).to(dtype)
    if dtype is torch.int64 and mode != 0:
        lens += _one_of(generator, 0, 2**31)  # such a FULL mask nobody can hold
    return (parents, lens, nodes - 1, mode, int(lens.sum())), {}


_NODES = 7


def _links(generator: Generator, bs: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Make trees as verification takes them: few tokens, so that siblings repeat."""
    parents = _parents(generator, bs, _NODES)
    tokens = _integers(generator, 0, vocabulary, bs, _NODES)
    lens = torch.zeros(bs, dtype=torch.int64)
    _, _, next_token, next_sibling = build_tree(parents, lens, _NODES - 1, _QLEN_ONLY, 0)
    return tokens, parents, next_token, next_sibling


def _spoilt(generator: Generator, logits: Tensor) -> Tensor:
    """Make a few rows such that nothing can be chosen from them."""
    kind = _integers(generator, 0, 30, *logits.shape[:2])
    where = _integers(generator, 0, logits.shape[2], *logits.shape[:2]).unsqueeze(2)
    token = torch.arange(logits.shape[2])
    for number, value in enumerate((float("nan"), float("inf"))):
        logits = torch.where((kind == number).unsqueeze(2) & (token == where), value, logits)
    return torch.where((kind == 2).unsqueeze(2), float("-inf"), logits)


def greedy_inputs(generator: Generator, bs: int) -> Inputs:
    """Make inputs of ``verify_tree_greedy``: equal logits, invalid rows, or tokens."""
    vocabulary = _in_turn(generator, 3, 700)
    links = _links(generator, bs, min(vocabulary, 4))
    steps = _one_of(generator, _NODES - 1, 2)
    if _in_turn(generator, False, False, True):
        target = _integers(generator, 0, 4, bs, _NODES)
        return (*links, target, steps), {}
    logits = _integers(generator, -4, 3, bs, _NODES, vocabulary).to(torch.float32)
    logits[..., :4] += 2.0  # the tokens that were drafted
    dtype = _one_of(generator, torch.float32, torch.float32, torch.bfloat16)
    return (*links, _spoilt(generator, logits).to(dtype), steps), {}


# --- Sampling -------------------------------------------------------------------------------------


def _coins(generator: Generator, *shape: int) -> Tensor:
    return (2 * _integers(generator, 0, _PARTS, *shape) + 1) / (2.0 * _PARTS)


def sampling_inputs(generator: Generator, bs: int) -> Inputs:
    """Make inputs of ``verify_tree_sampling`` in which no decision is close."""
    vocabulary = _in_turn(generator, 5, 1100)
    links = _links(generator, bs, 4)
    # 64 parts dealt to the tokens, most of them to those that were drafted.
    dealt = _integers(generator, 0, 4, bs, _NODES, _PARTS)
    rest = _integers(generator, 0, vocabulary, bs, _NODES, _PARTS)
    dealt = torch.where(torch.rand(dealt.shape, generator=generator) < 0.8, dealt, rest)
    parts = torch.zeros(bs, _NODES, vocabulary)
    parts.scatter_add_(2, dealt, torch.ones(dealt.shape))
    temperatures = _one_of(generator, 1, 2, 4) * _integers(generator, 1, 3, bs) / 4
    logits = (parts / _PARTS).log() * temperatures.view(bs, 1, 1)
    any_greedy = _in_turn(generator, False, True, True)
    if any_greedy:
        temperatures[::3] = 0
        logits[::3] += torch.arange(vocabulary) * -1e-3  # no two are equal
    filters = (
        _integers(generator, 1, 6, bs),
        _coins(generator, bs),
        _coins(generator, bs) / 8,
    )
    # What nobody uses is None.
    used = _in_turn(generator, (0, 0, 0), (1, 1, 1), (0, 1, 0), (1, 0, 1))
    chosen = tuple(values if use else None for use, values in zip(used, filters, strict=True))
    thresholds = _in_turn(generator, (1.0, 1.0), (1.0, 1.0), (1.0, 1.0), (21 / 128, 0.75))
    return (
        *links,
        _spoilt(generator, logits),
        temperatures,
        *chosen,
        _coins(generator, bs, _NODES),
        _coins(generator, bs, _NODES),
        *thresholds,
        _in_turn(generator, 3, 2),
        any_greedy,
    ), {}


# --- After verification ---------------------------------------------------------------------------


def commit_inputs(generator: Generator, bs: int) -> Inputs:
    """Make inputs of ``commit_paths`` from a greedy walk, so that paths of all lengths occur."""
    links = _links(generator, bs, 3)
    target = _integers(generator, 0, 3, bs, _NODES)
    predict, index, accept_lens, _, _ = verify_tree_greedy(*links, target, _NODES - 1)
    lens = _integers(generator, 0, 40, bs).to(_one_of(generator, torch.int64, torch.int32))
    slots = torch.randperm(bs * _NODES, generator=generator).view(bs, _NODES)
    slots = _in_turn(generator, slots, slots, None)
    return (predict, index, accept_lens, lens, slots, _in_turn(generator, 1, 4)), {}


_POOL, _WORDS = 9, 6


def mrope_inputs(generator: Generator, bs: int) -> Inputs:
    """Make inputs of ``mrope_positions``: as many tokens for all, or of each its own number."""
    deltas = _integers(generator, -50, 2**33, _POOL)
    rows = _integers(generator, 0, _POOL, bs).to(_one_of(generator, torch.int64, torch.int32))
    if _in_turn(generator, False, True):
        positions = _integers(generator, 0, 2**33, bs * 5)
        return (deltas, rows, positions, None), {}
    counts = _integers(generator, 1, 6, bs)
    starts = (counts.cumsum(0) - counts).to(_one_of(generator, torch.int64, torch.int32))
    positions = _integers(generator, 0, 2**33, int(counts.sum()))
    return (deltas, rows, positions, starts), {}


# --- The relay ------------------------------------------------------------------------------------


def gather_inputs(generator: Generator, bs: int) -> Inputs:
    """Make inputs of ``gather_rows``."""
    words = torch.iinfo(torch.int64).max  # any bits
    rows = _integers(generator, -words, words, _POOL, _WORDS)
    dtype = _one_of(generator, torch.int64, torch.int32)
    indices = _integers(generator, 0, _POOL, bs).to(dtype)
    return (rows, indices, torch.zeros(bs, _WORDS, dtype=torch.int64)), {}


def invalidate_inputs(generator: Generator, bs: int) -> Inputs:
    """Make inputs of ``assert_and_invalidate``."""
    guards = _integers(generator, -4, 40, bs)
    state = _integers(generator, 0, 40, _POOL, 3).to(torch.int32)
    dtype = _one_of(generator, torch.int64, torch.int32)
    indices = _integers(generator, 0, _POOL, bs).to(dtype)
    return (guards, state, indices, torch.zeros((), dtype=torch.int64)), {}


def move_inputs(generator: Generator, bs: int) -> Inputs:
    """Make inputs of ``move_kv``: half of the requests commit a path, half mix their slots."""
    nodes, steps, layers = 7, 4, 2
    dtype = _in_turn(generator, torch.bfloat16, torch.float32, torch.uint8, torch.float8_e4m3fn)
    slots = bs * nodes + 1
    kv = _integers(generator, 0, 99, layers, slots, 2, 5).to(torch.uint8)
    kv = kv.view(dtype) if dtype.itemsize == 1 else kv.to(dtype)
    owned = torch.randperm(slots, generator=generator)[: bs * nodes].view(bs, nodes)
    src, dst = owned[:, :1].repeat(1, steps), owned[:, :1].repeat(1, steps)
    for request in range(bs):
        picks = torch.randperm(nodes - 1, generator=generator)[: steps - 1] + 1
        if request % 2:  # an entry that is read may be one that is written
            src[request, 1:] = owned[request, picks]
            dst[request, 1:] = owned[request, picks.flip(0)]
            continue
        taken = int(torch.randint(0, steps, (), generator=generator))
        src[request, 1 : taken + 1] = owned[request, picks[:taken].sort().values]
        dst[request, 1 : taken + 1] = owned[request, 1 : taken + 1]
    index = _one_of(generator, torch.int64, torch.int32)
    return (kv, src.to(index), dst.to(index)), {}
