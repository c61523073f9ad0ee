import pytest
import torch

from hwcore.testing.conformance.operations import OPERATIONS

from ...speculative._golden import load, names, parents_of_links  # noqa: TID252 - no package
from ._compare import agree, seeded, spread
from ._trees import random_parents

MODES = {"full": 0, "qlen_only": 1, "bitpacked": 2}
NODES = (1, 3, 8, 9, 17, 33, 65)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("nodes", NODES)
def test_build_tree_is_the_references(kernels, nodes, mode):
    for bs in (0, 1, 3):
        generator = seeded(nodes + bs)
        parents = random_parents(generator, bs, nodes)
        lens = torch.randint(0, 40, (bs,), generator=generator)
        agree(kernels, "build_tree", parents, lens, nodes - 1, MODES[mode], int(lens.sum()))
        few = spread(parents), spread(lens.int()), nodes - 1, MODES[mode], int(lens.sum())
        agree(kernels, "build_tree", *few)


@pytest.mark.parametrize("seed", range(4))
def test_the_conformance_kits_trees(kernels, seed):
    arguments, _ = OPERATIONS["build_tree"].inputs(seeded(seed), 2)
    agree(kernels, "build_tree", *arguments)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("steps", range(6))
def test_a_tree_deeper_than_it_may_be_comes_out_as_in_the_reference(kernels, steps, mode):
    chain = torch.arange(-1, 11).unsqueeze(0)
    agree(kernels, "build_tree", chain, torch.tensor([5]), steps, MODES[mode], 5)


@pytest.mark.parametrize("mode", ["qlen_only", "bitpacked"])
def test_lengths_pass_2_to_the_31(kernels, mode):
    parents = torch.tensor([[-1, 0, 1]])
    agree(kernels, "build_tree", parents, torch.tensor([2**31 + 5]), 2, MODES[mode], 0)


def test_a_full_mask_that_was_sized_for_less_is_not_written_beyond(kernels, monkeypatch):
    """The lengths' sum is the caller's word; a mask that is too small must not cost others."""
    from hwcore.kernels.triton import tree

    guard = torch.full((200,), True)

    def small(parents, mask_mode, seq_lens_sum):
        return guard[: 2 * (seq_lens_sum + 4)]

    monkeypatch.setattr(tree, "_mask", small)
    parents = torch.tensor([[-1, -1]] * 2)
    kernels["build_tree"](parents, torch.tensor([30, 30]), 1, MODES["full"], 10)
    assert guard[28:].all()


@pytest.mark.parametrize("name", names("tree"))
def test_golden_trees(kernels, name):
    meta, case = load(name, "cpu")
    lens = case["seq_lens"]
    parents = parents_of_links(case["retrieve_next_token"], case["retrieve_next_sibling"])
    positions, mask, *links = kernels["build_tree"](
        parents, lens, meta["steps"], meta["mode"], int(lens.sum())
    )
    assert torch.equal(positions.flatten(), case["positions"])
    assert torch.equal(mask, case["tree_mask"])
    assert torch.equal(links[0], case["retrieve_next_token"])
    assert torch.equal(links[1], case["retrieve_next_sibling"])
