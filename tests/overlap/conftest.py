import pytest
import torch

from hwcore.overlap import FutureMap, RelaySpec

SIZES = {"topk": 2, "hidden_size": 5, "draft_probs": (2, 3)}


@pytest.fixture
def relay_of(hw):
    """Make maps of twelve rows, closed when the test ends."""
    made = []

    def make(debug=False, **sizes):
        relay = FutureMap(RelaySpec(pool_size=12, **sizes), backend=hw, debug=debug)
        made.append(relay)
        return relay

    yield make
    for relay in made:
        relay.close()  # while debugging: with what it found and nobody has looked at


@pytest.fixture
def rows(hw):
    """Make a tensor of rows on the device."""
    return lambda *values, dtype=torch.int64: torch.tensor(values, dtype=dtype, device=hw.device())
