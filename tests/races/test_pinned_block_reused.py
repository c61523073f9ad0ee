"""vllm-ascend PR 15719: a pinned staging block is reused before the copy that reads it has run.

Speculative metadata went up through temporaries, `pin_memory().to(device, non_blocking=True)`,
whose last reference was gone before the copy had run. An allocator that quarantines such blocks
hides it; Ascend's handed them out at once, and the device read the next block's contents as
indices. The fix keeps the sources until an event recorded after the copies is reached.
"""

import pytest
import torch

from ._race import Checks

RIGHT = [[1, 1], [2, 2]]
WRONG = [[2, 2], [2, 2]]
KIND = "pinned memory freed before copy"
EDGES = ["the host never waited for `current` after aten::copy_"]


def program(hw, fixed):
    metadata = torch.zeros(2, 2, dtype=torch.long, device=hw.device())
    hw.synchronize()
    in_flight = []

    for step in range(2):
        staging = hw.pin_memory(torch.full((2,), step + 1))
        metadata[step].copy_(staging, non_blocking=True)  # first
        if fixed:
            copied = hw.create_event()
            hw.record_event(copied)
            in_flight.append((copied, staging))
        del staging  # second
    for copied, _ in in_flight:
        hw.synchronize_event(copied)
    in_flight.clear()
    return metadata.tolist()


@pytest.fixture(autouse=True)
def early_reuse(hw):
    """Let the simulated device's allocator behave as the one upstream; no other can."""
    if hw.info.name != "sim":
        yield
        return
    from hwcore_sim import device

    with device.pinned_reuse("early"):
        yield


class TestRace(Checks):
    pass
