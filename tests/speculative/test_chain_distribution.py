"""Sampled tokens are distributed as the target's, whatever the draft's distribution is.

A model here is a table of logits by the last two tokens. Many requests, each with a seed of its
own, decode a few tokens by as many steps as it takes, and what they emit is counted.
"""

import itertools

import pytest
import torch

from hwcore.speculative import (
    CoinPurpose,
    SamplingParams,
    block_positions,
    draw_coins,
    sample_drafts,
    verify_chain,
)
from hwcore.testing.distributions import judge, power, samples_needed

BOTH = pytest.mark.parametrize("block", [False, True], ids=["by token", "by block"])

VOCABULARY, LENGTH = 3, 4
CELLS = VOCABULARY**LENGTH
START = 7
DISTANCE = 0.04
REQUESTS = samples_needed(CELLS, DISTANCE, miss=1e-6)


def table(seed, spread=1.0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(VOCABULARY, VOCABULARY, VOCABULARY, generator=g) * spread


def joint(target, temperature=1.0):
    """Probability of each sequence of LENGTH tokens after two tokens 0."""
    probs = torch.softmax(target.double() / temperature, -1)
    found = []
    for sequence in itertools.product(range(VOCABULARY), repeat=LENGTH):
        whole, chance = (0, 0, *sequence), 1.0
        for at in range(LENGTH):
            chance *= float(probs[whole[at], whole[at + 1], whole[at + 2]])
        found.append(chance)
    return torch.tensor(found)


def decode(target, draft, drafts, block, device, *, temperature=1.0, n=REQUESTS):
    """Sequences of LENGTH tokens, [n, LENGTH]."""
    target, draft = target.to(device), draft.to(device)
    params = SamplingParams.of([temperature] * n, device=device)
    seeds = torch.arange(n, device=device)
    held = torch.zeros(n, 2 + LENGTH + drafts + 1, dtype=torch.int64, device=device)
    lens = torch.full((n,), 2, device=device)  # tokens so far; the root is the last of them
    while int(lens.min()) < 2 + LENGTH:
        done = lens >= 2 + LENGTH
        root = torch.where(done, 2 + LENGTH, lens).unsqueeze(1) - 1
        chain = [held.gather(1, root)]
        before, probs = held.gather(1, root - 1), []
        at = START + root.squeeze(1)
        columns = block_positions(at, drafts) if block else at.unsqueeze(1) + 1
        for step in range(drafts):
            logits = draft[before.squeeze(1), chain[-1].squeeze(1)]
            where = columns[:, step] if block else columns.squeeze(1) + step
            token, distribution = sample_drafts(logits, params, seeds=seeds, positions=where)
            before = chain[-1]
            chain.append(token.unsqueeze(1))
            probs.append(distribution)
        candidates = torch.cat(chain, 1)
        preceding = torch.cat([held.gather(1, root - 1), candidates[:, :-1]], 1)
        result = verify_chain(
            candidates,
            target[preceding, candidates],
            torch.stack(probs, 1),
            params,
            seq_lens=at,
            seeds=seeds,
            block_verification=block,
        )
        emitted = result.predict.view(n, -1).to(torch.int64)
        slots = torch.arange(drafts + 1, device=device)
        kept = (slots < result.accept_lens.unsqueeze(1)) & ~done.unsqueeze(1)
        place = torch.where(kept, root + 1 + slots, held.shape[1] - 1)
        held.scatter_(1, place, emitted)
        lens = torch.where(done, lens, lens + result.accept_lens)
    return held[:, 2 : 2 + LENGTH].cpu()


def cells(sequences):
    weights = VOCABULARY ** torch.arange(LENGTH - 1, -1, -1)
    return (sequences * weights).sum(1).bincount(minlength=CELLS)


def test_the_power_is_stated():
    """A distance of 0.04 between distributions of 81 sequences is missed once in a million."""
    assert REQUESTS < 40_000
    assert power(REQUESTS, CELLS, DISTANCE) >= 1 - 1e-6


@BOTH
@pytest.mark.parametrize(
    ("draft_seed", "spread", "temperature", "drafts"),
    [(1, 1.0, 1.0, 1), (1, 1.0, 1.0, 2), (2, 2.5, 1.0, 3), (0, 1.0, 1.0, 3), (3, 1.0, 0.6, 2)],
    ids=["one draft", "two drafts", "a draft far off", "a draft like the target", "cooler"],
)
def test_sequences_are_distributed_as_the_targets(
    block, draft_seed, spread, temperature, drafts, device
):
    target, draft = table(0), table(draft_seed, spread)
    sequences = decode(target, draft, drafts, block, device, temperature=temperature)
    verdict = judge(cells(sequences), joint(target, temperature))
    assert verdict, verdict


def test_a_block_is_verified_with_coins_of_its_own(device, monkeypatch):
    """With those of the absolute positions, which come again, the test above must fail."""
    from hwcore.speculative import chain

    def by_position(root, n):
        return root.unsqueeze(1) + torch.arange(1, n + 1, device=root.device)

    monkeypatch.setattr(chain, "block_positions", by_position)
    monkeypatch.setitem(globals(), "block_positions", by_position)
    target, draft = table(0), table(2, 2.5)
    sequences = decode(target, draft, 3, True, device)
    verdict = judge(cells(sequences), joint(target))
    assert not verdict, verdict


def accepted_of(p, q, drafts, block, n, device, seed=0):
    """Mean number of drafts accepted, of memoryless distributions."""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.multinomial(q.expand(n * drafts, -1), 1, generator=g).view(n, drafts)
    result = verify_chain(
        torch.cat([torch.zeros(n, 1, dtype=torch.int64), tokens], 1).to(device),
        p.log().expand(n, drafts + 1, -1).to(device),
        q.expand(n, drafts, -1).to(device),
        SamplingParams.of([1.0] * n, device=device),
        coins=(torch.randint(0, 2**24, (n, drafts + 1), generator=g) / 2**24).to(device),
        final_coins=torch.zeros(n, device=device),
        block_verification=block,
    )
    return result.num_correct_drafts.double().mean().item()


def test_the_papers_example_has_the_papers_figures(device):
    """Two drafts, p = (1/3, 2/3), q = (2/3, 1/3): 10/9 by token, 11/9 by block."""
    p, q = torch.tensor([1 / 3, 2 / 3]), torch.tensor([2 / 3, 1 / 3])
    n = 60_000  # a deviation of the mean is 0.004
    assert accepted_of(p, q, 2, False, n, device) == pytest.approx(10 / 9, abs=0.02)
    assert accepted_of(p, q, 2, True, n, device) == pytest.approx(11 / 9, abs=0.02)


@pytest.mark.parametrize("seed", range(6))
def test_a_block_accepts_no_less_in_expectation(seed, device):
    g = torch.Generator().manual_seed(seed)
    p, q = torch.softmax(torch.randn(2, 8, generator=g) * (1 + seed % 3), -1)
    n = 20_000
    by_token = accepted_of(p, q, 4, False, n, device, seed)
    by_block = accepted_of(p, q, 4, True, n, device, seed)
    # Drafts and coins are the same; four deviations of the difference of two means, at most.
    assert by_block >= by_token - 4 * (2 * 4 / n) ** 0.5
    if seed == 0:
        assert by_block > by_token + 0.02


def test_drafts_of_one_seed_are_sampled_from_their_distribution(device):
    """Positions instead of seeds, as a request goes through them."""
    n = samples_needed(4, 0.02, miss=1e-6)
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05])
    tokens, _ = sample_drafts(
        probs.log().expand(n, 4).to(device),
        SamplingParams.of([1.0] * n, device=device),
        seeds=torch.full((n,), 42, device=device),
        positions=torch.arange(n, device=device),
    )
    verdict = judge(tokens.cpu().bincount(minlength=4), probs)
    assert verdict, verdict


def test_one_coin_for_two_decisions_would_be_found(device):
    """The residual drawn with the coin that had the draft rejected."""

    target, draft = table(0), table(1)
    n = REQUESTS
    first = torch.softmax(target[0, 0].double(), -1)
    seeds = torch.arange(n, device=device)
    at = torch.full((n,), START + 1, device=device)
    params = SamplingParams.of([1.0] * n, device=device)
    token, probs = sample_drafts(
        draft[0, 0].expand(n, -1).to(device), params, seeds=seeds, positions=at + 1
    )
    root = torch.zeros_like(token)
    coins = draw_coins(seeds, torch.stack([at + 1, at + 2], 1), CoinPurpose.ACCEPT)
    result = verify_chain(
        torch.stack([root, token], 1),
        target.to(device)[torch.stack([root, root], 1), torch.stack([root, token], 1)],
        probs.unsqueeze(1),
        params,
        coins=coins,
        final_coins=coins[:, 0].contiguous(),
    )
    counts = result.predict.view(n, 2)[:, 0].cpu().bincount(minlength=VOCABULARY)
    verdict = judge(counts, first)
    assert not verdict, verdict
