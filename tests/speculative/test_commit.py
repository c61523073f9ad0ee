"""What a step leaves: slots that stay, moves, hidden states."""

import itertools

import pytest
import torch

from hwcore.errors import ArgumentTypeError, ArgumentValueError
from hwcore.speculative import TreeMaskMode, build_tree, commit, verify_greedy

PARENTS = [-1, 0, 0, 2, 2, 4]  # the path 0, 2, 4, 5 is the one with node % 2 == 0, and 5


def verified(device, paths, steps=3):
    """Trees of PARENTS, in each of which the target agrees with the nodes of a path."""
    bs = len(paths)
    parents = torch.tensor([PARENTS] * bs, device=device)
    tokens = torch.arange(10, 16, device=device).repeat(bs, 1)
    lens = torch.tensor([5, 12, 0, 7][:bs], device=device)
    mode = TreeMaskMode.QLEN_ONLY
    tree = build_tree(tokens, parents, lens, spec_steps=steps, tree_mask_mode=mode)
    target = torch.full((bs, 6), 99)
    for row, path in enumerate(paths):
        for node, child in itertools.pairwise(path):
            target[row, node] = 10 + child
    return tree, verify_greedy(tree, target.to(device)), lens


PATHS = [[0, 2, 4, 5], [0, 1], [0], [0, 2, 4]]


def slots(lens, page_size, device, nodes=6):
    """Slots of the entries from ``lens`` on, in pages that follow no order."""
    rows = []
    for row, length in enumerate(lens.tolist()):
        entries = range(length, length + nodes)
        pages = [100 * (row + 1) - 7 * (entry // page_size) for entry in entries]
        rows.append([p * page_size + e % page_size for p, e in zip(pages, entries, strict=True)])
    return torch.tensor(rows, device=device)


@pytest.mark.parametrize("page_size", [1, 2, 4, 16])
def test_after_the_moves_the_path_fills_the_first_slots_in_page_order(page_size, device):
    tree, result, lens = verified(device, PATHS)
    locs = slots(lens, page_size, device)
    done = commit(tree, result, lens, locs, page_size=page_size)
    pool = torch.zeros(10_000, dtype=torch.int64, device=device)
    pool[locs.flatten()] = torch.arange(24, device=device)  # each slot holds its node's number
    pool[done.kv_dst.flatten()] = pool[done.kv_src.flatten()]
    for row, path in enumerate(PATHS):
        held = pool[locs[row, : len(path)]].tolist()
        assert held == [6 * row + node for node in path]


@pytest.mark.parametrize(
    ("page_size", "keep"), [(1, [4, 2, 1, 3]), (2, [5, 2, 2, 3]), (4, [6, 4, 4, 5])]
)
def test_slots_stay_to_the_end_of_the_last_page(page_size, keep, device):
    """Entries 5..8, 12..13, 0..0 and 7..9 are in; the tree took six slots."""
    tree, result, lens = verified(device, PATHS)
    done = commit(tree, result, lens, slots(lens, page_size, device), page_size=page_size)
    assert done.new_seq_lens.tolist() == [9, 14, 1, 10]
    expected = [
        min(6, -(-end // page_size) * page_size - begin)
        for begin, end in zip([5, 12, 0, 7], [9, 14, 1, 10], strict=True)
    ]
    assert expected == keep
    assert done.keep_lens.tolist() == keep
    assert done.keep_lens.dtype == torch.int64


@pytest.mark.parametrize("flat", [True, False])
def test_hidden_states_are_those_of_the_path(flat, device):
    tree, result, lens = verified(device, PATHS)
    hidden = torch.arange(24.0, device=device).view(4, 6, 1).repeat(1, 1, 3)
    hidden[1, 3:] = float("nan")  # nodes that nobody took
    hidden[1, 0] = 6.0
    given = hidden.view(24, 3) if flat else hidden
    done = commit(tree, result, lens, hidden_states=given)
    assert done.kv_src is None
    got = done.hidden_states
    assert got.shape == (4, 4, 3)
    for row, path in enumerate(PATHS):
        expected = [6.0 * row + node for node in path] + [0.0] * (4 - len(path))
        assert got[row, :, 0].tolist() == expected


def test_hidden_states_keep_their_dtype(device):
    tree, result, lens = verified(device, PATHS)
    hidden = torch.ones(4, 6, 2, dtype=torch.bfloat16, device=device)
    assert commit(tree, result, lens, hidden_states=hidden).hidden_states.dtype == torch.bfloat16


def test_fewer_nodes_than_steps(device):
    parents = torch.tensor([[-1, 0]], device=device)
    lens = torch.tensor([4], device=device)
    mode = TreeMaskMode.QLEN_ONLY
    tree = build_tree(torch.ones_like(parents), parents, lens, spec_steps=5, tree_mask_mode=mode)
    result = verify_greedy(tree, torch.ones_like(parents))
    locs = torch.tensor([[8, 9]], device=device)
    done = commit(tree, result, lens, locs, hidden_states=torch.ones(2, 1, device=device))
    assert done.accept_tokens.tolist() == [[1, 1, -1, -1, -1, -1]]
    assert done.kv_dst.tolist() == [[8, 9, 8, 8, 8, 8]]
    assert done.keep_lens.tolist() == [2]
    assert done.hidden_states.flatten().tolist() == [1, 1, 0, 0, 0, 0]


def locs(*rows):
    return torch.tensor(rows)


SOUND = [[21, 22, 23, 32, 33, 34]]  # entries 5.. in pages of 4: 20, then 32
BAD = [
    ({"page_size": 0}, ArgumentValueError, "page_size got 0"),
    ({"page_size": 2.0}, ArgumentTypeError, "page_size"),
    ({"pool_size": 34}, ArgumentValueError, r"cache_locs\[0, 5\] got 34 .*below 34"),
    (
        {"cache_locs": locs([21, 22, 23, 33, 34, 35])},
        ArgumentValueError,
        r"cache_locs\[0, 3\] got 33 .*entry seq_lens \+ node in its page of 4",
    ),
    (
        {"cache_locs": locs([21, 22, 27, 32, 33, 34])},
        ArgumentValueError,
        r"cache_locs\[0, 2\] got 27",
    ),
    (
        {"hidden_states": torch.ones(5, 2)},
        ArgumentValueError,
        r"hidden_states\.shape got \[5, 2\].*bs \* N=6",
    ),
    ({"hidden_states": torch.ones(1, 6, 2).long()}, ArgumentTypeError, r"hidden_states\.dtype"),
]


@pytest.mark.parametrize(("changed", "error", "message"), BAD)
def test_bad_input_is_named(changed, error, message, hw):
    tree, result, lens = verified("cpu", PATHS[:1])
    arguments = {"cache_locs": locs(*SOUND), "page_size": 4, "pool_size": 60} | changed
    commit(tree, result, lens, locs(*SOUND), page_size=4, pool_size=60)
    with pytest.raises(error, match="^commit: " + message):
        commit(tree, result, lens, **arguments)
