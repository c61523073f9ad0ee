import dataclasses

import pytest
import torch

from hwcore import kernels
from hwcore.graphs.tape import Tape
from hwcore.speculative import DraftTree, TreeMaskMode, build_tree, commit, verify_greedy


def test_a_tree_by_hand(device):
    #      0 ── 1 ── 3
    #       └── 2        4 is padding
    tokens = torch.tensor([[5, 6, 7, 8, 0]], device=device)
    parents = torch.tensor([[-1, 0, 0, 1, -1]], device=device)
    tree = build_tree(tokens, parents, torch.tensor([2], device=device), seq_lens_sum=2)
    assert tree.spec_steps == 4
    assert tree.tree_mask_mode is TreeMaskMode.FULL
    assert tree.positions.tolist() == [2, 3, 3, 4, 2]
    assert tree.tree_mask.view(5, 7).int().tolist() == [
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 0, 1, 0, 0],
        [1, 1, 1, 1, 0, 1, 0],
        [1, 1, 0, 0, 0, 0, 1],
    ]
    assert tree.retrieve_next_token.tolist() == [[1, 3, -1, -1, -1]]
    assert tree.retrieve_next_sibling.tolist() == [[-1, 2, -1, -1, -1]]
    with pytest.raises(dataclasses.FrozenInstanceError):
        tree.spec_steps = 1


@pytest.mark.parametrize("mode", TreeMaskMode)
def test_empty_batch(mode, device):
    ints = {"dtype": torch.int64, "device": device}
    empty, lens = torch.empty(0, 6, **ints), torch.empty(0, **ints)
    tree = build_tree(empty, empty, lens, spec_steps=3, tree_mask_mode=mode, seq_lens_sum=0)
    shape, dtype = {
        TreeMaskMode.FULL: ((0,), torch.bool),
        TreeMaskMode.QLEN_ONLY: ((0, 6, 6), torch.bool),
        TreeMaskMode.BITPACKED: ((0, 6, 1), torch.uint8),
    }[mode]
    assert (tuple(tree.tree_mask.shape), tree.tree_mask.dtype) == (shape, dtype)
    assert (tuple(tree.positions.shape), tree.positions.dtype) == ((0,), torch.int64)
    for links in (tree.retrieve_index, tree.retrieve_next_token, tree.retrieve_next_sibling):
        assert (tuple(links.shape), links.dtype) == ((0, 6), torch.int64)

    for target in (empty, torch.empty(0, 6, 11, device=device)):
        result = verify_greedy(tree, target)
        assert (tuple(result.predict.shape), result.predict.dtype) == ((0,), torch.int32)
        index = result.accept_index
        assert (tuple(index.shape), index.dtype) == ((0, 4), torch.int32)
        assert (tuple(result.accept_lens.shape), result.accept_lens.dtype) == ((0,), torch.int32)
        bonus = result.bonus_tokens
        assert (tuple(bonus.shape), bonus.dtype) == ((0,), torch.int64)
        done = commit(tree, result, lens, empty)
        for rows in (done.accept_tokens, done.kv_src, done.kv_dst):
            assert (tuple(rows.shape), rows.dtype) == ((0, 4), torch.int64)
        assert (tuple(done.new_seq_lens.shape), done.new_seq_lens.dtype) == ((0,), torch.int64)


def test_wide_packed_masks_fill_whole_words(device):
    for nodes, num_bytes in ((1, 1), (8, 1), (9, 2), (16, 2), (17, 4), (32, 4), (33, 8), (65, 12)):
        chain = torch.arange(-1, nodes - 1, device=device).unsqueeze(0)
        lens = torch.zeros(1, dtype=torch.int64, device=device)
        mode = TreeMaskMode.BITPACKED
        mask = build_tree(chain + 1, chain, lens, tree_mask_mode=mode).tree_mask
        assert mask.shape == (1, nodes, num_bytes)
        last = int.from_bytes(bytes(mask[0, -1].tolist()), "little")
        assert last == (1 << nodes) - 1
        if nodes == 32:
            assert mask.view(torch.uint32).shape == (1, 32, 1)


@pytest.mark.parametrize("mode", [TreeMaskMode.QLEN_ONLY, TreeMaskMode.BITPACKED])
def test_lengths_beyond_32_bits(mode, device):
    parents = torch.tensor([[-1, 0, 1]] * 3, device=device)
    many, few = torch.tensor([2**31 - 1, 2**31 + 5, 2**40]), torch.tensor([1, 2, 3])
    tree = build_tree(parents + 1, parents, many.to(device), tree_mask_mode=mode)
    assert tree.positions.tolist() == [int(length) + depth for length in many for depth in range(3)]
    same = build_tree(parents + 1, parents, few.to(device), tree_mask_mode=mode)
    assert torch.equal(tree.tree_mask, same.tree_mask)


def test_what_the_host_sees_on_a_cpu_changes_no_bit_of_a_full_mask():
    """There it copies blocks; while a graph is captured it scatters, as other devices do."""
    generator = torch.Generator().manual_seed(5)
    for lens in ([], [0], [3, 0, 11], [1] * 9):
        bs, n = len(lens), 7
        earlier = [torch.randint(-1, node, (bs,), generator=generator) for node in range(1, n)]
        parents = torch.stack([torch.full((bs,), -1), *earlier], dim=1)
        given = parents, torch.tensor(lens, dtype=torch.int64), n - 1, 0, sum(lens)
        tape = Tape()
        want = tape.capture(lambda given=given: kernels.build_tree(*given)[1])
        tape.replay()
        assert torch.equal(kernels.build_tree(*given)[1], want)
        tape.close()


def test_int32_lengths_keep_their_dtype(device):
    parents = torch.tensor([[-1, 0]], device=device)
    lens = torch.tensor([3], dtype=torch.int32, device=device)
    tree = build_tree(parents + 1, parents, lens, seq_lens_sum=3)
    assert tree.positions.dtype == torch.int64
    done = commit(tree, verify_greedy(tree, torch.ones_like(parents)), lens)
    assert done.new_seq_lens.dtype == torch.int32
    assert done.new_seq_lens.tolist() == [5]
    assert done.kv_src is None
    assert done.kv_dst is None


def test_fewer_nodes_than_the_widest_path(device):
    parents = torch.tensor([[-1, 0]], device=device)
    lens = torch.tensor([3], device=device)
    tree = build_tree(parents + 1, parents, lens, spec_steps=5, seq_lens_sum=3)
    done = commit(
        tree, verify_greedy(tree, torch.tensor([[1, 9]], device=device)), lens, parents + 8
    )
    assert done.accept_tokens.tolist() == [[1, 9, -1, -1, -1, -1]]
    assert done.kv_src.tolist() == [[7, 8, 7, 7, 7, 7]]


def test_a_full_mask_off_the_host_needs_its_size(unread):
    parents = torch.empty(2, 3, dtype=torch.int64, device=unread)
    lens = torch.empty(2, dtype=torch.int64, device=unread)
    with pytest.raises(ValueError, match=r"seq_lens_sum got None .*FULL mask on meta.*QLEN_ONLY"):
        build_tree(parents, parents, lens)
    sized = build_tree(parents, parents, lens, seq_lens_sum=10)
    assert sized.tree_mask.shape == (3 * (10 + 6),)


@pytest.mark.parametrize("mode", TreeMaskMode)
def test_no_value_is_read_on_the_host(mode, unread):
    parents = torch.empty(2, 3, dtype=torch.int64, device=unread)
    lens = torch.empty(2, dtype=torch.int64, device=unread)
    tree = build_tree(parents, parents, lens, tree_mask_mode=mode, seq_lens_sum=10)
    assert isinstance(tree, DraftTree)
    for target in (parents, torch.empty(2, 3, 7, device=unread)):
        commit(tree, verify_greedy(tree, target), lens, parents)


def test_a_full_mask_that_is_too_large_names_what_to_use_instead(device):
    parents = torch.tensor([[-1, 0, 1, 2]], device=device)
    lens = torch.tensor([2**31], device=device)
    message = r"size of the FULL mask got 8589934608 .*at most 1073741824 bytes .*QLEN_ONLY"
    with pytest.raises(ValueError, match=message):
        build_tree(parents + 1, parents, lens, seq_lens_sum=2**31)
    lens.fill_(7)
    with pytest.raises(ValueError, match=r"got 44 .*at most 43 bytes"):
        build_tree(parents + 1, parents, lens, seq_lens_sum=7, max_mask_bytes=43)
    tree = build_tree(parents + 1, parents, lens, seq_lens_sum=7, max_mask_bytes=44)
    assert tree.tree_mask.numel() == 44
    for mode in (TreeMaskMode.QLEN_ONLY, TreeMaskMode.BITPACKED):
        build_tree(parents + 1, parents, lens, tree_mask_mode=mode, max_mask_bytes=0)
