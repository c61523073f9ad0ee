"""The three plan-stream and overlap races of tests/races, line for line on this package's API.

There each program waits for nothing, gives a wrong value on the simulated device and is reported.
Written with PlanStream and StreamFence the same lines are right, in any order, and silent.
"""

import pytest
import torch

from hwcore.overlap import PlanStream, StreamFence

pytestmark = pytest.mark.usefixtures("in_any_order", "watched")


@pytest.fixture(params=[True, False], ids=["plan stream", "one stream"])
def plan(request, hw):
    return PlanStream(backend=hw, enabled=request.param)


def test_mrope_positions_on_the_plan_stream(hw, plan):
    """SGLang PR 23423; tests/races/test_mrope_on_the_plan_stream.py."""
    positions = torch.zeros(2, dtype=torch.long, device=hw.device())
    drafted = torch.tensor([7, 8], device=hw.device())
    deltas = torch.tensor([[100], [200], [300]], device=hw.device())
    mrope_positions = torch.zeros(3, 2, dtype=torch.long, device=hw.device())
    hw.synchronize()

    positions.copy_(drafted)
    with plan.block(positions) as outputs:
        torch.add(positions, deltas, out=mrope_positions)
        hw.synchronize_stream(hw.current_stream())
        outputs["mrope_positions"] = mrope_positions
    joined = plan.join().outputs["mrope_positions"]
    assert joined.tolist() == [[107, 108], [207, 208], [307, 308]]


def test_draft_copied_on_the_plan_stream(hw, plan):
    """SGLang PR 22113; tests/races/test_draft_copied_on_the_plan_stream.py."""

    def buffers():
        tokens, positions = torch.zeros(2, 3, dtype=torch.long, device=hw.device())
        return tokens, positions, torch.zeros(3, dtype=torch.bool, device=hw.device())

    draft_tokens, positions, tree_mask = buffers()
    graph_tokens, graph_positions, graph_mask = buffers()
    tree = torch.tensor([[11, 12, 13], [5, 6, 6]], device=hw.device())
    hw.synchronize()

    draft_tokens += tree[0]
    positions += tree[1]
    tree_mask.logical_not_()

    with plan.block(draft_tokens, positions, tree_mask) as outputs:
        graph_tokens.copy_(draft_tokens)
        graph_positions.copy_(positions)
        graph_mask.copy_(tree_mask)
        hw.synchronize_stream(hw.current_stream())
        outputs["graph"] = graph_tokens, graph_positions, graph_mask
    tokens, positions, mask = plan.join().outputs["graph"]
    assert tokens.tolist() == [11, 12, 13]
    assert positions.tolist() == [5, 6, 6]
    assert mask.tolist() == [True, True, True]


def test_req_to_token_overwritten(hw):
    """SGLang PR 26380; tests/races/test_req_to_token_overwritten.py."""
    req_to_token = torch.tensor([[0, 1], [10, 11], [20, 21], [30, 31]], device=hw.device())
    batch = torch.tensor([2, 3], device=hw.device())
    attended = torch.zeros(2, 2, dtype=torch.long, device=hw.device())
    hw.synchronize()
    forward, fence = hw.create_stream(), StreamFence(hw)

    with hw.stream_context(forward), fence.reading():
        torch.index_select(req_to_token, 0, batch, out=attended)
    with fence.writing():
        req_to_token[2] = 99
    hw.synchronize_stream(hw.current_stream())
    hw.synchronize_stream(forward)
    assert attended.tolist() == [[20, 21], [30, 31]]
