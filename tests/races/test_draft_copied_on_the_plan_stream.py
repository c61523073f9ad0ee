"""SGLang PR 22113: the plan stream copies the draft's tree while the main stream builds it.

On MI355 streams run side by side often enough for the copies into the graph's static buffers to
read tokens, positions and mask half written. The fix records an event on the main stream once the
tree is built, and has the plan stream wait for it before the copies.
"""

import torch

from ._race import Checks

RIGHT = ([11, 12, 13], [5, 6, 6], [True, True, True])
WRONG = ([0, 0, 0], [0, 0, 0], [False, False, False])
KIND = "read after write"
EDGES = [
    "`plan` never waited for `current` after aten::add_",
    "`plan` never waited for `current` after aten::add_",
    "`plan` never waited for `current` after aten::logical_not_",
]


def program(hw, fixed):
    def buffers():
        tokens, positions = torch.zeros(2, 3, dtype=torch.long, device=hw.device())
        return tokens, positions, torch.zeros(3, dtype=torch.bool, device=hw.device())

    draft_tokens, positions, tree_mask = buffers()
    graph_tokens, graph_positions, graph_mask = buffers()
    tree = torch.tensor([[11, 12, 13], [5, 6, 6]], device=hw.device())
    hw.synchronize()
    plan, tree_is_built = hw.create_stream(), hw.create_event()

    # The main stream builds the tree from the draft's results.
    draft_tokens += tree[0]  # first 1
    positions += tree[1]  # first 2
    tree_mask.logical_not_()  # first 3
    hw.record_event(tree_is_built)

    with hw.stream_context(plan):
        if fixed:
            hw.wait_event(tree_is_built)
        graph_tokens.copy_(draft_tokens)  # second 1
        graph_positions.copy_(positions)  # second 2
        graph_mask.copy_(tree_mask)  # second 3
        hw.synchronize_stream(plan)  # the attention's host metadata is built from these
    hw.wait_stream(hw.current_stream(), plan)
    return graph_tokens.tolist(), graph_positions.tolist(), graph_mask.tolist()


class TestRace(Checks):
    pass
