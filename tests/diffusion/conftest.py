import pytest
import torch

from hwcore.diffusion import TransferTensorBuffer

STALE = 0xA5  # what an earlier tenant left


@pytest.fixture(params=["host", "device"])
def pool_of(hw, request):
    """Make pools over memory of the host, and over the device's; of 64 KiB by default."""
    device = "cpu" if request.param == "host" else hw.device()

    def make(size_bytes=1 << 16, **options):
        memory = torch.full((size_bytes,), STALE, dtype=torch.uint8, device=device)
        hw.synchronize()
        return TransferTensorBuffer(memory, hw, **options)

    return make


@pytest.fixture
def pool(pool_of):
    return pool_of()


@pytest.fixture
def host_pool(hw):
    """A pool of 64 KiB over the host's memory, for what has nothing to do with a device."""
    return TransferTensorBuffer(torch.full((1 << 16,), STALE, dtype=torch.uint8), hw)
