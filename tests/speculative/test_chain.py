import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hwcore
from hwcore.errors import ArgumentTypeError, ArgumentValueError, CaptureError
from hwcore.graphs.tape import Tape
from hwcore.kernels.distribution import probabilities
from hwcore.speculative import (
    CoinPurpose,
    HostLogitProcessor,
    SamplingParams,
    TreeMaskMode,
    VerifyStatus,
    block_positions,
    build_tree,
    commit,
    draw_coins,
    sample_drafts,
    verify_chain,
)

from . import _chain_reference as slow
from ._golden import load, names

BOTH = pytest.mark.parametrize("block", [False, True], ids=["by token", "by block"])


def params(bs, device, temperature=1.0):
    return SamplingParams.of([temperature] * bs, device=device)


@BOTH
@pytest.mark.parametrize("name", names("chain"))
def test_chain_is_the_kernels(name, block, device):
    meta, case = load(name, device)
    result = verify_chain(
        case["candidates"],
        case["target_probs"].log(),
        case["draft_probs"],
        params(meta["bs"], device),
        coins=case["coins"],
        final_coins=case["coins_final"],
        block_verification=block,
    )
    prefix = "block_" if block else ""
    assert torch.equal(result.predict, case[f"{prefix}predict"].flatten())
    assert torch.equal(result.accept_index, case[f"{prefix}accept_index"])
    assert torch.equal(result.num_correct_drafts, case[f"{prefix}accept_num"])
    ends = result.accept_index.gather(1, result.accept_lens.long().unsqueeze(1) - 1).long()
    assert torch.equal(result.bonus_tokens, result.predict[ends.squeeze(1)].long())
    assert result.status.dtype == torch.int32
    assert result.status.tolist() == [VerifyStatus.OK] * meta["bs"]


KINDS = ["plain", "near", "equal", "one-hot", "no overlap", "nan", "no mass", "above one", "greedy"]


def problem(seed, bs, size, vocabulary, kinds):
    """Random candidates, probabilities and coins; each request of one of ``kinds``."""
    g = torch.Generator().manual_seed(seed)

    def distributions(rows):
        return torch.softmax(torch.randn(bs, rows, vocabulary, generator=g) * 2, -1)

    p, q = distributions(size), distributions(size - 1)
    for row, kind in enumerate(kinds):
        if kind == "near":
            q[row] = 0.9 * p[row, :-1] + 0.1 * q[row]
        elif kind == "equal":
            q[row] = p[row, :-1]
        elif kind == "one-hot":
            q[row] = torch.nn.functional.one_hot(q[row].argmax(-1), vocabulary).float()
        elif kind == "no overlap":
            half = torch.arange(vocabulary) < (vocabulary + 1) // 2
            p[row] = torch.where(half, p[row], 0.0) / p[row, :, half].sum(-1, keepdim=True)
    drafts = torch.multinomial(q.reshape(-1, vocabulary), 1, generator=g).view(bs, size - 1)
    for row, kind in enumerate(kinds):
        if kind in ("nan", "no mass", "above one"):
            wrong = {"nan": float("nan"), "no mass": 0.0, "above one": 1.5}[kind]
            q[row] = torch.where(torch.rand(q[row].shape, generator=g) < 0.4, wrong, q[row])
    root = torch.randint(0, vocabulary, (bs, 1), generator=g)
    coins = torch.randint(0, 2**24, (bs, size), generator=g) / 2**24
    final = torch.randint(0, 2**24, (bs,), generator=g) / 2**24
    temperatures = torch.tensor([0.0 if kind == "greedy" else 1.0 for kind in kinds])
    return torch.cat([root, drafts], 1), p, q, temperatures, coins, final


def run(inputs, device, block, rows=slice(None), **changed):
    candidates, p, q, temperatures, coins, final = (part[rows].to(device) for part in inputs)
    given = {"logits": p.log(), "draft_probs": q, "coins": coins, "final_coins": final} | changed
    return verify_chain(
        candidates,
        given.pop("logits"),
        given.pop("draft_probs"),
        SamplingParams.of(temperatures.tolist(), device=device),
        block_verification=block,
        **given,
    )


def tokens_of(result, size):
    lens = result.accept_lens.tolist()
    rows = result.predict.view(-1, size).tolist()
    return [row[:length] for row, length in zip(rows, lens, strict=True)]


@settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    seed=st.integers(0, 2**32),
    kinds=st.lists(st.sampled_from(KINDS), max_size=6),
    size=st.integers(1, 6),
    vocabulary=st.sampled_from([1, 2, 3, 11]),
    block=st.booleans(),
)
def test_chain_against_the_definitions(seed, kinds, size, vocabulary, block, device):
    inputs = problem(seed, len(kinds), size, vocabulary, kinds)
    result = run(inputs, device, block)
    candidates, p, q, _, coins, final = (part.tolist() for part in inputs)
    for row, (kind, tokens) in enumerate(zip(kinds, tokens_of(result, size), strict=True)):
        if kind == "greedy":
            best = [line.index(max(line)) for line in p[row]]
            accepted = 0
            while accepted < size - 1 and candidates[row][accepted + 1] == best[accepted]:
                accepted += 1
            want = [*candidates[row][1 : accepted + 1], best[accepted]]
        else:
            accepted, token = slow.verify(
                candidates[row], p[row], q[row], coins[row], final[row], block
            )
            want = [*candidates[row][1 : accepted + 1], token]
        assert tokens == want, (row, kind)


@pytest.mark.parametrize("block", [False, True])
def test_what_the_target_does_not_know_is_never_accepted(block, device, monkeypatch):
    monkeypatch.setenv("HWCORE_DEBUG", "0")
    kinds = ["sampled", "greedy"] * 3
    inputs = problem(3, len(kinds), 4, 11, kinds)
    inputs[0][:, 1] = 99
    inputs[1][:, 0] = torch.nn.functional.one_hot(torch.tensor(10), 11)  # the last one, for certain
    if device.type == "cpu":
        with pytest.raises(ArgumentValueError, match=r"candidates\[0, 1\] got 99"):
            run(inputs, device, block)
    else:
        assert tokens_of(run(inputs, device, block), 4) == [[10]] * len(kinds)


@BOTH
def test_a_request_does_not_depend_on_its_batch(block, device):
    inputs = problem(5, 18, 5, 300, KINDS * 2)
    whole = tokens_of(run(inputs, device, block), 5)
    for row in range(18):
        assert tokens_of(run(inputs, device, block, [row]), 5) == [whole[row]]
    order = torch.randperm(18, generator=torch.Generator().manual_seed(1)).tolist()
    assert tokens_of(run(inputs, device, block, order), 5) == [whole[row] for row in order]


@BOTH
@pytest.mark.parametrize("kind", ["nan", "inf", "-inf"])
def test_logits_that_are_none_end_their_request_and_touch_no_other(block, kind, device):
    inputs = problem(6, 9, 5, 50, ["near"] * 8 + ["greedy"])
    clean = run(inputs, device, block)
    longest = int(clean.accept_lens.argmax())
    needed = int(clean.accept_lens[longest]) - 1
    assert needed >= 1
    logits = inputs[1].log()
    if kind == "-inf":
        logits[longest, needed] = -torch.inf
    else:
        logits[longest, needed, 7] = float(kind)
    result = run(inputs, device, block, logits=logits.to(device))
    assert result.status.tolist() == [
        VerifyStatus.INVALID_LOGITS if row == longest else VerifyStatus.OK for row in range(9)
    ]
    before, after = tokens_of(clean, 5), tokens_of(result, 5)
    assert after[longest][:-1] == before[longest][:needed]
    assert after[longest][-1] == int(result.bonus_tokens[longest]) == 49
    others = torch.arange(9) != longest
    for field in ("accept_index", "accept_lens", "bonus_tokens", "status"):
        got, want = getattr(result, field).cpu(), getattr(clean, field).cpu()
        assert torch.equal(got[others], want[others]), field
    assert torch.equal(
        result.predict.view(9, 5).cpu()[others], clean.predict.view(9, 5).cpu()[others]
    )


def test_rows_past_a_rejection_may_hold_anything(device):
    inputs = problem(7, 6, 5, 50, ["no overlap", "plain"] * 3)
    clean = run(inputs, device, False)
    logits, draft_probs = inputs[1].log(), inputs[2].clone()
    for row, length in enumerate(clean.accept_lens.tolist()):
        logits[row, length:] = float("nan")
        draft_probs[row, length:] = float("nan")
    result = run(
        inputs, device, False, logits=logits.to(device), draft_probs=draft_probs.to(device)
    )
    assert tokens_of(result, 5) == tokens_of(clean, 5)
    assert result.status.tolist() == [VerifyStatus.OK] * 6


def test_a_block_ends_before_logits_that_are_none(device):
    """As if it had been drafted no longer, which is lossless as well: only the last row counts."""
    inputs = problem(8, 40, 5, 4, ["plain"] * 40)
    logits = inputs[1].log()
    logits[:, 3] = float("nan")
    result = run(inputs, device, True, logits=logits.to(device))
    candidates, p, q, _, coins, _ = (part.tolist() for part in inputs)
    ends = [
        slow.block_walk(c[1:4], a, b, k)[0]
        for c, a, b, k in zip(candidates, p, q, coins, strict=True)
    ]
    assert {0, 3} <= set(ends)
    assert result.num_correct_drafts.tolist() == ends
    invalid = [VerifyStatus.INVALID_LOGITS if end == 3 else VerifyStatus.OK for end in ends]
    assert result.status.tolist() == invalid


def test_zero_coins_accept_no_token_without_mass(device):
    """A coin of 0 is below any probability but 0."""
    p = torch.tensor([[[0.0, 1.0], [0.5, 0.5]]], device=device)
    result = verify_chain(
        torch.tensor([[1, 0]], device=device),
        p.log(),
        torch.tensor([[[0.5, 0.5]]], device=device),
        params(1, device),
        coins=torch.zeros(1, 2, device=device),
        final_coins=torch.zeros(1, device=device),
    )
    assert result.accept_lens.tolist() == [1]
    assert result.bonus_tokens.tolist() == [1]


@BOTH
@pytest.mark.parametrize("coin", [0.0, 0.5, 1 - 2**-24])
def test_the_target_emits_nothing_that_has_no_mass(block, coin, device):
    """Also at the highest coin, where rounding leads past the last token that has any."""
    g = torch.Generator().manual_seed(3)
    p = torch.softmax(torch.randn(64, 2, 500, generator=g), -1)
    p[:, :, 300:] = 0
    p /= p.sum(-1, keepdim=True)
    q = torch.softmax(torch.randn(64, 1, 500, generator=g), -1)
    result = verify_chain(
        torch.full((64, 2), 400).to(device),
        p.log().to(device),
        q.to(device),
        params(64, device),
        coins=torch.zeros(64, 2, device=device),
        final_coins=torch.full((64,), coin, device=device),
        block_verification=block,
    )
    assert result.accept_lens.tolist() == [1] * 64
    row, emitted = torch.arange(64), result.bonus_tokens.cpu()
    assert (p[row, 0, emitted] * (1 + 1e-6) > q[row, 0, emitted]).all()


def test_without_anything_left_over_the_token_is_drawn_from_the_target(device):
    """The draft came from elsewhere: its token has no mass in p, which q is equal to."""
    p = torch.tensor([0.25, 0.5, 0.25, 0.0])
    result = verify_chain(
        torch.tensor([[0, 3]] * 3, device=device),
        torch.stack([p, p]).log().expand(3, 2, 4).to(device),
        p.expand(3, 1, 4).to(device),
        params(3, device),
        coins=torch.zeros(3, 2, device=device),
        final_coins=torch.tensor([0.1, 0.5, 0.9], device=device),
    )
    assert result.accept_lens.tolist() == [1, 1, 1]
    assert result.bonus_tokens.tolist() == [0, 1, 2]


def test_a_block_may_always_end_where_target_and_draft_agree(device):
    """There is nothing left over there: the chance to end is 0 / 0, and the limit of it is 1."""
    p = torch.tensor([0.5, 0.5, 0.0, 0.0], device=device)
    result = verify_chain(
        torch.tensor([[0, 1, 3]], device=device),
        p.log().expand(1, 3, 4),
        p.expand(1, 2, 4),
        params(1, device),
        coins=torch.full((1, 3), 0.99, device=device),
        final_coins=torch.full((1,), 0.99, device=device),
        block_verification=True,
    )
    assert result.accept_lens.tolist() == [2]
    assert result.bonus_tokens.tolist() == [1]


@BOTH
def test_greedy_requests_ignore_what_was_drafted_and_with_which_coin(block, device):
    inputs = problem(9, 12, 4, 3, ["greedy"] * 12)
    clean = run(inputs, device, block)
    assert len(set(clean.accept_lens.tolist())) > 1
    for draft_probs in (torch.full_like(inputs[2], float("nan")), torch.zeros_like(inputs[2])):
        changed = {
            "draft_probs": draft_probs.to(device),
            "coins": 1 - inputs[4].to(device) / 2 - 0.1,
        }
        assert tokens_of(run(inputs, device, block, **changed), 4) == tokens_of(clean, 4)


@BOTH
def test_without_drafts_one_token_is_sampled_with_the_coin_of_its_position(block, device):
    logits = torch.randn(40, 1, 9, generator=torch.Generator().manual_seed(2))
    seeds, lens = torch.arange(40), torch.arange(40) * 3
    result = verify_chain(
        torch.zeros(40, 1, dtype=torch.int64, device=device),
        logits.to(device),
        torch.zeros(40, 0, 9, device=device),
        params(40, device),
        seq_lens=lens.to(device),
        seeds=seeds.to(device),
        block_verification=block,
    )
    coins = draw_coins(seeds, lens.unsqueeze(1) + 1, CoinPurpose.RESIDUAL).squeeze(1)
    weights = torch.softmax(logits.squeeze(1), -1).tolist()
    want = [slow.draw(row, coin) for row, coin in zip(weights, coins.tolist(), strict=True)]
    assert result.bonus_tokens.tolist() == want
    assert result.accept_lens.tolist() == [1] * 40


@BOTH
def test_seeded_coins_are_those_of_the_positions(block, device):
    inputs = problem(10, 30, 4, 5, ["near", "plain"] * 15)
    seeds, lens = torch.arange(30) * 7, torch.arange(30) + 100
    after = lens.unsqueeze(1) + torch.arange(1, 5)
    held = block_positions(lens, 4) if block else after
    coins = draw_coins(seeds, held, CoinPurpose.ACCEPT)
    ends = draw_coins(seeds, after, CoinPurpose.RESIDUAL)
    candidates, p, q, temperatures, *_ = inputs
    seeded = verify_chain(
        candidates.to(device),
        p.log().to(device),
        q.to(device),
        params(30, device),
        seq_lens=lens.to(device),
        seeds=seeds.to(device),
        block_verification=block,
    )
    final = ends.gather(1, seeded.num_correct_drafts.long().unsqueeze(1).cpu()).squeeze(1)
    explicit = run((candidates, p, q, temperatures, coins, final), device, block)
    assert tokens_of(seeded, 4) == tokens_of(explicit, 4)


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_logits_of_other_types_are_taken_as_they_are(dtype, block, device):
    inputs = problem(11, 8, 4, 40, ["plain", "near"] * 4)
    logits = inputs[1].log().to(dtype)
    got = run(inputs, device, block, logits=logits.to(device))
    want = run(inputs, device, block, logits=logits.float().to(device))
    assert tokens_of(got, 4) == tokens_of(want, 4)


@BOTH
def test_the_result_is_that_of_a_chain_tree_and_commits(block, device):
    inputs = problem(12, 8, 5, 6, ["near"] * 8)
    result = run(inputs, device, block)
    lens = torch.arange(8, device=device) * 5
    tree = build_tree(
        inputs[0].to(device),
        torch.arange(-1, 4, device=device).expand(8, 5).contiguous(),
        lens,
        tree_mask_mode=TreeMaskMode.QLEN_ONLY,
    )
    done = commit(tree, result, lens, torch.arange(40, device=device).view(8, 5))
    for row, tokens in enumerate(tokens_of(result, 5)):
        assert done.accept_tokens[row, : len(tokens)].tolist() == tokens
        assert int(done.new_seq_lens[row]) == 5 * row + len(tokens)
    assert torch.equal(done.bonus_tokens, result.bonus_tokens)


@BOTH
def test_an_empty_batch_gives_empty_tensors(block, device):
    result = run(problem(0, 0, 4, 5, []), device, block)
    assert result.predict.shape == (0,)
    assert result.accept_index.shape == (0, 4)
    assert result.bonus_tokens.shape == result.status.shape == (0,)


@BOTH
def test_arguments_need_not_be_contiguous_and_are_left_as_they_are(block, device):
    inputs = problem(13, 6, 4, 20, ["plain", "nan"] * 3)
    wide = [part.to(device).repeat_interleave(2, -1)[..., ::2] for part in inputs[:3]]
    before = [part.clone() for part in wide]
    result = verify_chain(
        wide[0],
        wide[1].log().repeat_interleave(2, 1)[:, ::2],
        wide[2],
        params(6, device),
        coins=inputs[4].to(device).t().contiguous().t(),
        final_coins=inputs[5].to(device),
        block_verification=block,
    )
    assert tokens_of(result, 4) == tokens_of(run(inputs, device, block), 4)
    for part, held in zip(wide, before, strict=True):
        assert torch.equal(part.nan_to_num(9), held.nan_to_num(9))


@BOTH
def test_filters_shape_the_targets_distribution(block, device):
    """Temperature, top-k, top-p and min-p, one of each and all of them: as if p were theirs."""
    inputs = problem(16, 12, 4, 60, ["near", "plain", "nan"] * 4)
    logits = inputs[1].log()
    asked = SamplingParams.of(
        [0.7, 1.0, 1.3] * 4,
        top_ks=[-1, 5, 20, -1] * 3,
        top_ps=[1.0, 1.0, 0.8, 0.9] * 3,
        min_ps=[0.0, 0.1, 0.0] * 4,
        device=device,
    )
    each = (asked.temperatures, asked.top_ks, asked.top_ps, asked.min_ps)
    shaped = [probabilities(logits[:, node].to(device), *each)[0] for node in range(4)]
    given = {"coins": inputs[4].to(device), "final_coins": inputs[5].to(device)}
    arguments = inputs[0].to(device), inputs[2].to(device)

    def verified(logits, sampling):
        return tokens_of(
            verify_chain(
                arguments[0], logits, arguments[1], sampling, block_verification=block, **given
            ),
            4,
        )

    want = verified(torch.stack(shaped, 1).log(), params(12, device))
    assert verified(logits.to(device), asked) == want
    assert want != verified(logits.to(device), params(12, device))


@BOTH
def test_a_processor_decides_on_the_logits_by_the_path(block, device):
    inputs = problem(17, 10, 4, 12, ["near", "greedy"] * 5)
    logits = inputs[1].log()
    # Nothing twice: each token of the path is forbidden from there on.
    want = logits.clone()
    for node in range(4):
        path = inputs[0][:, : node + 1]
        want[:, node] = want[:, node].scatter(1, path, -torch.inf)
    seen = []

    def no_repeats(rows):
        assert rows.logits.dtype == torch.float32
        seen.append((rows.requests.tolist(), rows.path_tokens.tolist()))
        token = torch.arange(12, device=rows.logits.device)
        hit = (rows.path_tokens.unsqueeze(2) == token).any(1)
        return torch.where(hit, -torch.inf, rows.logits)

    got = run(inputs, device, block, logits=logits.to(device), processor=no_repeats)
    clean = run(inputs, device, block, logits=want.to(device))
    assert tokens_of(got, 4) == tokens_of(clean, 4)
    assert torch.equal(logits, inputs[1].log())
    for requests, paths in seen:
        for request, path in zip(requests, paths, strict=True):
            real = [token for token in path if token >= 0]
            assert path == real + [-1] * (len(path) - len(real))
            assert real == inputs[0][request, : len(real)].tolist()


def test_a_processor_on_the_host_is_counted_as_a_wait(device):
    inputs = problem(18, 4, 3, 12, ["near"] * 4)

    def ban_zero(logits, requests, paths):
        logits[:, 0] = -torch.inf
        return logits

    host = HostLogitProcessor(ban_zero)
    got = run(inputs, device, False, logits=inputs[1].log().to(device), processor=host)
    without = inputs[1].log()
    without[:, :, 0] = -torch.inf
    assert tokens_of(got, 3) == tokens_of(run(inputs, device, False, logits=without.to(device)), 3)
    assert (host.host_syncs > 0) == (torch.device(device).type != "cpu")
    static = [part.to(device) for part in (inputs[0], inputs[1].log(), inputs[2], *inputs[4:])]
    sampling = params(4, device)
    with pytest.raises(CaptureError, match="ban_zero"):
        Tape().capture(
            lambda: verify_chain(
                *static[:3], sampling, coins=static[3], final_coins=static[4], processor=host
            )
        )


# --- What it costs --------------------------------------------------------------------------------


@BOTH
def test_what_is_captured_follows_its_inputs_and_agrees_to_the_bit(block, device):
    """On the CPU the recorded work is that of a device, with all requests at every step."""

    def drawn(seed):
        inputs = problem(seed, 7, 5, 30, KINDS[:7])
        return [part.to(device) for part in (inputs[0], inputs[1].log(), *inputs[2:])]

    def step(candidates, logits, q, temperatures, coins, final):
        result = verify_chain(
            candidates,
            logits,
            q,
            SamplingParams(temperatures),
            coins=coins,
            final_coins=final,
            block_verification=block,
        )
        return result.predict, result.accept_index, result.bonus_tokens, result.status

    static = drawn(0)
    tape = Tape()
    outputs = tape.capture(lambda: step(*static))
    for seed in range(1, 6):
        fresh = drawn(seed)
        for slot, value in zip(static, fresh, strict=True):
            slot.copy_(value)
        tape.replay()
        for got, want in zip(outputs, step(*fresh), strict=True):
            assert torch.equal(got, want)


@BOTH
@pytest.mark.usefixtures("late", "watched")
def test_the_host_waits_for_nothing_and_nothing_races(hw, block, device, monkeypatch):
    if hw.info.name != "sim":
        pytest.skip("only a simulated device tells what the host waited for")
    from hwcore_sim.device import host_waits

    monkeypatch.setenv("HWCORE_DEBUG", "0")
    inputs = [part.to(device) for part in problem(14, 6, 4, 30, ["near", "nan"] * 3)]
    sampling = params(6, device)
    seeds, lens = torch.arange(6, device=device), torch.arange(6, device=device)
    logits = inputs[1].log()
    hw.synchronize()
    with host_waits() as waits:
        drafts, probs = sample_drafts(logits[:, 0], sampling, seeds=seeds, positions=lens)
        verify_chain(
            torch.stack([drafts, drafts], 1),
            logits[:, :2],
            probs.unsqueeze(1),
            sampling,
            seq_lens=lens,
            seeds=seeds,
            block_verification=block,
        )
        run_given = {"coins": inputs[4], "final_coins": inputs[5], "block_verification": block}
        verify_chain(inputs[0], logits, inputs[2], sampling, **run_given)
    assert waits == []
    hw.synchronize()


def test_on_the_cpu_a_request_costs_the_rows_up_to_its_rejection(hw, monkeypatch):
    if hw.info.name != "cpu":
        pytest.skip("a device does not know on the host who still walks")
    from hwcore.speculative import chain_rules

    rows, real = [], chain_rules.probabilities

    def counted(logits, *args, **named):
        rows.append(len(logits))
        return real(logits, *args, **named)

    monkeypatch.setattr(chain_rules, "probabilities", counted)
    result = run(problem(15, 40, 6, 30, ["plain"] * 40), "cpu", False)
    assert sum(rows) == int(result.accept_lens.sum())
    assert sum(rows) < 100


# --- Drafting -------------------------------------------------------------------------------------


def test_a_sampled_draft_comes_with_its_distribution(device):
    logits = torch.randn(50, 7, generator=torch.Generator().manual_seed(4)) * 2
    temperatures = [0.0, 0.5, 1.0, 2.0, 1.0] * 10
    seeds, positions = torch.arange(50), torch.arange(50) + 9
    tokens, probs = sample_drafts(
        logits.to(device),
        SamplingParams.of(temperatures, device=device),
        seeds=seeds.to(device),
        positions=positions.to(device),
    )
    coins = draw_coins(seeds, positions.unsqueeze(1), CoinPurpose.DRAFT).squeeze(1)
    again, _ = sample_drafts(
        logits.to(device), SamplingParams.of(temperatures, device=device), coins=coins.to(device)
    )
    assert torch.equal(again, tokens)
    probs = probs.cpu()
    assert probs.dtype == torch.float32
    for row, temperature in enumerate(temperatures):
        if temperature == 0:
            assert probs[row].tolist() == [float(k == logits[row].argmax()) for k in range(7)]
        else:
            want = torch.softmax(logits[row] / temperature, -1)
            torch.testing.assert_close(probs[row], want)
        assert int(tokens[row]) == slow.draw(probs[row].tolist(), float(coins[row]))


def test_a_draft_from_logits_that_are_none_is_rejected(device):
    logits = torch.zeros(3, 4)
    logits[1, 2] = float("nan")
    tokens, probs = sample_drafts(
        logits.to(device), params(3, device), coins=torch.full((3,), 0.9, device=device)
    )
    assert tokens.tolist() == [3, 0, 3]
    assert probs[1].tolist() == [0.0] * 4
    result = verify_chain(
        torch.stack([tokens, tokens], 1),
        torch.zeros(3, 2, 4, device=device),
        probs.unsqueeze(1),
        params(3, device),
        coins=torch.zeros(3, 2, device=device),
        final_coins=torch.full((3,), 0.6, device=device),
    )
    assert result.accept_lens.tolist() == [2, 1, 2]
    assert result.bonus_tokens.tolist() == [2, 2, 2]


def test_positions_of_a_block_are_no_others(device):
    roots = torch.tensor([0, 1, 5, 2**40], device=device)
    found = block_positions(roots, 2**16)
    assert bool((found < 0).all())
    assert len(found.flatten().unique()) == found.numel()
    assert torch.equal(
        block_positions(roots.clamp(max=9).int(), 3), block_positions(roots.clamp(max=9), 3)
    )


# --- Bad input ------------------------------------------------------------------------------------


def arguments(**changed):
    given = {
        "candidates": torch.tensor([[0, 1, 2], [3, 4, 0]]),
        "logits": torch.zeros(2, 3, 5),
        "draft_probs": torch.full((2, 2, 5), 0.2),
        "params": SamplingParams.of([1.0, 0.0]),
        "coins": torch.zeros(2, 3),
        "final_coins": torch.zeros(2),
    }
    return {name: value for name, value in (given | changed).items() if value is not None}


SEEDED = {
    "coins": None,
    "final_coins": None,
    "seeds": torch.tensor([1, 2]),
    "seq_lens": torch.tensor([3, 4]),
}


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"candidates": [[0]]}, ArgumentTypeError, r"candidates got .*expected a tensor \[bs, S\]"),
        (
            {"candidates": torch.zeros(2, 0, dtype=torch.int64)},
            ArgumentValueError,
            r"candidates\.shape got \[2, 0\] .*S at least 1\. Give each request its root",
        ),
        (
            {"candidates": torch.tensor([[0, 1, 2], [3, 5, 0]])},
            ArgumentValueError,
            r"candidates\[1, 1\] got 5 .*a token in \[0, 5\)",
        ),
        (
            {"candidates": torch.tensor([[0, 1, 2], [3, -1, 0]])},
            ArgumentValueError,
            r"candidates\[1, 1\] got -1",
        ),
        ({"logits": torch.zeros(2, 2, 5)}, ArgumentValueError, r"logits\.shape got \[2, 2, 5\]"),
        ({"logits": torch.zeros(2, 3, 0)}, ArgumentValueError, r"logits\.shape got .*V >= 1"),
        ({"logits": torch.zeros(2, 3, 5).int()}, ArgumentTypeError, r"logits\.dtype got"),
        ({"logits": torch.zeros(2, 3, 5, device="meta")}, ArgumentTypeError, r"logits\.device"),
        (
            {"draft_probs": torch.zeros(2, 3, 5)},
            ArgumentValueError,
            r"draft_probs\.shape got \[2, 3, 5\] .*expected \[bs=2, S - 1=2, V=5\]",
        ),
        ({"draft_probs": torch.zeros(2, 2, 5).half()}, ArgumentTypeError, r"draft_probs\.dtype"),
        ({"params": 1.0}, ArgumentTypeError, r"params got 1\.0 .*Pass what SamplingParams\.of"),
        (
            {"params": SamplingParams.of([1.0])},
            ArgumentValueError,
            r"params\.temperatures\.shape got \[1\]",
        ),
        (
            {"params": SamplingParams(torch.tensor([1.0, -1.0]))},
            ArgumentValueError,
            r"params\.temperatures\[1\] got -1\.0",
        ),
        ({"processor": 3}, ArgumentTypeError, r"processor got 3 .*expected a callable"),
        (
            {"processor": lambda rows: rows.logits[:, :2]},
            ArgumentValueError,
            r"what the processor returned\.shape got \[2, 2\]",
        ),
        ({"coins": None}, ArgumentValueError, r"the source of coins got \['final_coins'\]"),
        (
            {"final_coins": None},
            ArgumentValueError,
            r"the source of coins got \['coins'\] .*Pass s",
        ),
        (
            {"seeds": torch.tensor([1, 2])},
            ArgumentValueError,
            r"the source of coins got \['seeds', ",
        ),
        ({"coins": torch.zeros(2, 2)}, ArgumentValueError, r"coins\.shape got \[2, 2\]"),
        ({"coins": torch.zeros(2, 3).double()}, ArgumentTypeError, r"coins\.dtype got"),
        ({"coins": torch.ones(2, 3)}, ArgumentValueError, r"coins\[0, 0\] got 1\.0 .*\[0, 1\)"),
        (
            {"final_coins": torch.tensor([0.0, float("nan")])},
            ArgumentValueError,
            r"final_coins\[1\] got nan",
        ),
        ({"final_coins": torch.zeros(2, 1)}, ArgumentTypeError, r"final_coins\.dim\(\) got 2"),
        (SEEDED | {"seeds": torch.zeros(2)}, ArgumentTypeError, r"seeds\.dtype got"),
        (SEEDED | {"seq_lens": None}, ArgumentTypeError, r"seq_lens got None .*expected a tensor"),
        (
            SEEDED | {"seq_lens": torch.tensor([3, -4])},
            ArgumentValueError,
            r"seq_lens\[1\] got -4 .*at least 0",
        ),
    ],
)
def test_verify_chain_names_what_is_wrong(changed, error, message):
    with pytest.raises(error, match="^verify_chain: " + message):
        verify_chain(**arguments(**changed))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"logits": torch.zeros(5)}, ArgumentTypeError, r"logits\.dim\(\) got 1"),
        ({"params": None}, ArgumentTypeError, r"params got None"),
        ({"params": SamplingParams.of([1.0])}, ArgumentValueError, r"params\.temperatures\.shape"),
        ({"coins": None}, ArgumentValueError, r"the source of coins got \[\]"),
        ({"coins": torch.ones(2)}, ArgumentValueError, r"coins\[0\] got 1\.0"),
        ({"coins": None, "seeds": torch.tensor([1, 2])}, ArgumentTypeError, r"positions got None"),
    ],
)
def test_sample_drafts_names_what_is_wrong(changed, error, message):
    given = {
        "logits": torch.zeros(2, 5),
        "params": SamplingParams.of([1.0, 0.0]),
        "coins": torch.zeros(2),
    } | changed
    with pytest.raises(error, match="^sample_drafts: " + message):
        sample_drafts(given.pop("logits"), given.pop("params"), **given)


def test_without_debugging_nothing_is_read_from_a_device(unread):
    """A meta tensor has no values to read."""
    result = verify_chain(
        torch.zeros(2, 3, dtype=torch.int64, device=unread),
        torch.zeros(2, 3, 5, device=unread),
        torch.zeros(2, 2, 5, device=unread),
        SamplingParams(torch.ones(2, device=unread)),
        seeds=torch.zeros(2, dtype=torch.int64, device=unread),
        seq_lens=torch.zeros(2, dtype=torch.int64, device=unread),
        backend=hwcore.load_backend("cpu"),
    )
    assert result.predict.shape == (6,)
