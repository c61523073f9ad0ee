import math

import pytest
import torch

from ...speculative._golden import load, names, parents_of_links  # noqa: TID252 - no package
from ._compare import FAR, agree, far_apart, seeded, spread
from ._trees import links_of, random_trees

NAME = "verify_tree_greedy"


@pytest.mark.parametrize("bs", [0, 1, 4])
@pytest.mark.parametrize("nodes", [1, 3, 7, 12])
def test_given_tokens_decide_as_in_the_reference(kernels, bs, nodes):
    for seed in range(4):
        generator = seeded(seed)
        tree = random_trees(generator, bs, nodes, tokens=3)
        target = torch.randint(0, 3, (bs, nodes), generator=generator)
        for steps in {0, 2, nodes - 1, nodes + 3}:
            agree(kernels, NAME, *tree, target, steps)
    agree(kernels, NAME, *(spread(each) for each in (*tree, target)), nodes - 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("vocab", [3, 64, 200])
def test_logits_decide_as_in_the_reference(kernels, pieces, vocab, dtype):
    """Of equal logits, of which there are many, the lowest token."""
    for bs in (0, 1, 5):
        generator = seeded(bs + vocab)
        tree = random_trees(generator, bs, 7, tokens=3)
        logits = torch.randint(-3, 4, (bs, 7, vocab), generator=generator).to(dtype)
        logits[..., :3] += 1
        for steps in (2, 6):
            agree(kernels, NAME, *tree, logits, steps)


def test_float64_logits_are_told_apart_as_such(kernels, pieces):
    tree = random_trees(seeded(0), 1, 1, tokens=1)
    logits = torch.zeros(1, 1, 100, dtype=torch.float64)
    logits[0, 0, 70] = 1e-300
    assert kernels[NAME](*tree, logits, 0)[3].tolist() == [70]


def test_strided_logits(kernels, pieces):
    wide = torch.randint(-3, 4, (7, 5, 200), generator=seeded(1)).to(torch.float32)
    tree = random_trees(seeded(2), 5, 7, tokens=3)
    for logits in (wide.transpose(0, 1), wide.transpose(0, 1)[..., ::2], wide[:1].transpose(0, 1)):
        logits = logits.expand(5, 7, -1)
        agree(kernels, NAME, *tree, logits, 6)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 77, 199])
def test_an_invalid_row_ends_the_walk_of_its_request_alone(kernels, pieces, poison, place):
    tree = random_trees(seeded(3), 3, 7, tokens=2)
    logits = torch.randn(3, 7, 200, generator=seeded(4))
    logits[1, 0, slice(None) if poison == -math.inf else place] = poison
    *_, bonus, status = agree(kernels, NAME, *tree, logits, 6)
    assert status.tolist() == [0, 1, 0]
    assert bonus[1] == 199


def test_only_rows_of_the_walk_are_read(kernels, pieces):
    parents = torch.tensor([[-1, 0, 0]])
    tree = (torch.tensor([[9, 2, 3]]), parents, *links_of(parents))
    logits = torch.zeros(1, 3, 100)
    logits[0, 0, 3] = 1.0
    logits[0, 1] = math.nan
    _, index, _, _, status = kernels[NAME](*tree, logits, 2)
    assert index.tolist() == [[0, 2, -1]]
    assert status.tolist() == [0]


@pytest.mark.parametrize("name", names("greedy"))
def test_golden_walks(kernels, name):
    meta, case = load(name, "cpu")
    links = case["retrieve_next_token"], case["retrieve_next_sibling"]
    parents = parents_of_links(*links)
    predict, index, lens, bonus, _ = kernels[NAME](
        case["candidates"], parents, *links, case["target_predict"], meta["steps"]
    )
    assert torch.equal(predict, case["predict"])
    assert torch.equal(index, case["accept_index"])
    assert torch.equal(bonus, case["bonus_tokens"])
    assert torch.equal(lens - 1, case["accept_num"])


@pytest.mark.parametrize("dim", [0, 1])
def test_rows_far_apart_are_found(kernels, pieces, tmp_path, dim):
    """Request or node times row length passes 2^31, though none of them does."""
    logits = far_apart(tmp_path, 200, torch.float16).unsqueeze(1 - dim)
    logits[-1, -1, 150] = 9.0
    bs, nodes, _ = logits.shape
    parents = torch.arange(-1, nodes - 1).repeat(bs, 1)
    tokens = torch.zeros_like(parents)
    assert logits.stride(dim) == FAR
    *_, bonus, status = kernels[NAME](tokens, parents, *links_of(parents), logits, nodes - 1)
    assert bonus[-1] == 150
    assert not status.any()
