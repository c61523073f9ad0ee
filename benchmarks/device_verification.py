"""Verification from logits on a device: over a softmax or argmax of every row, and over a read.

Trees have 64 nodes, logits are float32. Against peers by the host's clock around some calls and one
wait, as an engine would call them: below a few requests all are short, and launches count. What a
peer does after it has normalised every row is kept to the least, so as not to count against it: a
walk by the core's own kernel over given tokens and, where it samples, a draw from one row of each
request; no residual. Against the sum of exactly the rows that the walks come to, by the device's
clock, in graphs of the same call over and over: what fits into a cache lies there for both.

All requests of a batch accept as many drafts: none, half of their path, or all of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hwcore.cli.device_clock import DeviceClock, accelerator
from hwcore.cli.measurement import Row, Target, interleaved
from hwcore.speculative import (
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

    from hwcore.backend import Backend

ON_DEVICE = True
NODES, TOPK, STEPS, VOCAB = 64, 8, 6, 2**17
BATCHES = (1, 2, 4, 8, 16, 32, 64)
PATTERNS = {"none accepted": 0, "half accepted": STEPS // 2, "all accepted": STEPS}

_SIZE = f"N {NODES}, V {VOCAB // 1024}k"
SMALL = {
    "sampling": Target(f"`verify_sampling` / softmax of all rows + walk, {_SIZE}, bs < 8", 1.0),
    "greedy": Target(f"`verify_greedy` / argmax of all rows + walk, {_SIZE}, bs < 8", 1.0),
}
LARGE = {
    "sampling": Target(f"`verify_sampling` / softmax of all rows + walk, {_SIZE}, bs ≥ 8", 0.5),
    "greedy": Target(f"`verify_greedy` / argmax of all rows + walk, {_SIZE}, bs ≥ 8", 0.5),
}
READ = Target(f"`verify_sampling` / read of the needed rows, {_SIZE}, bs ≥ 16", 2.0)
READ_GREEDY = Target(f"`verify_greedy` / read of the needed rows, {_SIZE}, bs ≥ 16", None)
TARGETS = [*SMALL.values(), *LARGE.values(), READ, READ_GREEDY]

_COPIES = 4  # of the logits, that a peer's temporaries may take

Times = dict[str, float]


class Batch:
    """A batch of equal trees, whose nodes 0 to STEPS are a chain, and the target's logits."""

    def __init__(self, hw: Backend, bs: int, vocab: int) -> None:
        device = hw.device()
        generator = torch.Generator().manual_seed(bs)
        self.parents = _parents(generator)
        tokens = [torch.randperm(vocab, generator=generator)[:NODES] for _ in range(bs)]
        self.tokens = torch.stack(tokens).to(device)
        self.tree = build_tree(
            self.tokens,
            torch.tensor([self.parents] * bs, device=device),
            torch.full((bs,), 100, device=device),
            spec_steps=STEPS,
            tree_mask_mode=TreeMaskMode.QLEN_ONLY,
        )
        hw.manual_seed(bs)
        self.logits = torch.randn(bs, NODES, vocab, device=device).mul_(3)
        self.heat = torch.linspace(0.7, 1.3, bs, device=device)
        self.params = SamplingParams(self.heat)
        self.coins = torch.rand(bs, NODES, generator=generator).to(device)
        self.final_coins = torch.rand(bs, generator=generator).to(device)

    def sample(self) -> VerifyResult:
        """Call what is measured."""
        coins, final = self.coins, self.final_coins
        return verify_sampling(self.tree, self.logits, self.params, coins=coins, final_coins=final)

    def softmax_of_all(self) -> object:
        """Normalise every row, walk, and draw from one row of each request."""
        probs = torch.softmax(self.logits / self.heat[:, None, None], -1)
        verify_greedy(self.tree, self.tokens)
        reached = probs[:, 0].cumsum(-1)
        return torch.searchsorted(reached, self.final_coins.unsqueeze(1) * reached[:, -1:])

    def accept(self, wanted: int) -> Tensor:
        """Set the logits of the drafts; return the rows that the walks come to, as a view."""
        request = torch.arange(len(self.tokens), device=self.tokens.device)
        for node in range(1, NODES):
            value = 40.0 if node <= wanted else -40.0
            self.logits[request, self.parents[node], self.tokens[:, node]] = value
        for name, result in (("sampling", self.sample()), ("greedy", self.greedy())):
            lens = result.accept_lens.tolist()
            if lens != [wanted + 1] * len(lens):
                message = f"{name}: paths of {lens} tokens; each should be of {wanted + 1}"
                raise RuntimeError(message)
        return self.logits[:, : wanted + 1]

    def greedy(self) -> VerifyResult:
        """Call what is measured."""
        return verify_greedy(self.tree, self.logits)


def _parents(generator: torch.Generator) -> list[int]:
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
    return parents


def run(quick: bool = False) -> list[Row]:
    """Return the rows of this subject."""
    hw = accelerator()
    clock, vocab = DeviceClock(hw), 2**10 if quick else VOCAB
    found: dict[tuple[str, int], Times] = {}
    too_large: dict[int, str] = {}
    for bs in (1, 8, 16) if quick else BATCHES:
        size = bs * NODES * vocab * 4 * _COPIES
        torch.accelerator.empty_cache()  # what a smaller batch left
        free = hw.memory_info().free_bytes
        if size > free:
            too_large[bs] = f"bs {bs} would take {size >> 20} MiB, and {free >> 20} are free"
            continue
        batch = Batch(hw, bs, vocab)
        for pattern, wanted in PATTERNS.items():
            found[pattern, bs] = _measure(clock, batch, batch.accept(wanted), quick)
        del batch
    left_out = "; ".join(too_large.values())
    return [
        *(_row(found, SMALL[n], n, f"{n} of all", range(1, 8), left_out) for n in SMALL),
        *(_row(found, LARGE[n], n, f"{n} of all", range(8, 65), left_out) for n in LARGE),
        _row(found, READ, "sampling alone", "read", range(16, 65), left_out),
        _row(found, READ_GREEDY, "greedy alone", "read", range(16, 65), left_out),
    ]


def _measure(clock: DeviceClock, batch: Batch, needed: Tensor, quick: bool) -> Times:
    calls, rounds = (2, 2) if quick else (20, 9)
    tree, logits = batch.tree, batch.logits
    by_host: dict[str, Callable[[], object]] = {
        "sampling": batch.sample,
        "sampling of all": batch.softmax_of_all,
        "greedy": batch.greedy,
        "greedy of all": lambda: verify_greedy(tree, logits.argmax(-1)),
    }
    subjects = {name: clock.by_host(call, calls) for name, call in by_host.items()}
    if len(batch.tokens) >= 16:
        on_device: dict[str, Callable[[], object]] = {
            "sampling alone": batch.sample,
            "greedy alone": batch.greedy,
            "read": lambda: needed.sum(-1),
        }
        subjects |= {name: clock.on_device([call] * calls) for name, call in on_device.items()}
    return interleaved(subjects, rounds)


def _row(
    found: dict[tuple[str, int], Times],
    target: Target,
    ours: str,
    peer: str,
    sizes: range,
    left_out: str,
) -> Row:
    """Return the worst ratio of ours over a peer, of these batch sizes."""
    points = {key: times for key, times in found.items() if key[1] in sizes}
    if not points:
        return target.not_measured(left_out or "no batch of such a size was run")
    ratios = [times[ours] / times[peer] for times in points.values()]
    texts = [
        f"{pattern}, bs {bs}: {1e6 * times[ours]:.1f} / {1e6 * times[peer]:.1f} µs"
        for (pattern, bs), times in points.items()
    ]
    return target.row(max(ratios), "; ".join([*texts, *([left_out] if left_out else [])]))
