import pytest
import torch

from hwcore.graphs import BATCH, TOKENS_PER_REQUEST, GraphRunner, Slot
from hwcore.graphs.tape import Tape
from hwcore.speculative import (
    SamplingParams,
    TreeMaskMode,
    build_tree,
    commit,
    verify_greedy,
    verify_sampling,
)


@pytest.mark.parametrize("mode", [TreeMaskMode.QLEN_ONLY, TreeMaskMode.BITPACKED])
@pytest.mark.parametrize("from_logits", [True, False])
def test_a_captured_step_follows_its_inputs(mode, from_logits, device):
    generator = torch.Generator().manual_seed(1)
    bs, n, vocab = 3, 9, 3

    def drawn():
        earlier = [torch.randint(0, node, (bs,), generator=generator) for node in range(1, n)]
        parents = torch.stack([torch.full((bs,), -1), *earlier], dim=1)
        tokens = torch.randint(0, vocab, (bs, n), generator=generator)
        target = torch.rand(bs, n, vocab, generator=generator)
        lens = torch.randint(0, 50, (bs,), generator=generator)
        locs = torch.randperm(bs * n, generator=generator).view(bs, n)
        return [t.to(device) for t in (tokens, parents, target, lens, locs)]

    def step(tokens, parents, target, lens, locs):
        tree = build_tree(tokens, parents, lens, spec_steps=n - 1, tree_mask_mode=mode)
        result = verify_greedy(tree, target if from_logits else target.argmax(-1))
        done = commit(tree, result, lens, locs)
        made = (tree.tree_mask, tree.positions, tree.retrieve_next_sibling)
        return (*made, done.accept_tokens, done.new_seq_lens, done.kv_src, done.kv_dst)

    static = drawn()
    tape = Tape()
    outputs = tape.capture(lambda: step(*static))
    for _ in range(5):
        fresh = drawn()
        for slot, value in zip(static, fresh, strict=True):
            slot.copy_(value)
        tape.replay()
        for got, want in zip(outputs, step(*fresh), strict=True):
            assert torch.equal(got, want)


def sampled(device, seed, vocab=600):
    """What verify_sampling takes, of one shape."""
    generator = torch.Generator().manual_seed(seed)
    bs, n = 5, 9
    earlier = [torch.randint(0, node, (bs,), generator=generator) for node in range(1, n)]
    parents = torch.stack([torch.full((bs,), -1), *earlier], dim=1)
    logits = torch.randn(bs, n, vocab, generator=generator) * 2
    logits[..., :9] += 5
    columns = (
        torch.tensor([0.0, 1.0, 0.7, 1.3, 1.0]),
        torch.tensor([-1, 5, -1, 100, 3]),
        torch.tensor([1.0, 0.9, 0.5, 1.0, 1.0]),
        torch.tensor([0.0, 0.0, 0.1, 0.0, 0.0]),
    )
    tokens = torch.randint(0, 9, (bs, n), generator=generator)
    lens = torch.randint(0, 50, (bs,), generator=generator)
    seeds = torch.randint(0, 2**40, (bs,), generator=generator)
    return [t.to(device) for t in (tokens, parents, lens, logits, seeds, *columns)]


def sampled_step(tokens, parents, lens, logits, seeds, *columns):
    tree = build_tree(tokens, parents, lens, spec_steps=8, tree_mask_mode=TreeMaskMode.QLEN_ONLY)
    result = verify_sampling(tree, logits, SamplingParams(*columns), seeds=seeds)
    greedy = verify_greedy(tree, logits)
    done = commit(tree, result, lens)
    return (done.accept_tokens, result.accept_index, result.status, greedy.predict)


def test_captured_sampling_follows_its_inputs(device, watched):
    static = sampled(device, 0)
    tape = Tape()
    outputs = tape.capture(lambda: sampled_step(*static))
    for seed in range(1, 5):
        fresh = sampled(device, seed)
        for slot, value in zip(static, fresh, strict=True):
            slot.copy_(value)
        tape.replay()
        for got, want in zip(outputs, sampled_step(*fresh), strict=True):
            assert torch.equal(got, want)


def test_debugging_reads_nothing_into_a_graph_of_the_devices_own(hw, device, monkeypatch):
    monkeypatch.setenv("HWCORE_DEBUG", "1")
    tokens, _, _, logits, seeds, *_ = sampled(device, 1)

    def step(tokens, logits):
        parents = torch.arange(-1, tokens.shape[1] - 1, device=device).expand_as(tokens)
        lens = torch.ones_like(seeds)
        tree = build_tree(tokens, parents, lens, tree_mask_mode=TreeMaskMode.QLEN_ONLY)
        return commit(tree, verify_greedy(tree, logits), lens).accept_tokens

    (bs, n), shape = tokens.shape, (BATCH, TOKENS_PER_REQUEST)
    slots = {
        "tokens": Slot(torch.int64, shape),
        "logits": Slot(torch.float32, (*shape, logits.shape[2])),
    }
    runner = GraphRunner(step, slots, [(bs, n)], backend=hw)
    runner.capture()
    got = runner.run({"tokens": tokens, "logits": logits}, (1,) * bs, n)
    assert torch.equal(got, step(tokens, logits))
    runner.close()


@pytest.mark.parametrize("cut", [True, False])
def test_verification_waits_for_nothing(hw, device, cut, monkeypatch):
    if hw.info.name != "sim":
        pytest.skip("only the simulated device counts what the host waits for")
    from hwcore_sim import device as sim

    monkeypatch.setenv("HWCORE_DEBUG", "0")
    inputs = sampled(device, 7)
    inputs = inputs if cut else inputs[:6]
    with sim.host_waits() as waits:
        sampled_step(*inputs)
    assert waits == []
