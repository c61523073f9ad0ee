import dataclasses
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from hwcore.graphs.tape import Tape
from hwcore.speculative import (
    SamplingParams,
    TreeMaskMode,
    VerifyStatus,
    build_tree,
    verify_greedy,
    verify_sampling,
)

from ._golden import load, names, parents_of_links
from ._reference import cases
from ._sampling import distribution, draw, seeded, walk

each = settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
FIELDS = ("predict", "accept_index", "accept_lens", "bonus_tokens", "status")
VOCAB = 41


def tree_of(tokens, parents, steps, device, nodes=None):
    shape = len(tokens), nodes or (tokens.shape[1] if hasattr(tokens, "shape") else len(tokens[0]))
    return build_tree(
        torch.as_tensor(tokens, dtype=torch.int64).view(shape).to(device),
        torch.as_tensor(parents, dtype=torch.int64).view(shape).to(device),
        torch.arange(shape[0]).to(device),
        spec_steps=steps,
        tree_mask_mode=TreeMaskMode.QLEN_ONLY,
    )


def same(got, want, rows=slice(None)):
    bs = want.accept_lens.shape[0]
    for field in FIELDS:
        a, b = (getattr(result, field).cpu() for result in (got, want))
        assert a.dtype == b.dtype, field
        assert not bs or torch.equal(a.view(bs, -1)[rows], b.view(bs, -1)[rows]), field


def captured(call):
    """The result of a call as a graph makes it: in static shapes, without looking at values."""
    return Tape().capture(call)


@st.composite
def batches(draw, **options):
    """A batch of trees with logits over few likely tokens, parameters and coins."""
    case = draw(cases(**options))
    generator = seeded(draw(st.integers(0, 2**32)))
    bs, n = case.batch, case.nodes
    logits = torch.randn(bs, n, VOCAB, generator=generator) * draw(st.sampled_from([0.5, 2.0, 6.0]))
    logits[..., : 1 + max((t for row in case.tokens for t in row), default=0)] += 3
    heat = [draw(st.sampled_from([0.0, 0.3, 1.0, 1.7])) for _ in range(bs)]
    ks = [draw(st.sampled_from([-1, 1, 2, 5, VOCAB, 99])) for _ in range(bs)]
    ps = [draw(st.sampled_from([1.0, 0.9, 0.5, 0.01])) for _ in range(bs)]
    floors = [draw(st.sampled_from([0.0, 0.05, 0.5, 1.0])) for _ in range(bs)]
    filters = [v if draw(st.booleans()) else None for v in (ks, ps, floors)]
    coins = torch.randint(0, 2**24, (2, bs, n), generator=generator) / 2**24
    return case, logits, (heat, *filters), coins


def verified(batch, device, logits=None, **options):
    case, drawn, params, coins = batch
    logits = drawn if logits is None else logits
    tree = tree_of(case.tokens, case.parents, case.steps, device, case.nodes)
    options.setdefault("coins", coins[0].to(device))
    options.setdefault("final_coins", coins[1][:, 0].to(device))
    wanted = SamplingParams.of(*params, device=device)
    return lambda: verify_sampling(tree, logits.to(device), wanted, **options)


def of_request(params, b):
    heat, ks, ps, floors = params
    return (heat[b], ks[b] if ks else -1, ps[b] if ps else 1.0, floors[b] if floors else 0.0)


class Operators(TorchDispatchMode):
    """Notes the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name().partition(".")[0])
        return func(*args, **(kwargs or {}))


@each
@given(batch=batches(), rule=st.sampled_from([(1.0, 1.0), (0.7, 1.0), (1.0, 0.5), (0.0, 0.0)]))
def test_the_walk_is_that_of_the_definitions(batch, rule, device):
    case, logits, params, coins = batch
    got = verified(batch, device, threshold_single=rule[0], threshold_acc=rule[1])()
    for b in range(case.batch):
        rows = [distribution(row, *of_request(params, b)) for row in logits[b].tolist()]
        path, said, status, margin = walk(
            case.tokens[b],
            case.parents[b],
            rows.__getitem__,
            case.steps,
            coins[0, b].tolist(),
            lambda node, b=b: float(coins[1, b, 0]),
            *rule,
        )
        if margin < 1e-5:
            continue  # float32 may decide either way
        pad = [-1] * (case.steps + 1 - len(path))
        assert got.accept_index[b].tolist() == [b * case.nodes + node for node in path] + pad
        predict = [0] * case.nodes
        for node, token in zip(path, said, strict=True):
            predict[node] = token
        assert got.predict.view(case.batch, -1)[b].tolist() == predict
        assert got.accept_lens[b].item() == len(path)
        assert got.bonus_tokens[b].item() == said[-1]
        assert got.status[b].item() == status


@each
@given(batch=batches(), poison=st.sampled_from([None, math.nan]))
def test_static_shapes_give_the_same_bits(batch, poison, device):
    logits = batch[1]
    if poison is not None and len(logits):
        logits[0, 0, 3] = poison
    call = verified(batch, device)
    same(captured(call), call())
    same(captured(verified(batch, "cpu")), call())


@pytest.mark.parametrize("vocab", [300, 1000, 5003])
def test_static_shapes_give_the_same_bits_for_large_vocabularies(vocab, device):
    generator = seeded(vocab)
    bs, n = 9, 6
    parents = torch.tensor([[-1, 0, 0, 1, 1, 3]]).repeat(bs, 1)
    tokens = torch.randint(0, vocab, (bs, n), generator=generator)
    tree = tree_of(tokens, parents, 3, device)
    logits = torch.randn(bs, n, vocab, generator=generator)
    for b in range(bs):
        logits[b, parents[b, 1:], tokens[b, 1:]] += 7
    logits = logits.round(decimals=1).to(device)  # many ties
    heat = [0.0, 1.0, 0.5, 1.0, 1.0, 2.0, 1.0, 0.9, 1.0]
    ks = [-1, 1, 50, 100, 299, 4000, -1, -1, -1]
    ps = [1.0, 1.0, 0.9, 1.0, 0.5, 0.99, 0.9, 0.9999, 1.0]
    params = SamplingParams.of(heat, ks, ps, [0.0] * 7 + [0.01, 0.5], device=device)
    for round_ in range(8):
        coins = torch.rand(bs, n + 1, generator=seeded(round_)).to(device)

        def call(coins=coins):
            return verify_sampling(
                tree, logits, params, coins=coins[:, :n], final_coins=coins[:, n].contiguous()
            )

        same(captured(call), call())


@pytest.mark.parametrize("name", names("treesample"))
def test_sampling_is_the_kernels(name, device):
    meta, case = load(name, device)
    parents = parents_of_links(case["retrieve_next_token"], case["retrieve_next_sibling"])
    tree = tree_of(case["candidates"], parents, meta["steps"], device)
    got = verify_sampling(
        tree,
        case["target_probs"].log(),
        SamplingParams.of([1.0] * meta["bs"], device=device),
        coins=case["coins"],
        final_coins=case["coins_final"],
        threshold_single=meta["threshold_single"],
        threshold_acc=meta["threshold_acc"],
    )
    kernels = oracle(meta, case, parents, repeats=True)
    assert (case["accept_index"].tolist(), case["bonus_tokens"].tolist()) == kernels
    ours = got.accept_index.tolist(), got.bonus_tokens.tolist()
    if meta["tag"] == "dup_siblings":
        # Where a repeated sibling's probability decided, the kernel is wrong.
        assert ours == oracle(meta, case, parents, repeats=False)
        return
    assert ours == kernels
    assert got.predict.tolist() == case["predict"].tolist()
    assert got.num_correct_drafts.tolist() == case["accept_num"].tolist()
    assert not got.status.any()  # no walk comes to a row that is none


def oracle(meta, case, parents, repeats):
    """Paths and last tokens by the slow walk, with repeated siblings counted as the kernel does."""
    paths, bonus = [], []
    for b in range(meta["bs"]):
        coins, final = case["coins"][b].tolist(), case["coins_final"][b].item()
        path, said, *_ = walk(
            case["candidates"][b].tolist(),
            parents[b].tolist(),
            case["target_probs"][b].tolist().__getitem__,
            meta["steps"],
            coins,
            lambda node, final=final: final,
            meta["threshold_single"],
            meta["threshold_acc"],
            mutant="counts repeats twice" if repeats else None,
        )
        pad = [-1] * (meta["steps"] + 1 - len(path))
        paths.append([b * meta["N"] + node for node in path] + pad)
        bonus.append(said[-1])
    return paths, bonus


@each
@given(batch=batches(min_batch=2), poison=st.sampled_from([math.nan, math.inf, -math.inf]))
def test_invalid_logits_stay_in_their_request(batch, poison, device):
    case, logits, *_ = batch
    clean = verified(batch, device)()
    dirty = logits.clone()
    dirty[1, 0, slice(None) if poison == -math.inf else 7] = poison
    for way in (lambda call: call(), captured):
        got = way(verified(batch, device, dirty))
        same(got, clean, [b for b in range(case.batch) if b != 1])
        assert got.status.tolist()[1] == VerifyStatus.INVALID_LOGITS
        assert got.accept_lens.tolist()[1] == 1
        assert got.bonus_tokens.tolist()[1] == VOCAB - 1


@each
@given(batch=batches(min_batch=2), poison=st.sampled_from([math.nan, math.inf, -math.inf]))
def test_greedy_isolates_invalid_logits_too(batch, poison, device):
    case, logits, *_ = batch
    tree = tree_of(case.tokens, case.parents, case.steps, device, case.nodes)
    clean = verify_greedy(tree, logits.to(device))
    assert not clean.status.any()
    logits[0, 0, slice(None) if poison == -math.inf else 7] = poison
    for way in (lambda call: call(), captured):
        got = way(lambda: verify_greedy(tree, logits.to(device)))
        same(got, clean, slice(1, None))
        assert got.status.tolist()[0] == VerifyStatus.INVALID_LOGITS
        assert (got.accept_lens[0].item(), got.bonus_tokens[0].item()) == (1, VOCAB - 1)


def test_a_row_off_the_path_may_be_anything(device):
    tree = tree_of([[1, 2, 3]], [[-1, 0, 0]], 1, device)
    logits = torch.zeros(1, 3, 5)
    logits[0, 0, 3] = 100.0
    logits[0, 1] = math.nan
    coins = {"coins": torch.full((1, 3), 0.5), "final_coins": torch.zeros(1)}
    coins = {name: value.to(device) for name, value in coins.items()}
    params = SamplingParams.of([1.0], device=device)
    for got in (
        verify_sampling(tree, logits.to(device), params, **coins),
        verify_greedy(tree, logits.to(device)),
    ):
        assert got.accept_index.tolist() == [[0, 2]]
        assert got.status.tolist() == [0]


@each
@given(batch=batches(min_batch=1))
def test_temperature_0_is_greedy_among_sampled_requests(batch, device):
    case, logits, params, _ = batch
    logits = logits.round()  # ties
    tree = tree_of(case.tokens, case.parents, case.steps, device, case.nodes)
    greedy = verify_greedy(tree, logits.to(device))
    rows = [b for b, heat in enumerate(params[0]) if heat == 0]
    for way in (lambda call: call(), captured):
        same(way(verified(batch, device, logits)), greedy, rows)


@each
@given(batch=batches(min_batch=1), data=st.data())
def test_a_request_is_the_same_in_any_batch(batch, data, device):
    case, logits, params, coins = batch
    whole = verified(batch, device)()
    b = data.draw(st.integers(0, case.batch - 1))
    tree = tree_of([case.tokens[b]], [case.parents[b]], case.steps, device)
    alone = SamplingParams.of(*([v] for v in of_request(params, b)), device=device)
    coins = {"coins": coins[0, b : b + 1], "final_coins": coins[1, b : b + 1, 0]}
    coins = {name: value.to(device) for name, value in coins.items()}
    got = verify_sampling(tree, logits[b : b + 1].to(device), alone, **coins)
    assert got.bonus_tokens[0] == whole.bonus_tokens[b]
    assert got.accept_lens[0] == whole.accept_lens[b]
    assert torch.equal(got.predict, whole.predict.view(case.batch, -1)[b])


@each
@given(batch=batches())
def test_nothing_is_changed(batch, device):
    case, logits, params, coins = batch
    wanted = SamplingParams.of(*params, device=device)
    tree = tree_of(case.tokens, case.parents, case.steps, device, case.nodes)
    given_ = [logits, coins[0], coins[1, :, 0].contiguous()]
    given_ = [tensor.to(device) for tensor in given_]
    held = [tree.draft_tokens, tree.parents, wanted.temperatures, *given_]
    before = [tensor.clone() for tensor in held]
    verify_sampling(tree, given_[0], wanted, coins=given_[1], final_coins=given_[2])
    verify_greedy(tree, given_[0])
    assert all(torch.equal(a, b) or a.isnan().any() for a, b in zip(held, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_computed_with_in_float32(dtype, device):
    generator = seeded(5)
    tree = tree_of(
        torch.randint(0, 600, (4, 5), generator=generator), [[-1, 0, 0, 1, 2]] * 4, 4, device
    )
    logits = (torch.randn(4, 5, 600, generator=generator) * 3).to(dtype).to(device)
    params = SamplingParams.of([1.0, 0.5, 0.0, 1.2], [-1, 5, -1, 9], device=device)
    coins = torch.rand(4, 6, generator=generator).to(device)
    coins = {"coins": coins[:, :5], "final_coins": coins[:, 5].contiguous()}
    same(
        verify_sampling(tree, logits, params, **coins),
        verify_sampling(tree, logits.float(), params, **coins),
    )


def test_strided_logits_and_logits_that_require_grad(device):
    generator = seeded(6)
    tree = tree_of([[1, 2, 3]] * 3, [[-1, 0, 0]] * 3, 2, device)
    wide = torch.randn(3, 3, 2 * 500, generator=generator).to(device)
    params = SamplingParams.of([1.0, 0.0, 1.0], device=device)
    coins = {"coins": torch.rand(3, 3, generator=generator), "final_coins": torch.rand(3)}
    coins = {name: value.to(device) for name, value in coins.items()}
    for view in (wide[..., :500], wide[..., ::2], wide.transpose(0, 1)[..., :500].transpose(0, 1)):
        want = verify_sampling(tree, view.contiguous(), params, **coins)
        same(verify_sampling(tree, view, params, **coins), want)
        same(verify_sampling(tree, view.clone().requires_grad_(), params, **coins), want)
        same(verify_greedy(tree, view), verify_greedy(tree, view.contiguous()))
    swapped = wide[:, :, :500].transpose(0, 1)  # requests and nodes interleaved in memory
    want = verify_sampling(tree, swapped.contiguous(), params, **coins)
    same(verify_sampling(tree, swapped, params, **coins), want)


def test_rows_that_no_view_joins_are_read_without_an_index_that_a_device_may_lack(device):
    tree = tree_of([[1, 2, 3]] * 3, [[-1, 0, 0]] * 3, 2, device)
    swapped = torch.randn(3, 3, 40, generator=seeded(7)).to(device).transpose(0, 1)
    params, seeds = SamplingParams.of([1.0] * 3, device=device), torch.arange(3, device=device)

    def call():
        return verify_sampling(tree, swapped, params, seeds=seeds)

    with Operators() as seen:
        result = captured(call)
    assert "aten::index_select" in seen.names
    assert "aten::index" not in seen.names
    same(result, verify_sampling(tree, swapped.contiguous(), params, seeds=seeds))


@pytest.mark.parametrize("bs", [1, 3])
def test_a_batch_cut_into_parts_is_the_same(bs, device, monkeypatch):
    from hwcore.kernels import sampler, verify

    generator = seeded(7)
    tokens = torch.randint(0, 50, (11, 5), generator=generator)
    tree = tree_of(tokens, [[-1, 0, 0, 1, 2]] * 11, 4, device)
    logits = torch.randn(11, 5, 700, generator=generator)
    logits[..., :50] += 4
    heat = [0.0, 1.0, 0.5] * 3 + [1.0, 0.0]
    params = SamplingParams.of(heat, [9, -1] * 5 + [3], device=device)
    coins = torch.rand(11, 6, generator=generator).to(device)
    coins = {"coins": coins[:, :5], "final_coins": coins[:, 5].contiguous()}
    whole = verify_sampling(tree, logits.to(device), params, **coins)
    greedy = verify_greedy(tree, logits.to(device))
    for module in (sampler, verify):
        monkeypatch.setattr(module, "PART", bs * 700)
    monkeypatch.setattr(sampler, "_KEPT", 2 * bs * 700)
    same(verify_sampling(tree, logits.to(device), params, **coins), whole)
    same(verify_greedy(tree, logits.to(device)), greedy)


def test_seeds_make_the_coins_of_positions(device):
    from hwcore.speculative.coins import CoinPurpose, draw_coins

    generator = seeded(8)
    parents = [[-1, 0, 0, 1, 2]] * 6
    tree = tree_of(torch.randint(0, 9, (6, 5), generator=generator), parents, 4, device)
    logits = torch.randn(6, 5, 9, generator=generator).to(device)
    params = SamplingParams.of([1.0] * 6, device=device)
    seeds = torch.arange(6).to(device)
    got = verify_sampling(tree, logits, params, seeds=seeds)
    positions = tree.positions.view(6, 5) + 1
    coins = draw_coins(seeds, positions, CoinPurpose.ACCEPT)
    last = draw_coins(seeds, positions, CoinPurpose.RESIDUAL)
    ends = got.accept_index.gather(1, (got.accept_lens - 1).long().unsqueeze(1))
    final = last.reshape(-1)[ends.squeeze(1).long()]
    same(verify_sampling(tree, logits, params, coins=coins, final_coins=final), got)
    # A node deep in a tree uses what the root of a later step would.
    alone = build_tree(
        torch.ones(1, 1, dtype=torch.int64, device=device),
        torch.full((1, 1), -1, dtype=torch.int64, device=device),
        tree.positions[7:8],
        tree_mask_mode=TreeMaskMode.QLEN_ONLY,
    )
    one = SamplingParams.of([1.0], device=device)
    plain = verify_sampling(alone, logits[1:2, 2:3], one, seeds=seeds[1:2])
    probs = distribution(logits[1, 2].tolist(), 1.0)
    assert plain.bonus_tokens.item() == draw(probs, float(last[1, 2]))[0]


def test_repeated_siblings_have_one_probability(device):
    # Half of the mass is on the token: three offers of it are one.
    tree = tree_of([[2, 1, 1, 1]], [[-1, 0, 0, 0]], 1, device)
    logits = torch.tensor([0.5, 0.5, 1e-30]).log().repeat(1, 4, 1)
    params = SamplingParams.of([1.0], device=device)

    def taken(coin):
        coins = torch.full((1, 4), coin).to(device)
        final = torch.zeros(1).to(device)
        got = verify_sampling(tree, logits.to(device), params, coins=coins, final_coins=final)
        return got.accept_index.tolist()[0], got.bonus_tokens.item()

    assert taken(0.499)[0] == [0, 1]
    assert taken(0.501) == ([0, -1], 0)
    assert taken(0.999) == ([0, -1], 0)


def test_coins_at_the_edges_choose_only_what_can_be(device):
    tree = tree_of([[0, 1, 2]], [[-1, 0, 0]], 1, device)
    params = SamplingParams.of([1.0], device=device)
    last_before_1 = 1 - 2**-24
    for probs in (
        [0.0, 0.0, 0.5, 0.5, 0.0],
        [0.25, 0.0, 0.0, 0.75, 0.0],
        [0.0, 0.3, 0.7, 0.0, 0.0],
    ):
        logits = torch.tensor(probs).log().repeat(1, 3, 1).to(device)
        for coin in (0.0, last_before_1):
            coins = torch.full((1, 3), coin).to(device)
            for final in (0.0, last_before_1):
                end = torch.tensor([final]).to(device)
                got = verify_sampling(tree, logits, params, coins=coins, final_coins=end)
                said = got.predict[: got.accept_lens.item()].tolist()
                assert probs[got.bonus_tokens.item()] > 0
                assert probs[said[0]] > 0 or got.accept_lens.item() == 2


def test_where_rounding_leaves_nothing_the_last_child_is_the_token(device):
    bs = 200
    tree = tree_of([[0, 2, 0, 1]] * bs, [[-1, 0, 0, 0]] * bs, 1, device)
    logits = torch.randn(bs, 4, 4, generator=seeded(10))
    logits[..., 3] = -math.inf
    params = SamplingParams.of([1.0] * bs, device=device)
    coins = {"coins": torch.full((bs, 4), 1 - 2**-24), "final_coins": torch.full((bs,), 0.5)}
    coins = {name: value.to(device) for name, value in coins.items()}
    for got in (
        verify_sampling(tree, logits.to(device), params, **coins),
        captured(lambda: verify_sampling(tree, logits.to(device), params, **coins)),
    ):
        ended = got.accept_lens == 1  # the children's probabilities add up to less than 1
        assert ended.any()
        assert got.bonus_tokens[ended].unique().tolist() == [1]
        assert not got.status.any()


def test_no_more_than_spec_steps_drafts_are_accepted(device):
    """Of a tree that is deeper; then nothing is taken from the last distribution either."""
    tree = tree_of([[1, 1, 1, 1]] * 40, [[-1, 0, 1, 2]] * 40, 3, device)
    shallow = dataclasses.replace(tree, spec_steps=1)
    logits = torch.tensor([-math.inf, 0.0, 0.0]).expand(40, 4, 3).contiguous().to(device)
    params = SamplingParams.of([1.0] * 40, device=device)
    coins = {"coins": torch.full((40, 4), 0.1), "final_coins": torch.full((40,), 0.9)}
    coins = {name: value.to(device) for name, value in coins.items()}
    for got, bonus in (
        (verify_sampling(shallow, logits, params, **coins), 2),
        (captured(lambda: verify_sampling(shallow, logits, params, **coins)), 2),
        (verify_greedy(shallow, logits), 1),
    ):
        assert got.accept_lens.tolist() == [2] * 40
        assert got.bonus_tokens.tolist() == [bonus] * 40


def test_a_single_node_is_plain_sampling(device):
    generator = seeded(9)
    tree = tree_of([[0]] * 5, [[-1]] * 5, 0, device)
    logits = torch.randn(5, 1, 700, generator=generator)
    final = torch.rand(5, generator=generator)
    params = SamplingParams.of([1.0] * 5, device=device)
    coins = {"coins": torch.rand(5, 1).to(device), "final_coins": final.to(device)}
    got = verify_sampling(tree, logits.to(device), params, **coins)
    assert got.accept_lens.tolist() == [1] * 5
    want = [
        draw(distribution(row, 1.0), coin)
        for row, coin in zip(logits[:, 0].tolist(), final.tolist(), strict=True)
    ]
    assert all(
        t == w or close < 1e-5
        for t, (w, close) in zip(got.bonus_tokens.tolist(), want, strict=True)
    )


def test_an_empty_batch_is_an_empty_result(device):
    tree = tree_of([], [], 2, device, nodes=3)
    params = SamplingParams.of([], device=device)
    empty = torch.zeros(0, 3, 5, device=device)
    coins = {
        "coins": torch.zeros(0, 3, device=device),
        "final_coins": torch.zeros(0, device=device),
    }
    for got in (verify_sampling(tree, empty, params, **coins), verify_greedy(tree, empty)):
        assert [list(getattr(got, field).shape) for field in FIELDS] == [[0], [0, 3], [0], [0], [0]]


def test_one_more_row_than_int32_counts():
    """Rows times vocabulary beyond 2^31: the logits are a view that repeats a few."""
    vocab, n = 2**20, 2**9
    bs = 5
    tree = tree_of(torch.zeros(bs, n, dtype=torch.int64), [[-1] + [0] * (n - 1)] * bs, 1, "cpu")
    row = torch.full((vocab,), -9.0)
    row[vocab - 3] = 9.0
    logits = row.expand(bs, n, vocab)
    params = SamplingParams.of([1.0] * bs)
    assert bs * n * vocab > 2**31
    coins = {"coins": torch.full((bs, n), 0.5), "final_coins": torch.full((bs,), 0.5)}
    got = verify_sampling(tree, logits, params, **coins)
    assert got.bonus_tokens.tolist() == [vocab - 3] * bs
    assert verify_greedy(tree, logits).bonus_tokens.tolist() == [vocab - 3] * bs
