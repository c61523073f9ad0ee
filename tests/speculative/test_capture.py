import pytest
import torch

from hwcore.graphs.tape import Tape
from hwcore.speculative import TreeMaskMode, build_tree, commit, verify_greedy


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
