import pytest
import torch

from hwcore.diffusion import DiffusionTransferManager, TransferTensorBuffer
from hwcore.diffusion.engines import Token, open_engine
from hwcore.types import TransferEngineSpec

STALE = 0xA5  # what an earlier tenant left


def memory(hw, kind, size_bytes):
    made = torch.full((size_bytes,), STALE, dtype=torch.uint8)
    match kind:
        case "device":
            return made.to(hw.device())
        case "page-locked":  # the device copies without the host
            return hw.pin_memory(made)
    return made


@pytest.fixture(params=["host", "page-locked", "device"])
def pool_of(hw, request):
    """Make pools over memory of the host, and over the device's; of 64 KiB by default."""

    def make(size_bytes=1 << 16, **options):
        return TransferTensorBuffer(memory(hw, request.param, size_bytes), hw, **options)

    return make


@pytest.fixture
def pool(pool_of):
    return pool_of()


@pytest.fixture
def host_pool(hw):
    """A pool of 64 KiB over page-locked memory, for what has nothing to do with where it is."""
    return TransferTensorBuffer(memory(hw, "page-locked", 1 << 16), hw)


@pytest.fixture(params=["shm", "tcp"])
def kind(request):
    """Engines whose pools are mapped by peers, and engines that are sent bytes."""
    return request.param


@pytest.fixture
def token():
    return Token.create()


@pytest.fixture
def manager(hw, token, kind):
    """Make managers of one launch; in the end nothing is held by any, and all are closed."""
    made = []

    def make(size_bytes=1 << 20, **options):
        engine = open_engine([TransferEngineSpec(kind, "tcp")], size_bytes, token)
        made.append(DiffusionTransferManager(engine, hw, **options))
        return made[-1]

    yield make
    hw.synchronize()
    for one in made:
        stats = one.stats() if not one.pool._is_closed else None
        one.close(timeout_s=2)
        if stats is not None:
            assert (stats.staged, stats.running, stats.consumed) == (0, 0, 0)
        assert one.pool.stats().ranges.free_bytes == one.size_bytes


@pytest.fixture
def pair(manager):
    """A manager that sends, in chunks of 16 KiB, and one that receives."""
    return manager(chunk_bytes=1 << 14), manager()
