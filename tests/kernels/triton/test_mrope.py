import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ...speculative._golden import load, names  # noqa: TID252 - tests are no package
from ._compare import agree, seeded, spread

each = settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@each
@given(
    st.lists(st.integers(0, 300), max_size=9),
    st.sampled_from([torch.int64, torch.int32]),
    st.booleans(),
)
def test_requests_of_any_lengths(kernels, counts, dtype, strided):
    """Those without a token too, which start where the next one does."""
    generator = seeded(len(counts))
    lens = torch.tensor(counts, dtype=torch.int64)
    starts = (lens.cumsum(0) - lens).to(dtype)
    deltas = torch.randint(-50, 2**33, (7,), generator=generator)
    rows = torch.randint(0, 7, (len(counts),), generator=generator).to(dtype)
    positions = torch.randint(0, 2**33, (sum(counts),), generator=generator)
    arguments = [deltas, rows, positions, starts]
    if strided:
        # Not the starts: torch's own search warns of those.
        arguments = [*(spread(each) for each in arguments[:3]), starts]
    agree(kernels, "mrope_positions", *arguments)


@pytest.mark.parametrize("bs", [0, 1, 3, 5])
@pytest.mark.parametrize("count", [0, 1, 7, 300])
def test_as_many_tokens_for_each(kernels, bs, count):
    generator = seeded(bs)
    deltas = torch.randint(-50, 2**33, (7,), generator=generator)
    rows = torch.randint(0, 7, (bs,), generator=generator)
    positions = torch.randint(0, 2**33, (bs * count,), generator=generator)
    agree(kernels, "mrope_positions", deltas, rows, positions, None)


@pytest.mark.parametrize("name", names("relay"))
def test_golden_positions(kernels, name):
    meta, case = load(name, "cpu")
    deltas = case["seq_lens"].new_zeros(meta["pool"])
    for layout, starts in (("chain", None), ("ext", case["ext_starts"])):
        found = kernels["mrope_positions"](
            deltas, case["indices"], case[f"{layout}_positions"], starts
        )
        assert torch.equal(found, case[f"{layout}_mrope"])
