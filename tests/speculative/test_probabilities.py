import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hwcore.graphs.tape import Tape
from hwcore.kernels import distribution as distribution_ops
from hwcore.kernels import thresholds
from hwcore.kernels.distribution import draw, probabilities
from hwcore.kernels.torch_ops import TORCH, TorchOps

from ._sampling import distribution, seeded
from ._sampling import draw as slow_draw

each = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
LARGE = 3000  # beyond which thresholds are looked for in a part of the vocabulary first


def ways(call):
    """By looking at values, where that is free; and in static shapes."""
    return call(), Tape().capture(call)


@st.composite
def rows(draw_):
    generator = seeded(draw_(st.integers(0, 2**32)))
    k, vocab = draw_(st.integers(1, 4)), draw_(st.sampled_from([1, 2, 7, 256, 257, 600, LARGE]))
    logits = torch.randn(k, vocab, generator=generator) * draw_(st.sampled_from([0.1, 1.0, 5.0]))
    if draw_(st.booleans()):
        logits = logits.round()  # ties, zeros of both signs
    heat = [draw_(st.sampled_from([0.0, 0.2, 1.0, 3.0])) for _ in range(k)]
    ks = [draw_(st.sampled_from([-1, 1, 2, 50, 300, vocab, vocab + 1])) for _ in range(k)]
    ps = [draw_(st.sampled_from([1.0, 0.999, 0.9, 0.3, 1e-30])) for _ in range(k)]
    floors = [draw_(st.sampled_from([0.0, 1e-4, 0.1, 1.0])) for _ in range(k)]
    return logits, heat, *(v if draw_(st.booleans()) else None for v in (ks, ps, floors))


def on(device, values, dtype=torch.float32):
    return None if values is None else torch.tensor(values, dtype=dtype).to(device)


@each
@given(batch=rows())
def test_probabilities_are_those_of_the_definitions(batch, device):
    logits, heat, ks, ps, floors = batch
    arguments = (
        logits.to(device),
        on(device, heat),
        on(device, ks, torch.int64),
        on(device, ps),
        on(device, floors),
    )
    seen, static = ways(lambda: probabilities(*arguments))
    assert torch.equal(seen[0], static[0])
    assert torch.equal(seen[1], static[1])
    assert seen[1].all()
    for i, row in enumerate(logits.tolist()):
        rest = (ks[i] if ks else -1, ps[i] if ps else 1.0, floors[i] if floors else 0.0)
        want = torch.tensor(distribution(row, heat[i], *rest))
        got = seen[0][i].cpu()
        # A tie of the masses may be decided either way in float32: then one logit more, or less.
        differs = (got > 1e-30) != (want > 1e-30)  # float32 ends there
        assert len(logits[i][differs].unique()) <= 1
        if not differs.any():
            assert torch.allclose(got, want, rtol=1e-4, atol=1e-7)
        assert got.sum().item() == pytest.approx(1, abs=1e-5)


def test_ties_at_the_threshold_are_kept(device):
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0, 2.0]]).to(device)
    heat = on(device, [1.0])
    for got, _ in ways(lambda: probabilities(logits, heat, on(device, [2], torch.int64))):
        assert (got > 0).tolist() == [[False, True, True, True, False, True]]
    for got, _ in ways(lambda: probabilities(logits, heat, None, on(device, [0.6]))):
        assert (got > 0).tolist() == [[False, True, True, True, False, True]]


def test_top_p_is_of_what_top_k_left(device):
    probs = torch.tensor([[0.4, 0.3, 0.2, 0.1]])
    k2, p = on(device, [2], torch.int64), on(device, [0.55])
    for got, _ in ways(lambda: probabilities(probs.log().to(device), on(device, [1.0]), k2, p)):
        # Of 0.7, 0.4 is 57 %: one token is enough.
        assert got.tolist() == [[1.0, 0.0, 0.0, 0.0]]


def test_ties_of_the_kth_logit_beyond_those_looked_at_have_their_mass(device):
    # Half of the mass on one token, the rest equal: k = 2 keeps all, and then p = 0.6 does.
    logits = torch.full((1, LARGE), 0.5 / (LARGE - 1)).log()
    logits[0, 7] = math.log(0.5)
    k2, p = on(device, [2], torch.int64), on(device, [0.6])
    for got, _ in ways(lambda: probabilities(logits.to(device), on(device, [1.0]), k2, p)):
        assert (got > 0).all()


def test_a_row_that_is_not_cut_is_scaled_by_nothing(device):
    logits = torch.randn(64, 700, generator=seeded(4)).to(device)
    ks = on(device, [-1, 5] * 32, torch.int64)
    divisors = distribution_ops.divisors_of(on(device, [1.0] * 64))
    plain, none = distribution_ops.weights(logits, divisors, (None,) * 3, TORCH)
    cut, total = distribution_ops.weights(logits, divisors, (ks, None, None), TORCH)
    assert none is None
    assert torch.equal(cut[::2], plain[::2])
    assert total[::2].unique().tolist() == [1.0]
    assert total[1::2].max() < 0.5


@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0])
def test_flat_rows_of_a_large_vocabulary(spread, device):
    logits = (torch.randn(2, 20_000, generator=seeded(1)) * spread).to(device)
    for ks, ps in ((None, [0.9, 0.5]), ([7000, 19_999], [0.7, 1.0])):
        arguments = (logits, on(device, [1.0, 1.0]), on(device, ks, torch.int64), on(device, ps))
        seen, static = ways(lambda arguments=arguments: probabilities(*arguments))
        assert torch.equal(seen[0], static[0])
        kept = (seen[0] > 0).sum(1).tolist()
        if spread == 0:
            assert kept == [20_000, 20_000]
        elif ks is not None:
            assert kept[0] < 7000
            assert kept[1] == 19_999


def test_logits_one_ulp_apart_are_told_apart(device):
    low = torch.tensor(1.0)
    high = torch.nextafter(low, torch.tensor(2.0))
    logits = torch.stack([low, high, low, high, low]).unsqueeze(0).to(device)
    k2 = on(device, [2], torch.int64)
    for got, _ in ways(lambda: probabilities(logits, on(device, [1.0]), k2)):
        assert (got > 0).tolist() == [[False, True, False, True, False]]


@pytest.mark.parametrize("temperature", [1e-45, 1e-30, 1e-10, 1e30])
def test_extreme_temperatures_stay_finite(temperature, device):
    logits = torch.tensor([[3.0, 5.0, -2.0, 5.0, 400.0], [0.0, 1e9, -1e9, 1.0, 2.0]]).to(device)
    got, valid = probabilities(logits, on(device, [temperature] * 2))
    assert valid.all()
    assert got.isfinite().all()
    assert got.sum(1).tolist() == pytest.approx([1, 1])
    if temperature < 1:
        assert (got[0, 4].item(), got[1, 1].item()) == (1.0, 1.0)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("heat", [0.0, 1.0])
def test_rows_without_a_distribution_are_named(poison, heat, device):
    logits = torch.randn(3, 700, generator=seeded(2))
    clean, _ = probabilities(logits.to(device), on(device, [heat] * 3))
    logits[1, slice(None) if poison == -math.inf else 650] = poison
    for got, valid in ways(lambda: probabilities(logits.to(device), on(device, [heat] * 3))):
        assert valid.tolist() == [True, False, True]
        assert torch.equal(got[[0, 2]], clean[[0, 2]])


def test_a_token_that_cannot_be_is_no_poison(device):
    logits = torch.randn(2, 700, generator=seeded(3))
    logits[:, 5:] = -math.inf
    got, valid = probabilities(logits.to(device), on(device, [1.0, 0.0]))
    assert valid.all()
    assert not got[:, 5:].any()


@each
@given(
    seed=st.integers(0, 2**32),
    vocab=st.sampled_from([1, 3, 255, 256, 257, 900]),
    full=st.sampled_from([0.02, 0.5, 1.0]),
    coin=st.sampled_from([0.0, 0.3, 1 - 2**-24, None]),
)
def test_a_draw_is_the_inverse_of_the_distribution(seed, vocab, full, coin, device):
    generator = seeded(seed)
    weights = torch.rand(3, vocab, generator=generator)
    weights *= torch.rand(3, vocab, generator=generator) < full
    weights[:, vocab // 2] += 0.1
    coins = torch.rand(3, generator=generator) if coin is None else torch.full((3,), coin)
    seen, static = ways(lambda: draw(weights.to(device), coins.to(device)))
    assert torch.equal(seen, static)
    for got, row, each_coin in zip(seen.tolist(), weights.tolist(), coins.tolist(), strict=True):
        want, margin = slow_draw(row, each_coin)
        assert row[got] > 0
        assert got == want or margin < 1e-4


def test_a_coin_at_a_boundary_draws_what_begins_there(device):
    weights = torch.tensor([[0.25, 0.0, 0.25, 0.5]] * 4).to(device)
    coins = on(device, [0.0, 0.25, 0.5, 1 - 2**-24])
    for got in ways(lambda: draw(weights, coins)):
        assert got.tolist() == [0, 2, 3, 3]


def test_a_draw_from_nothing_is_in_the_vocabulary(device):
    weights = torch.tensor([[0.0] * 300, [math.nan] * 300]).to(device)
    for got in ways(lambda: draw(weights, torch.full((2,), 0.5).to(device))):
        assert got.tolist() == [299, 299]


def test_a_dip_of_the_running_sum_draws_no_token_of_weight_0(device, monkeypatch):
    """Parallel sums can fall by a rounding: here by much more."""
    weights = torch.zeros(1, 8)
    weights[0, [1, 6]] = 0.5
    ops = TorchOps()
    exact = ops.cumsum

    def dipping(values, dim):
        sums = exact(values, dim)
        if values.shape[1] == 8:
            sums[:, 2:5] -= 0.1
            sums[:, 5] += 0.2
        return sums

    monkeypatch.setattr(ops, "cumsum", dipping)
    monkeypatch.setattr("hwcore.kernels.distribution.reads_are_free", lambda _: False)
    for coin in (0.35, 0.45, 0.55, 0.65):
        token = draw(weights, torch.tensor([coin]), ops).item()
        assert token in (1, 6)


@pytest.mark.parametrize("target", [-math.inf, -3.0, -1e-45, 0.0, 1e-45, 2.5, 3e38])
def test_the_bisection_takes_the_highest_threshold_that_suffices(target):
    wanted = torch.tensor([[target]])
    assert torch.equal(thresholds._highest(lambda value: value <= wanted, wanted), wanted)
