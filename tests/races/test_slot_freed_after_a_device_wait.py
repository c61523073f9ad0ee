"""SGLang's diffusion transfer: a receive slot is free once a stream waits, not once the load ended.

The receiver loads a slot on a side stream, lets the compute stream wait for the load, and returns
the slot to its pool. The wait orders two streams; the host, and a peer that writes into the slot as
soon as it is told to, wait for nothing. The fix waits on the host before the slot is given back.
"""

import torch

from ._race import Checks

RIGHT = [[1, 1, 1], [2, 2, 2]]
WRONG = [[2, 2, 2], [2, 2, 2]]
KIND = "host write before copy"
EDGES = ["the host never waited for `load` after aten::copy_"]


def program(hw, fixed):
    slot = hw.pin_memory(torch.zeros(3))
    received = torch.zeros(2, 3, device=hw.device())
    hw.synchronize()
    load, loaded = hw.create_stream(), hw.create_event()

    for request in range(2):
        slot.fill_(request + 1)  # second: the peer's write for the next request
        with hw.stream_context(load):
            received[request].copy_(slot, non_blocking=True)  # first
            hw.record_event(loaded)
        hw.wait_event(loaded)  # the compute stream may go on
        if fixed:
            hw.synchronize_event(loaded)
        # Here the slot goes back to the pool.
    return received.tolist()


class TestRace(Checks):
    pass
