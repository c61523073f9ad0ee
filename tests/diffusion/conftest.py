import pytest
import torch

from hwcore.diffusion import TransferTensorBuffer

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
