import pytest
import torch

from hwcore.kernels import verify_tree_greedy
from hwcore.kernels.triton import tuning
from hwcore.testing.conformance.inputs import move_inputs

from ._compare import agree, far_apart, seeded, spread
from ._trees import random_trees


@pytest.mark.parametrize("bs", [0, 1, 6])
@pytest.mark.parametrize("nodes", [1, 3, 7])
@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("moves", [True, False])
def test_commit_paths_is_the_references(kernels, bs, nodes, page_size, moves):
    generator = seeded(bs * 100 + nodes)
    tree = random_trees(generator, bs, nodes, tokens=3)
    target = torch.randint(0, 3, (bs, nodes), generator=generator)
    predict, index, lens, _, _ = verify_tree_greedy(*tree, target, nodes - 1)
    slots = torch.randperm(bs * nodes, generator=generator).view(bs, nodes) if moves else None
    for dtype in (torch.int64, torch.int32):
        before = torch.randint(0, 40, (bs,), generator=generator).to(dtype)
        agree(kernels, "commit_paths", predict, index, lens, before, slots, page_size)
        wide = [spread(each) for each in (predict, index, lens, before)]
        agree(kernels, "commit_paths", *wide, spread(slots) if moves else None, page_size)


def test_lengths_pass_2_to_the_31(kernels):
    predict = torch.tensor([5, 6], dtype=torch.int32)
    index, lens = torch.tensor([[0, 1]]).int(), torch.tensor([2]).int()
    long = torch.tensor([2**31 - 1])
    *_, keep, _, _ = agree(kernels, "commit_paths", predict, index, lens, long, None, 64)
    assert keep.tolist() == [2]


def test_the_steps_of_a_path_may_be_more_than_the_nodes(kernels):
    predict = torch.tensor([5, 6], dtype=torch.int32)
    index = torch.tensor([[0, 1, -1, -1, -1]]).int()
    slots = torch.tensor([[8, 9]])
    agree(
        kernels,
        "commit_paths",
        predict,
        index,
        torch.tensor([2]).int(),
        torch.tensor([3]),
        slots,
        1,
    )


@pytest.mark.parametrize("bs", [0, 1, 5])
@pytest.mark.parametrize("seed", range(4))
def test_move_kv_moves_what_the_reference_moves(kernels, bs, seed):
    """Bytes of four dtypes; among the moves such as read what others of the request write."""
    (kv, src, dst), _ = move_inputs(seeded(seed), bs)
    for wide in (False, True):
        moves = (spread(src), spread(dst)) if wide else (src, dst)
        agree(kernels, "move_kv", spread(kv) if wide else kv, *moves)


def test_an_entry_longer_than_a_block_is_moved_whole(kernels, monkeypatch):
    monkeypatch.setitem(tuning.TUNED, "move_kv", tuning.Tuning(block=16, num_warps=4))
    kv = torch.arange(2 * 4 * 50.0).view(2, 4, 50)
    agree(kernels, "move_kv", kv, torch.tensor([[0, 3, 1]]), torch.tensor([[0, 1, 3]]))


@pytest.mark.parametrize(("src", "dst"), [(2, 1), (1, 2)])
def test_slots_lie_beyond_32_bits(kernels, tmp_path, src, dst):
    rows = far_apart(tmp_path, 4, torch.uint8)
    rows[src] = 7
    kernels["move_kv"](rows.unsqueeze(0), torch.tensor([[0, src]]), torch.tensor([[0, dst]]))
    assert rows.tolist() == [[0] * 4, [7] * 4, [7] * 4]


def test_layers_lie_beyond_32_bits(kernels, tmp_path):
    rows = far_apart(tmp_path, 4, torch.uint8)
    layers = rows.view(3, 2, 2)
    layers[2, 1] = 7
    kernels["move_kv"](layers, torch.tensor([[1]]), torch.tensor([[0]]))
    assert layers[2].tolist() == [[7, 7], [7, 7]]


def test_a_cache_whose_entries_are_no_view_of_one_dimension_is_refused(kernels):
    kv = torch.zeros(1, 4, 2, 3).transpose(2, 3)
    with pytest.raises(RuntimeError, match="view"):
        kernels["move_kv"](kv, torch.tensor([[1]]), torch.tensor([[0]]))
