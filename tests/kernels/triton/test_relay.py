import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ._compare import agree, far_apart, seeded, spread

each = settings(
    deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
WORD = torch.iinfo(torch.int64)


@each
@given(
    st.integers(0, 9),
    st.sampled_from([0, 1, 7, 1023, 1024, 2050]),
    st.sampled_from([torch.int64, torch.int32]),
    st.booleans(),
)
def test_gather_rows_copies_what_the_reference_copies(kernels, bs, words, dtype, strided):
    rows = torch.randint(WORD.min, WORD.max, (5, words), generator=seeded(bs))
    indices = torch.randint(0, 5, (bs,), generator=seeded(words)).to(dtype)
    if strided:
        rows, indices = spread(rows), spread(indices)
    agree(kernels, "gather_rows", rows, indices, torch.zeros(bs, words, dtype=torch.int64))


def test_gather_rows_writes_between_the_elements_of_nobody(kernels):
    out = torch.zeros(3, 8, dtype=torch.int64)
    rows = torch.arange(1, 9).view(2, 4)
    kernels["gather_rows"](rows, torch.tensor([1, 0, 1]), out[:, ::2])
    assert out[:, ::2].tolist() == [[5, 6, 7, 8], [1, 2, 3, 4], [5, 6, 7, 8]]
    assert not out[:, 1::2].any()


@each
@given(
    st.integers(0, 9),
    st.sampled_from([1, 3]),
    st.booleans(),
)
def test_assert_and_invalidate_is_the_references(kernels, bs, width, strided):
    guards = torch.randint(-3, 40, (bs,), generator=seeded(bs))
    state = torch.randint(0, 40, (11, width), generator=seeded(width)).to(torch.int32)
    indices = torch.randint(0, 11, (bs,), generator=seeded(bs + 1))
    if strided:
        guards, state, indices = spread(guards), spread(state), spread(indices)
    arguments = guards, state, indices, torch.tensor(77)
    outcome, after = agree(kernels, "assert_and_invalidate", *arguments)
    assert (after == -1).all(1).sum() == indices.unique().numel()
    assert outcome == (guards.amin() if bs else 0)


def test_assert_and_invalidate_takes_int32_rows(kernels):
    """As the reference says; torch's own operation on a CPU does not."""
    state, rows = torch.zeros(4, 2, dtype=torch.int32), torch.tensor([3, 1], dtype=torch.int32)
    kernels["assert_and_invalidate"](torch.tensor([3, 1]), state, rows, torch.tensor(0))
    assert state.tolist() == [[0, 0], [-1, -1], [0, 0], [-1, -1]]


@pytest.mark.parametrize("bs", [1, 1500])
def test_the_least_guard_is_found_wherever_it_is(kernels, bs):
    """Also where the batch is larger than a block."""
    for place in (0, bs // 2, bs - 1):
        guards = torch.arange(5, 5 + bs)
        guards[place] = -2
        state = torch.zeros(bs, 1, dtype=torch.int32)
        outcome = torch.tensor(0)
        kernels["assert_and_invalidate"](guards, state, torch.arange(bs), outcome)
        assert outcome == -2
        assert (state == -1).all()


def test_all_guards_may_be_the_highest_number(kernels):
    guards = torch.full((2,), WORD.max)
    state = torch.zeros(2, 1, dtype=torch.int32)
    agree(kernels, "assert_and_invalidate", guards, state, torch.arange(2), torch.tensor(0))


def test_rows_far_apart_are_found(kernels, tmp_path):
    """Row times length passes 2^31, though neither does."""
    rows = far_apart(tmp_path, 2, torch.int64)
    rows.copy_(torch.arange(1, 7).view(3, 2))
    out = torch.zeros(2, 2, dtype=torch.int64)
    kernels["gather_rows"](rows, torch.tensor([2, 1]), out)
    assert out.tolist() == [[5, 6], [3, 4]]
    state = far_apart(tmp_path, 1, torch.int32)
    kernels["assert_and_invalidate"](torch.tensor([2]), state, torch.tensor([2]), torch.tensor(0))
    assert state.flatten().tolist() == [0, 0, -1]
