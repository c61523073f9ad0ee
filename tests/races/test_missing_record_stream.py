"""SGLang PR 34076: indices made on one stream, gathered with on another, freed without a word.

Mixed prefill handed the running batch's indices to the forward stream. That waits for the schedule
stream, so the gather is in order; but nothing keeps the block once the last reference is dropped.
How often it goes wrong upstream depends on the allocator: 0 of 40 runs, or 19 of 20. The fix is
one `record_stream`.
"""

import torch

from ._race import Checks

RIGHT = ([30, 30, 30, 30], [0, 0, 0, 0])
WRONG = ([10, 10, 10, 10], [0, 0, 0, 0])
KIND = "freed while in use"
EDGES = ["`current` never waited for `forward` after aten::index_select"]


def program(hw, fixed):
    relay = torch.tensor([10, 20, 30, 40], device=hw.device())
    gathered = torch.zeros(4, dtype=torch.long, device=hw.device())
    hw.synchronize()
    schedule, forward = hw.current_stream(), hw.create_stream()

    mix_running_indices = torch.full((4,), 2, device=hw.device())
    hw.wait_stream(forward, schedule)
    with hw.stream_context(forward):
        torch.index_select(relay, 0, mix_running_indices, out=gathered)  # first
    if fixed:
        hw.record_stream(mix_running_indices, forward)
    del mix_running_indices  # second
    next_batch = torch.zeros(4, dtype=torch.long, device=hw.device())  # takes the block
    hw.synchronize_stream(schedule)
    hw.synchronize_stream(forward)
    return gathered.tolist(), next_batch.tolist()


class TestRace(Checks):
    pass
