import numpy as np
import pytest
import torch

from hwcore.speculative import (
    TreeMaskMode,
    VerifyResult,
    build_tree,
    cache_locs,
    commit,
    compute_spec_mrope_positions,
    organize_draft_results,
    verify_greedy,
)

from ._golden import load, names, parents_of_links

LINKS = ("retrieve_index", "retrieve_next_token", "retrieve_next_sibling")


def organized(meta, case):
    """The draft steps of a case, organised: what its arrays hold in a row, one tensor a step."""
    bs, topk, steps = meta["bs"], meta["topk"], meta["steps"]
    widths = [topk, *[topk * topk] * (steps - 1)]
    scores = [
        step.view(bs, step.shape[1] // topk, topk) for step in case["scores"].split(widths, 1)
    ]
    tokens = list(case["tokens"].split(widths, dim=1))
    parents = [case[f"parents{step}"] for step in range(int(case["n_parent_blocks"]))]
    # The last step's beam proposed nothing, so that it was not kept where there is more than one.
    while len(parents) < steps:
        parents.append(parents[0].new_zeros(bs, topk))
    return organize_draft_results(scores, tokens, parents, meta["N"])


def build(meta, case, mode):
    roots = case["draft_tokens"].new_zeros(meta["bs"])
    return tree_of(meta, case, *organized(meta, case).with_root(roots), mode)


@pytest.mark.parametrize("name", names("tree"))
def test_the_chosen_nodes_are_the_kernels(name, device):
    meta, case = load(name, device)
    results = organized(meta, case)
    for field in ("parent_list", "selected_index", "draft_tokens"):
        got, want = getattr(results, field), case[field]
        assert got.dtype == want.dtype, field
        assert torch.equal(got, want), field


def tree_of(meta, case, tokens, parents, mode=TreeMaskMode.FULL):
    seq_lens = case["seq_lens"]
    return build_tree(
        tokens,
        parents,
        seq_lens,
        spec_steps=meta["steps"],
        tree_mask_mode=mode,
        seq_lens_sum=int(seq_lens.sum()),
    )


@pytest.mark.parametrize("name", names("tree"))
def test_tree_is_the_kernels(name, device):
    meta, case = load(name, device)
    tree = build(meta, case, TreeMaskMode(meta["mode"]))
    for field in ("positions", "tree_mask", *LINKS):
        got, want = getattr(tree, field), case[field]
        assert got.dtype == want.dtype, field
        assert torch.equal(got, want), field


@pytest.mark.parametrize("name", names("tree"))
def test_other_masks_hold_the_same_bits(name, device):
    meta, case = load(name, device)
    bs, n = meta["bs"], meta["N"]
    blocks, flat = [], case["tree_mask"]
    for length in case["seq_lens"].tolist():
        rows, flat = flat[: n * (length + n)], flat[n * (length + n) :]
        blocks.append(rows.view(n, length + n)[:, length:])
    want = torch.stack(blocks) if blocks else torch.zeros(0, n, n, dtype=torch.bool)

    tree = build(meta, case, TreeMaskMode.QLEN_ONLY)
    assert torch.equal(tree.tree_mask.cpu(), want.cpu())

    packed = build(meta, case, TreeMaskMode.BITPACKED).tree_mask
    bits = np.packbits(want.cpu().numpy(), axis=-1, bitorder="little")
    assert packed.dtype == torch.uint8
    assert packed.shape[:2] == (bs, n)
    assert packed.shape[2] == {1: 1, 2: 2}.get(-(-n // 8), 4 * -(-n // 32))
    assert np.array_equal(packed.cpu().numpy()[..., : bits.shape[-1]], bits)
    assert not packed[..., bits.shape[-1] :].any()


@pytest.mark.parametrize("name", names("greedy"))
def test_verify_and_commit_are_the_kernels(name, device):
    meta, case = load(name, device)
    bs, n, seq_lens = meta["bs"], meta["N"], case["seq_lens"]
    parents = parents_of_links(case["retrieve_next_token"], case["retrieve_next_sibling"])
    tree = tree_of(meta, case, case["candidates"], parents)
    for field in LINKS:
        assert torch.equal(getattr(tree, field), case[field]), field

    result = verify_greedy(tree, case["target_predict"])
    for field in ("predict", "accept_index", "bonus_tokens"):
        got, want = getattr(result, field), case[field]
        assert got.dtype == want.dtype, field
        assert torch.equal(got, want), field
    assert torch.equal(result.num_correct_drafts, case["accept_num"])

    done = commit(tree, result, seq_lens, case["out_cache_loc"].view(bs, n))
    assert torch.equal(done.new_seq_lens, case["new_seq_lens"])
    used = result.accept_index >= 0
    moved = int(used.sum())
    assert torch.equal(done.kv_src[used], case["accepted_cache_loc_src"][:moved])
    compacted = case["predict_compacted"].view(bs, n).tolist()
    for row, tokens, length in zip(
        compacted, done.accept_tokens.tolist(), done.accept_lens.tolist(), strict=True
    ):
        assert tokens[:length] == row[:length]
        assert set(tokens[length:]) <= {-1}


@pytest.mark.parametrize("name", names("relay"))
def test_slots_are_the_kernels(name, device):
    meta, case = load(name, device)
    locate = case["req_to_token"], case["indices"], case["seq_lens"]
    for count, field in (
        (meta["N"], "extend_locs"),
        (meta["N"], "chain_locs"),
        (meta["topk"] * meta["steps"], "draft_locs"),
    ):
        assert torch.equal(cache_locs(*locate, count).view(-1), case[field]), field


@pytest.mark.parametrize("name", names("relay"))
def test_a_chain_is_the_tree_whose_nodes_have_one_child(name, device):
    meta, case = load(name, device)
    bs, n = meta["bs"], meta["N"]
    tokens = case["chain_tokens"].view(bs, n)
    parents = torch.arange(-1, n - 1, device=device).repeat(bs, 1)
    mode = TreeMaskMode.QLEN_ONLY
    tree = build_tree(tokens, parents, case["seq_lens"], tree_mask_mode=mode)
    for got, field in (
        (tree.tree_mask.view(-1), "chain_mask"),
        (tree.positions, "chain_positions"),
        (tree.retrieve_index, "chain_ri"),
        (tree.retrieve_next_token, "chain_nt"),
        (tree.retrieve_next_sibling, "chain_ns"),
    ):
        assert torch.equal(got, case[field]), field


@pytest.mark.parametrize("name", names("relay"))
def test_positions_on_three_axes_are_the_kernels(name, device):
    """All of text, whose delta is 0: of trees, and of a draft-extend."""
    meta, case = load(name, device)
    deltas = case["seq_lens"].new_zeros(meta["pool"])
    for layout, starts in (("chain", None), ("ext", case["ext_starts"])):
        got = compute_spec_mrope_positions(
            deltas, case["indices"], case[f"{layout}_positions"], starts=starts
        )
        assert torch.equal(got, case[f"{layout}_mrope"]), layout


@pytest.mark.parametrize("name", names("treesample"))
def test_commit_takes_sampled_paths_as_it_takes_greedy_ones(name, device):
    """Sampling decided them there: that it does here is tested with it."""
    meta, case = load(name, device)
    parents = parents_of_links(case["retrieve_next_token"], case["retrieve_next_sibling"])
    tree = tree_of(meta, case, case["candidates"], parents)
    result = VerifyResult(
        predict=case["predict"].to(torch.int32),
        accept_index=case["accept_index"].to(torch.int32),
        accept_lens=case["accept_num"].to(torch.int32) + 1,
        bonus_tokens=case["bonus_tokens"],
        status=torch.zeros_like(case["accept_num"], dtype=torch.int32),
    )
    done = commit(tree, result, case["seq_lens"])
    assert torch.equal(done.new_seq_lens, case["new_seq_lens"])
    last = (done.accept_lens.to(torch.int64) - 1).unsqueeze(1)
    assert torch.equal(done.accept_tokens.gather(1, last).view(-1), case["bonus_tokens"])
