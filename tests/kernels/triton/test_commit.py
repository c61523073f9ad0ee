import pytest
import torch

from hwcore.kernels import verify_tree_greedy

from ._compare import agree, seeded, spread
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
