"""Verification from logits against peers that normalise every row, and against its own minimum.

The minimum is the softmax of the rows that the walks come to, in one call or in parts that fit
into the cache, whichever is faster. Trees have 64 nodes, topk 8, 6 steps.
"""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

import torch

from hwcore.cli.measurement import Row, interleaved
from hwcore.speculative import (
    DraftTree,
    SamplingParams,
    TreeMaskMode,
    VerifyResult,
    build_tree,
    verify_greedy,
    verify_sampling,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

NODES, TOPK, STEPS = 64, 8, 6
POINTS = [(vocab, bs) for vocab in (2**15, 2**17) for bs in (8, 16, 32, 64)]
QUICK = [(2**15, 64), (2**17, 8)]
PATTERNS: dict[str, Callable[[int], int]] = {
    "none accepted": lambda request: 0,
    "half accepted": lambda request: request % (STEPS + 1),
    "all accepted": lambda request: STEPS,
}
_AT_ONCE = 2**27  # logits that a peer normalises at a time: it copies them, up to four times
_FITS = 2**18
_SORTED_AT_ONCE = 1  # requests whose rows are sorted; the time is multiplied

Times = tuple[float, float]  # ours and the peer's


class Batch:
    """A batch of trees with logits that accept a given number of drafts of each request."""

    def __init__(self, vocab: int, bs: int) -> None:
        generator = torch.Generator().manual_seed(vocab + bs)
        parents = _parents(generator)
        tokens = torch.stack(
            [torch.randperm(vocab, generator=generator)[:NODES] for _ in range(bs)]
        )
        self.tree = build_tree(
            tokens,
            parents.repeat(bs, 1),
            torch.full((bs,), 100),
            spec_steps=STEPS,
            tree_mask_mode=TreeMaskMode.QLEN_ONLY,
        )
        self.logits = torch.empty(bs, NODES, vocab)
        self.logits.normal_(generator=generator).mul_(3)
        self.coins = torch.rand(bs, NODES, generator=generator)
        self.final_coins = torch.rand(bs, generator=generator)
        heat = torch.rand(bs, generator=generator) * 0.6 + 0.7
        self.plain = SamplingParams.of(heat.tolist())
        # Of four requests two with both filters, one with top-p alone, one with neither.
        top_ks = [50 if request % 4 < 2 else -1 for request in range(bs)]
        top_ps = [0.9 if request % 4 < 3 else 1.0 for request in range(bs)]
        self.filtered = SamplingParams.of(heat.tolist(), top_ks, top_ps)

    def verify(self, params: SamplingParams) -> VerifyResult:
        """Call what is measured."""
        coins, final = self.coins, self.final_coins
        return verify_sampling(self.tree, self.logits, params, coins=coins, final_coins=final)

    def accept(self, pattern: str) -> Tensor:
        """Set the logits of the drafts; return the rows of the walks, ``request * N + node``."""
        parents, tokens = self.tree.parents, self.tree.draft_tokens
        # Nodes 0 to STEPS are a chain.
        for request in range(len(parents)):
            wanted = PATTERNS[pattern](request)
            for node in range(1, NODES):
                parent = int(parents[request, node])
                token, good = int(tokens[request, node]), node <= min(STEPS, wanted)
                self.logits[request, parent, token] = 40.0 if good else -40.0
        index = self.verify(self.plain).accept_index
        rows = index[index >= 0].to(torch.int64)
        expected = sum(PATTERNS[pattern](request) + 1 for request in range(len(parents)))
        if len(rows) != expected:
            message = f"{pattern}: {len(rows)} rows were walked, {expected} should be"
            raise RuntimeError(message)
        return rows


def _parents(generator: torch.Generator) -> Tensor:
    """Draw a chain of ``STEPS`` drafts, and other nodes below any that has fewer than ``TOPK``."""
    parents, depth, children = [-1], [0], [0]
    while len(parents) < NODES:
        node = len(parents)
        free = [n for n in range(node) if depth[n] < STEPS and children[n] < TOPK]
        pick = int(torch.randint(0, len(free), (), generator=generator))
        parent = node - 1 if node <= STEPS else free[pick]
        children[parent] += 1
        parents.append(parent)
        depth.append(depth[parent] + 1)
        children.append(0)
    return torch.tensor([parents])


def run(quick: bool = False) -> list[Row]:
    """Return the rows of this subject."""
    found: dict[str, dict[tuple[str, int, int], Times]] = {}
    for vocab, bs in QUICK if quick else POINTS:
        batch = Batch(vocab, bs)
        for pattern in PATTERNS:
            rows = batch.accept(pattern)
            for name, times in _measure(batch, rows, 2 if quick else 3).items():
                found.setdefault(name, {})[pattern, vocab, bs] = times
        del batch
    return [row for pattern in PATTERNS for row in _rows(found, pattern)]


def _measure(batch: Batch, rows: Tensor, rounds: int) -> dict[str, Times]:
    tree, logits = batch.tree, batch.logits
    bs, _, vocab = logits.shape
    heat = batch.plain.temperatures[rows // NODES].unsqueeze(1)
    flat = logits.view(-1, vocab)
    at_once = max(1, _AT_ONCE // (NODES * vocab))
    parts = [slice(start, start + at_once) for start in range(0, bs, at_once)]

    def every_row(normalise: Callable[[slice], Tensor], scale: float = 1) -> Callable[[], float]:
        def measure() -> float:
            begun = time.perf_counter()
            for part in parts if scale == 1 else [slice(0, _SORTED_AT_ONCE)]:
                _walk(tree, part, normalise(part), batch.coins, batch.final_coins)
            return (time.perf_counter() - begun) * scale

        return measure

    several = {
        "sampling": lambda: batch.verify(batch.plain),
        "filtered": lambda: batch.verify(batch.filtered),
        "greedy": lambda: verify_greedy(tree, logits),
        "needed rows": lambda: torch.softmax(flat[rows] / heat, -1),
        "needed rows in parts": lambda: _in_parts(flat, rows, heat),
    }
    subjects = {name: _timed(call, 3) for name, call in several.items()}
    subjects["softmax of all rows"] = every_row(lambda part: _softmax(batch, part))
    subjects["argmax of all rows"] = _timed(lambda: verify_greedy(tree, logits.argmax(-1)), 1)
    times = interleaved(subjects, rounds)
    # Minutes for a whole batch: some requests, once.
    sort = every_row(lambda part: _sorted(batch, part), scale=bs / _SORTED_AT_ONCE)
    times["sort of all rows"] = interleaved({"sort": sort}, 1, 0)["sort"]
    needed = min(times["needed rows"], times["needed rows in parts"])
    return {
        "sampling": (times["sampling"], times["softmax of all rows"]),
        "minimum": (times["sampling"], needed),
        "filtered": (times["filtered"], times["sort of all rows"]),
        "greedy": (times["greedy"], times["argmax of all rows"]),
    }


def _timed(call: Callable[[], object], calls: int) -> Callable[[], float]:
    def measure() -> float:
        if calls > 1:
            call()  # what ran before has taken the caches
        begun = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - begun) / calls

    return measure


def _in_parts(flat: Tensor, rows: Tensor, heat: Tensor) -> None:
    """Take the softmax of some rows in parts that fit into a cache, in the same memory."""
    size = max(1, _FITS // flat.shape[1])
    scaled, probs = torch.empty(2, min(size, len(rows)), flat.shape[1])
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        scratch = scaled[: len(part)]
        torch.div(flat.index_select(0, part), heat[start : start + size], out=scratch)
        torch.softmax(scratch, -1, out=probs[: len(part)])


def _softmax(batch: Batch, part: slice) -> Tensor:
    return torch.softmax(batch.logits[part] / batch.plain.temperatures[part, None, None], -1)


def _sorted(batch: Batch, part: slice) -> Tensor:
    """Renormalise after top-k and top-p as engines do that have no kernel for it."""
    params = batch.filtered
    if params.top_ks is None or params.top_ps is None:
        message = "the batch has no filters"
        raise RuntimeError(message)
    probs = _softmax(batch, part)
    values, tokens = probs.sort(dim=-1, descending=True)
    rank = torch.arange(values.shape[-1])
    top_ks = params.top_ks[part, None, None]
    values = values.masked_fill((rank >= top_ks) & (top_ks > 0), 0.0)
    values /= values.sum(-1, keepdim=True)
    before = values.cumsum(-1) - values
    values = values.masked_fill(before >= params.top_ps[part, None, None], 0.0)
    values /= values.sum(-1, keepdim=True)
    return torch.zeros_like(probs).scatter_(-1, tokens, values)


def _walk(tree: DraftTree, part: slice, probs: Tensor, coins: Tensor, final_coins: Tensor) -> None:
    """Walk as SGLang's kernel does, all requests at once, on probabilities of every row."""
    rejected = torch.zeros_like(probs)
    parents, tokens, coins = tree.parents[part], tree.draft_tokens[part], coins[part]
    request, column = torch.arange(len(parents)), torch.arange(NODES)
    node = torch.zeros_like(request)
    for _ in range(STEPS):
        children = parents == node.unsqueeze(1)
        mass = probs[request.unsqueeze(1), node.unsqueeze(1), tokens] * children
        accepts = (mass > 0) & (coins[request, node].unsqueeze(1) < mass.cumsum(1))
        child = torch.where(accepts, column, NODES).amin(1)
        refused = (children & (column < child.unsqueeze(1))).nonzero(as_tuple=True)
        at = (refused[0], node[refused[0]], tokens[refused])
        rejected[at] = probs[at]
        node = torch.where(child < NODES, child, node)
    left = (probs[request, node] - rejected[request, node]).clamp(min=0)
    reached = left.cumsum(-1)
    torch.searchsorted(reached, final_coins[part].unsqueeze(1) * reached[:, -1:], right=True)


def _rows(found: dict[str, dict[tuple[str, int, int], Times]], pattern: str) -> list[Row]:
    titles = {
        "sampling": ("`verify_sampling`: softmax of all rows + walk / ours", 8.0, False),
        "minimum": ("`verify_sampling`: ours / temperature + softmax of needed rows", 2.0, True),
        "filtered": ("`verify_sampling`, top-k/top-p: sort of all rows + walk / ours", 20.0, False),
        "greedy": ("`verify_greedy`: argmax of all rows + walk / ours", 5.0, False),
    }
    rows = []
    for name, (title, target, at_most) in titles.items():
        ratios, texts = [], []
        for (which, vocab, bs), times in found[name].items():
            if which == pattern:
                own, peer = times
                ratios.append(own / peer if at_most else peer / own)
                size = f"{vocab // 1024}k,{bs}"
                texts.append(f"{size}: {own * 1e3:.1f}/{peer * 1e3:.1f} ms {ratios[-1]:.1f}x")
        value = statistics.median(ratios)
        rows.append(Row(f"{title}, {pattern}", value, "x", target, at_most, "; ".join(texts)))
    return rows


def main() -> None:
    """Print the rows."""
    for row in run():
        print(f"{row.value:7.2f}x (target {row.target}) {row.what}\n         {row.detail}")


if __name__ == "__main__":
    main()
