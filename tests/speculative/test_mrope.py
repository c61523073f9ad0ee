import pytest
import torch

from hwcore.errors import ArgumentTypeError, ArgumentValueError
from hwcore.speculative import TreeMaskMode, build_tree, compute_spec_mrope_positions

# Of the pool's rows: padding, text, an image, a video, and one whose prompt was mostly image.
DELTAS = [0, 0, -250, 37, -4000]


@pytest.fixture
def deltas(device):
    return torch.tensor(DELTAS, device=device)


@pytest.mark.parametrize("index", [torch.int64, torch.int32])
def test_the_nodes_of_a_tree_are_moved_by_their_requests_delta(index, deltas, device):
    rows = torch.tensor([3, 1, 2], dtype=index, device=device)
    parents = torch.tensor([[-1, 0, 0, 1, -1]] * 3, device=device)
    lens = torch.tensor([900, 5, 5000], device=device)
    mode = TreeMaskMode.QLEN_ONLY
    tree = build_tree(torch.ones_like(parents), parents, lens, tree_mask_mode=mode)
    got = compute_spec_mrope_positions(deltas, rows, tree.positions)
    expected = []
    for row, length in zip([3, 1, 2], [900, 5, 5000], strict=True):
        expected += [length + depth + DELTAS[row] for depth in (0, 1, 1, 2, 0)]
    assert got.dtype == torch.int64
    assert got.tolist() == [expected] * 3


def test_accepted_tokens_of_other_lengths(deltas, device):
    """A draft-extend: every request has as many tokens as it accepted, one even none."""
    rows = torch.tensor([2, 4, 3], device=device)
    positions = torch.tensor([300, 301, 302, 50, 51], device=device)
    starts = torch.tensor([0, 3, 3], device=device)
    got = compute_spec_mrope_positions(deltas, rows, positions, starts=starts)
    assert got.tolist() == [[50, 51, 52, 87, 88]] * 3


def test_a_column_of_deltas_is_what_a_row_is(deltas, device):
    rows, positions = torch.tensor([4, 2], device=device), torch.tensor([9, 8], device=device)
    want = compute_spec_mrope_positions(deltas, rows, positions)
    assert torch.equal(compute_spec_mrope_positions(deltas.unsqueeze(1), rows, positions), want)


def test_positions_beyond_32_bits(deltas, device):
    rows = torch.tensor([3], device=device)
    positions = torch.tensor([2**31, 2**40], device=device)
    got = compute_spec_mrope_positions(deltas, rows, positions)
    assert got[0].tolist() == [2**31 + 37, 2**40 + 37]


def test_an_empty_batch(deltas, device):
    none = torch.zeros(0, dtype=torch.int64, device=device)
    assert compute_spec_mrope_positions(deltas, none, none).shape == (3, 0)
    assert compute_spec_mrope_positions(deltas, none, none, starts=none).shape == (3, 0)


def test_a_changed_delta_is_seen_without_the_host(hw, deltas, device, monkeypatch):
    """The buffer is the device's: nothing of it is copied when a batch is made."""
    monkeypatch.setenv("HWCORE_DEBUG", "0")  # debugging looks at what the tensors hold
    if hw.info.name != "sim":
        pytest.skip("the device does not tell what the host waits for")
    from hwcore_sim import device as sim

    rows, positions = torch.tensor([1], device=device), torch.tensor([10], device=device)
    changed = torch.tensor(-3, device=device)
    with sim.host_waits() as waits:
        deltas[1] = changed
        got = compute_spec_mrope_positions(deltas, rows, positions)
    assert waits == []
    assert got[0].tolist() == [7]


def ints(*values, dtype=torch.int64):
    return torch.tensor(values, dtype=dtype)


BAD = [
    ({"deltas": ints(1).float()}, ArgumentTypeError, r"deltas\.dtype"),
    ({"deltas": ints(1).view(1, 1, 1)}, ArgumentTypeError, r"deltas\.dim\(\)"),
    ({"deltas": ints(1, 2).view(1, 2)}, ArgumentValueError, r"deltas\.shape got \[1, 2\]"),
    ({"rows": ints(0, 5)}, ArgumentValueError, r"rows\[1\] got 5 .*a row in \[0, 5\)"),
    ({"rows": ints(-1, 0)}, ArgumentValueError, r"rows\[0\] got -1"),
    ({"positions": ints(1, 2, 3)}, ArgumentValueError, r"len\(positions\) got 3 .*Pass `starts`"),
    ({"starts": ints(1, 2)}, ArgumentValueError, r"starts\[0\] got 1 .*expected 0, then asc"),
    ({"starts": ints(0, 9)}, ArgumentValueError, r"starts\[1\] got 9"),
    ({"starts": ints(0)}, ArgumentValueError, r"starts\.shape"),
]


@pytest.mark.parametrize(("changed", "error", "message"), BAD)
def test_bad_input_is_named(changed, error, message, hw):
    arguments = {"deltas": ints(*DELTAS), "rows": ints(1, 2), "positions": ints(5, 6)}
    arguments |= changed
    with pytest.raises(error, match=message):
        compute_spec_mrope_positions(
            arguments.pop("deltas"), arguments.pop("rows"), arguments.pop("positions"), **arguments
        )
