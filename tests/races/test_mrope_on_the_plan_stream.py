"""SGLang PR 23423: the plan stream computes mrope positions from the draft's output, unordered.

With a plan stream, EAGLE's worker prepared the verify step on the side while the draft was still
running on the main stream, mrope positions included; on Ascend they came out wrong. The fix
computes them on the main stream once it has joined the plan.
"""

import torch

from ._race import Checks

RIGHT = [[107, 108], [207, 208], [307, 308]]
WRONG = [[100, 100], [200, 200], [300, 300]]
KIND = "read after write"
EDGES = ["`plan` never waited for `current` after aten::copy_"]


def program(hw, fixed):
    positions = torch.zeros(2, dtype=torch.long, device=hw.device())
    drafted = torch.tensor([7, 8], device=hw.device())
    deltas = torch.tensor([[100], [200], [300]], device=hw.device())  # [3, 1]: time, height, width
    mrope_positions = torch.zeros(3, 2, dtype=torch.long, device=hw.device())
    hw.synchronize()
    plan = hw.create_stream()

    positions.copy_(drafted)  # first: the draft, on the main stream
    with hw.stream_context(plan):
        if not fixed:
            torch.add(positions, deltas, out=mrope_positions)  # second
        hw.synchronize_stream(plan)  # the plan's host part is built from its results
    hw.wait_stream(hw.current_stream(), plan)
    if fixed:
        torch.add(positions, deltas, out=mrope_positions)
    return mrope_positions.tolist()


class TestRace(Checks):
    pass
