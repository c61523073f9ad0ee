import pytest
import torch

from hwcore.overlap import FutureMap, RelaySpec
from hwcore.testing.sanitizer import Sanitizer

SIZES = {"topk": 2, "hidden_size": 5, "draft_probs": (2, 3)}


def pytest_generate_tests(metafunc):
    """`in_any_order`: on a device that simulates them, once for each order of work."""
    if "in_any_order" in metafunc.fixturenames:
        simulated = metafunc.config.getoption("backend") == "sim"
        orders = ["lazy", "eager", "random:1", "random:2", "random:3"] if simulated else ["its own"]
        metafunc.parametrize("in_any_order", orders, indirect=True)


@pytest.fixture
def in_any_order(request):
    if request.param == "its own":
        yield
        return
    from hwcore_sim import device

    with device.drain_policy(request.param):
        yield


@pytest.fixture
def late(hw):
    """Work runs as late as it may, where that can be had."""
    if hw.info.name != "sim":
        yield
        return
    from hwcore_sim import device

    with device.drain_policy("lazy"):
        yield


@pytest.fixture
def watched(hw):
    """Fails a test in which streams race."""
    with Sanitizer(hw):
        yield


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
        relay._watch = None  # what a test did not look at is its own business
        relay.close()


@pytest.fixture
def rows(hw):
    """Make a tensor of rows on the device."""
    return lambda *values, dtype=torch.int64: torch.tensor(values, dtype=dtype, device=hw.device())
