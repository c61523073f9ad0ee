"""What a draft tree costs beside the forward: chosen, built, committed; over bare copies."""

from __future__ import annotations

import dataclasses
import timeit
from typing import TYPE_CHECKING, Any

import torch

import hwcore
from hwcore.cli.measurement import Row, interleaved
from hwcore.speculative import DraftSteps, TreeMaskMode, build_tree, commit, top_k, verify_greedy

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from hwcore.speculative import DraftTree

BS, NODES, TOPK, STEPS, PREFIX = 64, 64, 8, 6, 1000
DRAFT_VOCAB, HIDDEN = 10_240, 4096


def run(quick: bool = False) -> list[Row]:
    """Return the rows of this subject."""
    hwcore.use("cpu")
    rounds, calls = (5, 3) if quick else (15, 10)
    drafted, probs = _drafted()
    tokens, parents = drafted.organize(NODES).with_root(torch.zeros(BS, dtype=torch.int64))
    # Of any length: what is all alike could be laid out without looking at it.
    lens = PREFIX + torch.randint(-50, 51, (BS,), generator=torch.Generator().manual_seed(1))

    def build(mode: TreeMaskMode) -> Callable[[], DraftTree]:
        return lambda: build_tree(tokens, parents, lens, spec_steps=STEPS, tree_mask_mode=mode)

    trees = {mode: build(mode)() for mode in TreeMaskMode}
    tree = trees[TreeMaskMode.QLEN_ONLY]
    result = verify_greedy(tree, tokens.roll(-1, dims=1))
    slots = torch.arange(BS * NODES).view(BS, NODES)
    hidden = torch.randn(BS, NODES, HIDDEN)
    committed = commit(tree, result, lens, slots, hidden_states=hidden)
    subjects: dict[str, Callable[[], object]] = {
        "organize": lambda: drafted.organize(NODES).with_root(lens),
        "commit": lambda: commit(tree, result, lens, slots, hidden_states=hidden),
        "copy of commit": _copies(_tensors(committed)),
        "top_k": lambda: top_k(probs, TOPK),
        "torch.topk": lambda: probs.topk(TOPK),
    }
    for mode, of_mode in trees.items():
        subjects[mode.name] = build(mode)
        made = {"draft_tokens", "parents"}  # the caller's own
        subjects[f"copy of {mode.name}"] = _copies(_tensors(of_mode, without=made))
    found = interleaved({name: _timer(call, calls) for name, call in subjects.items()}, rounds)
    setting = f"bs {BS}, {NODES} nodes"
    return [
        *(_built(found, mode.name, setting) for mode in TreeMaskMode),
        _row(found, "organize", f"`organize` and `with_root`, {setting}", "ms"),
        _over(found, "commit", "copy of commit", "`commit` / bare copy of its outputs"),
        _over(found, "top_k", "torch.topk", "`top_k` / torch.topk, which is not deterministic"),
    ]


def _drafted() -> tuple[DraftSteps, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = BS * TOPK, DRAFT_VOCAB
    probs = torch.randn(shape, generator=generator).mul(2).softmax(-1)
    steps = DraftSteps(TOPK)
    for step in range(STEPS):
        few = probs[torch.randperm(len(probs), generator=generator)].view(BS, TOPK, -1)
        if step == 0:
            best, tokens = top_k(few[:, 0], TOPK)
            steps.first(best, tokens)
        else:
            steps.next(*top_k(few, TOPK))
    return steps, probs


def _built(found: dict[str, float], mode: str, setting: str) -> Row:
    """Return the milliseconds of a mode; the target is 3, or 3 bare copies if that is more."""
    seconds, copy = found[mode], found[f"copy of {mode}"]
    detail = f"{seconds / copy:.1f} bare copies of its outputs, which take {copy * 1e3:.3f} ms"
    if mode == TreeMaskMode.FULL.name:
        setting += f", prefixes of {PREFIX} on average"
    title = f"`build_tree`, {mode}, {setting}"
    return Row(title, seconds * 1e3, "ms", max(3.0, 3e3 * copy), True, detail)


def _row(found: dict[str, float], what: str, title: str, unit: str) -> Row:
    detail = f"top-{TOPK} of {STEPS} steps"
    return Row(title, found[what] * 1e3, unit, None, True, detail)


def _over(found: dict[str, float], what: str, floor: str, title: str) -> Row:
    detail = f"{found[what] * 1e3:.2f} ms, {found[floor] * 1e3:.2f} ms"
    return Row(title, found[what] / found[floor], "x", None, True, detail)


def _tensors(result: Any, without: set[str] = frozenset()) -> list[Tensor]:  # type: ignore[assignment]
    fields = [field.name for field in dataclasses.fields(result) if field.name not in without]
    return [value for name in fields if isinstance(value := getattr(result, name), torch.Tensor)]


def _copies(tensors: list[Tensor]) -> Callable[[], object]:
    places = [torch.empty_like(tensor) for tensor in tensors]
    return lambda: [place.copy_(it) for place, it in zip(places, tensors, strict=True)]


def _timer(call: Callable[[], object], calls: int) -> Callable[[], float]:
    return lambda: timeit.timeit(call, number=calls) / calls
