"""Sampled verification as it runs on the device: what it emits, and how often."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from hwcore.kernels import build_tree, kernel, verify_tree_sampling
from hwcore.testing.conformance import laws
from hwcore.testing.conformance.kit import conforms
from hwcore.testing.distributions import judge, power

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from hwcore.testing.conformance.kit import Kit

SAMPLES = 2**13
"""Of each problem: a distance of 0.08 over 60 sequences is missed once in 10^5 times at most."""

_DISTANCE = 0.08

HIGHEST = 1 - 2.0**-24  # no float32 lies between this coin and 1

_NAME = verify_tree_sampling.__name__


class Sampling:
    @conforms("kernels", patience=4)
    def test_sampled_sequences_have_the_targets_distribution(self, kit: Kit) -> None:
        _judge(kit, 1.0, 1.0, "Follow the reference: each decision by a coin of its own")

    @conforms("kernels", patience=4)
    def test_thresholds_favour_siblings_in_their_order(self, kit: Kit) -> None:
        # Where masses are divided by a threshold, the first siblings take what the last ones lose.
        fix = "Offer children in index order, and divide their accumulated mass by the threshold"
        _judge(kit, 0.5, 0.7, fix)

    @conforms("kernels")
    def test_extreme_coins_emit_no_token_without_probability(self, kit: Kit) -> None:
        """By a coin of 0, by the highest one, and by any two for draft and end."""
        vocabulary, requests = 3001, 24
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(requests, 4, vocabulary, generator=generator)
        logits[..., :50] = logits[..., -200:] = float("-inf")
        # In some requests little else is possible than what is drafted.
        logits[::4, :, 60:] = float("-inf")
        tokens = torch.tensor([[1, 10, 55, vocabulary - 1]]).expand(requests, -1)
        coins = torch.tensor([0.0, HIGHEST])
        accept = coins.repeat_interleave(2).repeat(requests // 4)
        final = coins.repeat(requests // 2)
        result = _run(kit, tokens, [-1, 0, 0, 0], logits, accept, final)
        predict, accept_index, accept_lens, bonus_tokens = result[:4]
        fix = "Ask for a positive mass, and fall to the last token that has some"
        first = predict.view(requests, 4)[:, 0].to(torch.int64)
        second = torch.where(accept_lens == 2, bonus_tokens, -1)
        for request in range(requests):
            what = f"`{_NAME}`, coins {float(accept[request])!r} and {float(final[request])!r}"
            node = max(int(accept_index[request, 1]) - request * 4, 0)
            for emitted, row in ((first[request], 0), (second[request], node)):
                token = int(emitted)
                possible = token == -1 or (
                    0 <= token < vocabulary and bool(logits[request, row, token] > float("-inf"))
                )
                kit.that(possible, what, token, "a token whose probability is not 0", fix)
            ended_there = int(accept_lens[request]) == 1 and int(first[request]) == 55
            others = int((logits[request, 0] > float("-inf")).sum()) > 1
            again = "Take the rejected drafts' mass away"
            kit.that(not (ended_there and others), what, 55, "no token that was rejected", again)

    @conforms("kernels")
    def test_a_coin_equal_to_the_probability_rejects(self, kit: Kit) -> None:
        """A kernel may round a probability up, or even most of them, but not all of these."""
        sizes, offsets = (2, 4, 8, 16, 32, 64), (0.0, 1.3, -7.7, 20.1)
        cases = [(size, offset) for size in sizes for offset in offsets]
        logits = torch.full((len(cases), 2, 70), float("-inf"))
        for row, (size, offset) in enumerate(cases):
            logits[row, :, :size] = offset
        tokens = torch.zeros(len(cases), 2, dtype=torch.int64)
        accept = torch.tensor([1 / size for size, _ in cases])
        result = _run(kit, tokens, [-1, 0], logits, accept, torch.full_like(accept, 0.5))
        accepted = int((result[2] > 1).sum())
        what = f"`{_NAME}`, drafts accepted by a coin equal to their probability"
        fix = "Accept where the coin is less than the mass"
        kit.that(accepted < len(cases), what, accepted, f"fewer than all {len(cases)}", fix)


def _judge(kit: Kit, threshold_single: float, threshold_acc: float, fix: str) -> None:
    arguments = laws.arguments_for(SAMPLES, threshold_single, threshold_acc)
    results = _called(kit, arguments)
    cells = laws.cells_of(results)
    for number, problem in enumerate(laws.PROBLEMS):
        counts = cells[number :: len(laws.PROBLEMS)].bincount(minlength=laws.CELLS)
        verdict = judge(counts, problem.law(threshold_single, threshold_acc))
        what = f"`{_NAME}`, {SAMPLES} sampled sequences"
        expected = (
            f"what the target's distribution makes likely; a distance of {_DISTANCE} is seen with "
            f"probability {power(SAMPLES, verdict.cells, _DISTANCE):.6f}"
        )
        kit.that(bool(verdict), what, str(verdict), expected, fix)


def _run(
    kit: Kit,
    tokens: Tensor,
    parents: Sequence[int],
    logits: Tensor,
    accept: Tensor,
    final: Tensor,
) -> tuple[Tensor, ...]:
    """Verify with the same coins at every node, at temperature 1, one step deep."""
    bs, n = tokens.shape
    rows = torch.tensor([list(parents)]).repeat(bs, 1)
    _, _, next_token, next_sibling = build_tree(rows, torch.zeros(bs, dtype=torch.int64), 1, 1, 0)
    coins = [each.unsqueeze(1).repeat(1, n) for each in (accept, final)]
    links = (tokens.contiguous(), rows, next_token, next_sibling)
    rest = (None, None, None, *coins, 1.0, 1.0, 1, False)
    return _called(kit, (*links, logits, torch.ones(bs), *rest))


def _called(kit: Kit, arguments: Sequence[Any]) -> tuple[Tensor, ...]:
    """Call what verifies on the device, kernel or reference, and return its results on the CPU."""
    verify: Callable[..., tuple[Tensor, ...]] = kernel(kit.hw, verify_tree_sampling)
    moved = [a.to(kit.device) if isinstance(a, torch.Tensor) else a for a in arguments]
    try:
        results = verify(*moved)
    except Exception as error:  # noqa: BLE001 - any is the kernel's fault
        raised = f"{type(error).__name__}: {error}"
        kit.fail(f"`{_NAME}`", raised, "a result", "Let it take what the reference takes")
    return tuple(kit.raw.read(part) for part in results)
