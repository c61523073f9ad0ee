"""What is sampled is the target's distribution, and the tests that say so would see it if not.

Every test runs on verify_sampling, which has to pass, and on wrong variants of the slow walk, which
have to fail: the mutants of tests/speculative/_sampling.py.
"""

import itertools
import math

import pytest
import torch

from hwcore.speculative import SamplingParams, TreeMaskMode, build_tree, verify_sampling

from ._sampling import MUTANTS, distribution, seeded, walk

VOCAB, RUNS = 6, 8000
# Two levels and repeated siblings; node 3 repeats node 1. Token 5 cannot be.
TOKENS = [0, 1, 2, 1, 3, 0, 4]
PARENTS = [-1, 0, 0, 0, 1, 1, 2]
STEPS = 2
PARAMS = {
    "plain": (1.0, -1, 1.0, 0.0),
    "hot": (1.8, -1, 1.0, 0.0),
    "cut": (0.8, 4, 0.9, 0.02),
}


def rows(name):
    logits = torch.randn(len(TOKENS), VOCAB, generator=seeded(11)) * 0.8
    logits[:, 5] = -math.inf
    return logits, [distribution(row, *PARAMS[name]) for row in logits.tolist()]


def expected(probs):
    """Probability of each sequence of tokens that a step may commit."""
    outcomes = {}

    def follow(node, said, chance):
        for token, p in enumerate(probs[node]):
            child = next(
                (c for c, up in enumerate(PARENTS) if up == node and TOKENS[c] == token), None
            )
            if p > 0 and child is None:
                outcomes[(*said, token)] = chance * p
            elif p > 0:
                follow(child, (*said, token), chance * p)

    follow(0, (), 1.0)
    assert sum(outcomes.values()) == pytest.approx(1)
    return outcomes


def ours(name, device, how):
    logits, _ = rows(name)
    heat, k, p, floor = PARAMS[name]
    tree = build_tree(
        torch.tensor([TOKENS] * RUNS).to(device),
        torch.tensor([PARENTS] * RUNS).to(device),
        torch.full((RUNS,), 17).to(device),
        spec_steps=STEPS,
        tree_mask_mode=TreeMaskMode.QLEN_ONLY,
    )
    params = [[heat] * RUNS, [k] * RUNS, [p] * RUNS, [floor] * RUNS]
    if how == "seeds":
        coins = {"seeds": torch.arange(RUNS).to(device)}
    else:
        coins, final = drawn()
        coins = {"coins": coins.to(device), "final_coins": final.to(device)}
    got = verify_sampling(
        tree,
        logits.expand(RUNS, -1, -1).to(device),
        SamplingParams.of(*params, device=device),
        **coins,
    )
    predict, index = got.predict.cpu(), got.accept_index.cpu()
    return [
        tuple(predict[row[:length].long()].tolist())
        for row, length in zip(index, got.accept_lens.tolist(), strict=True)
    ]


def drawn():
    coins = torch.rand(RUNS, len(TOKENS) + 1, generator=seeded(12))
    return coins[:, :-1].contiguous(), coins[:, -1].contiguous()


def mutated(name, mutant):
    _, probs = rows(name)
    coins, final = drawn()
    said = []
    for run, last in zip(coins.tolist(), final.tolist(), strict=True):
        _, tokens, *_ = walk(
            TOKENS,
            PARENTS,
            probs.__getitem__,
            STEPS,
            run,
            lambda node, last=last: last,
            mutant=mutant,
            next_rows=lambda node: probs[(node + 1) % len(probs)],
        )
        said.append(tuple(tokens))
    return said


def is_plausible(said, outcomes):
    """Whether chi-square is below its 1 - 1e-6 quantile; an impossible outcome never is.

    With 8000 runs over 20 outcomes a shift of 6 % of the probability (total variation) is noted
    with a power of 0.99 at least; the mutants shift more.
    """
    counts = dict.fromkeys(outcomes, 0)
    for one in said:
        if one not in counts:
            return False
        counts[one] += 1
    rare = [one for one, p in outcomes.items() if p * len(said) < 5]
    cells = [(counts[one], p * len(said)) for one, p in outcomes.items() if one not in rare]
    if rare:
        cells.append((sum(counts[o] for o in rare), sum(outcomes[o] for o in rare) * len(said)))
    chi2 = sum((count - want) ** 2 / want for count, want in cells)
    free, z = len(cells) - 1, 4.753  # Wilson and Hilferty's approximation of the quantile
    return chi2 < free * (1 - 2 / (9 * free) + z * math.sqrt(2 / (9 * free))) ** 3


@pytest.mark.parametrize("name", PARAMS)
@pytest.mark.parametrize("how", ["seeds", "coins"])
def test_committed_tokens_follow_the_target(name, how, device):
    outcomes = expected(rows(name)[1])
    assert is_plausible(ours(name, device, how), outcomes)


def test_the_slow_walk_follows_the_target():
    assert is_plausible(mutated("plain", None), expected(rows("plain")[1]))


# Each of these is seen by its distribution; the others decide as often, or differ at one coin.
SEEN = [m for m in MUTANTS if m not in ("accepts at the bound", "siblings backwards")]


@pytest.mark.parametrize("mutant", SEEN)
def test_a_wrong_distribution_is_seen(mutant):
    assert not is_plausible(mutated("plain", mutant), expected(rows("plain")[1]))


# Probabilities that float32 holds exactly: four tokens of 1/4; tokens 4 and 5 cannot be.
EXACT_TOKENS, EXACT_PARENTS = [5, 4, 0, 0, 1], [-1, 0, 0, 0, 0]
# Coin of the root, final coin: node that is accepted or None, and the first token.
DECISIONS = {
    (0.0, 0.9): (2, 0),
    (0.2499, 0.9): (2, 0),
    (0.25, 0.9): (4, 1),
    (0.4999, 0.9): (4, 1),
    (0.5, 0.0): (None, 2),
    (0.75, 0.4999): (None, 2),
    (0.5, 0.5): (None, 3),
    (1 - 2**-24, 1 - 2**-24): (None, 3),
}


def decide_ours(device):
    bs, n = len(DECISIONS), len(EXACT_TOKENS)
    tree = build_tree(
        torch.tensor([EXACT_TOKENS] * bs).to(device),
        torch.tensor([EXACT_PARENTS] * bs).to(device),
        torch.zeros(bs, dtype=torch.int64).to(device),
        spec_steps=1,
        tree_mask_mode=TreeMaskMode.QLEN_ONLY,
    )
    logits = torch.zeros(bs, n, VOCAB)
    logits[..., 4:] = -math.inf
    coins = torch.tensor([[coin] * n for coin, _ in DECISIONS])
    got = verify_sampling(
        tree,
        logits.to(device),
        SamplingParams.of([1.0] * bs, device=device),
        coins=coins.to(device),
        final_coins=torch.tensor([final for _, final in DECISIONS]).to(device),
    )
    index, predict = got.accept_index.tolist(), got.predict.view(bs, n)[:, 0].tolist()
    return [
        (None if row[1] < 0 else row[1] - b * n, token)
        for b, (row, token) in enumerate(zip(index, predict, strict=True))
    ]


def decide_slowly(mutant):
    probs, found = [0.25] * 4 + [0.0] * 2, []
    for coin, final in DECISIONS:
        path, said, *_ = walk(
            EXACT_TOKENS,
            EXACT_PARENTS,
            lambda node: probs,
            1,
            [coin] * len(EXACT_TOKENS),
            lambda node, final=final: final,
            mutant=mutant,
        )
        found.append((path[1] if len(path) > 1 else None, said[0]))
    return found


def test_each_coin_decides_as_it_should(device):
    assert decide_ours(device) == list(DECISIONS.values())
    assert decide_slowly(None) == list(DECISIONS.values())


@pytest.mark.parametrize(
    "mutant", [m for m in MUTANTS if m not in ("bonus from the next row", "reuses the coin")]
)
def test_a_wrong_decision_is_seen(mutant):
    assert decide_slowly(mutant) != list(DECISIONS.values())


def test_a_coin_decides_for_its_own_request_and_node_only(device):
    """Changing the coins off the path changes nothing."""
    generator = seeded(13)
    bs, n = 50, len(TOKENS)
    tree = build_tree(
        torch.tensor([TOKENS] * bs).to(device),
        torch.tensor([PARENTS] * bs).to(device),
        torch.zeros(bs, dtype=torch.int64).to(device),
        spec_steps=STEPS,
        tree_mask_mode=TreeMaskMode.QLEN_ONLY,
    )
    logits = rows("plain")[0].expand(bs, -1, -1).to(device)
    params = SamplingParams.of([1.0] * bs, device=device)
    coins = torch.rand(bs, n, generator=generator)
    final = torch.rand(bs, generator=generator).to(device)

    def verify(coins):
        return verify_sampling(tree, logits, params, coins=coins.to(device), final_coins=final)

    first = verify(coins)
    on_path = torch.zeros(bs * n, dtype=torch.bool)
    on_path[first.accept_index[first.accept_index >= 0].cpu().long()] = True
    other = torch.where(on_path.view(bs, n), coins, torch.rand(bs, n, generator=generator))
    assert torch.equal(verify(other).predict, first.predict)
    assert set(itertools.chain(first.accept_lens.tolist())) == {1, 2, 3}
