"""SGLang PR 26380: the scheduler gives a row of `req_to_token` away while the forward reads it.

In overlap scheduling the schedule stream prepares the next batch: a finished request's row goes to
a new one, and is overwritten while the forward of the last batch is still to read it. The fix
makes the schedule stream wait for the forward stream before it writes.
"""

import torch

from hwcore.testing import sanitizer

from ._race import Checks

RIGHT = [[20, 21], [30, 31]]
WRONG = [[99, 99], [30, 31]]
KIND = "write after read"
EDGES = ["`current` never waited for `forward` after aten::index_select"]


def program(hw, fixed, freed_row=2):
    req_to_token = torch.tensor([[0, 1], [10, 11], [20, 21], [30, 31]], device=hw.device())
    batch = torch.tensor([2, 3], device=hw.device())
    attended = torch.zeros(2, 2, dtype=torch.long, device=hw.device())
    hw.synchronize()
    schedule, forward = hw.current_stream(), hw.create_stream()

    with hw.stream_context(forward), sanitizer.rows(req_to_token, [2, 3]):
        torch.index_select(req_to_token, 0, batch, out=attended)  # first
    if fixed:
        hw.wait_stream(schedule, forward)
    req_to_token[freed_row] = 99  # second: the row's next request
    hw.synchronize_stream(schedule)  # the scheduler reads the lengths that it has prepared
    hw.synchronize_stream(forward)
    return attended.tolist()


class TestRace(Checks):
    pass


def test_a_row_that_the_batch_does_not_hold_may_be_given_away(hw):
    with sanitizer.Sanitizer(hw, on_race="raise"):
        assert program(hw, fixed=False, freed_row=1) == RIGHT
