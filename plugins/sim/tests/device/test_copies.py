"""Copies: what the host waits for, and arguments that overlap."""

from __future__ import annotations

import pytest
import torch


def values(tensor):
    return tensor.cpu().tolist()


# --- What the host waits for ---------------------------------------------------------------------


def test_a_blocking_copy_to_the_device_has_run_when_it_returns(sim):
    x = torch.tensor([1.0, 2.0], device="sim")
    side = torch.Stream("sim")
    with side:
        y = x + 1
    side.synchronize()
    assert sim.peek(y).tolist() == [2, 3]


def test_a_blocking_copy_waits_for_its_own_stream_alone(sim):
    side = torch.Stream("sim")
    with side:
        torch.zeros(2, device="sim").add_(1)
    torch.ones(2).to("sim")
    assert sim.pending(torch.accelerator.current_stream()) == 0
    assert sim.pending(side) > 0


def test_a_copy_that_does_not_block_is_queued_with_the_values_of_the_call(sim):
    host, x = torch.tensor([1.0, 2.0]), torch.zeros(2, device="sim")
    torch.accelerator.synchronize()
    x.copy_(host, non_blocking=True)
    host.fill_(9)
    assert sim.peek(x).tolist() == [0, 0]
    assert values(x) == [1, 2]


# --- Arguments that overlap ----------------------------------------------------------------------

SQUARE = torch.arange(9.0).reshape(3, 3)


@pytest.mark.parametrize(
    "call",
    [
        lambda a, i: a[1:].copy_(a[:-1]),
        lambda a, i: a.copy_(a.t()),
        lambda a, i: a[:1].expand(3, 3).copy_(a),
        lambda a, i: a[1:].add_(a[:-1]),
        lambda a, i: torch.add(a[:-1], 1, out=a[1:]),
        lambda a, i: torch.cat([a[1:], a[:1]], out=a),
        lambda a, i: a.index_put_((i,), a[1:]),
        lambda a, i: torch.index_select(a, 0, i, out=a[1:]),
        lambda a, i: torch.gather(a, 0, a.long().clamp(max=2), out=a),
        lambda a, i: torch.take(a, i, out=a[0, :2]),
        lambda a, i: torch.where(a > 1, a.t(), a, out=a),
        lambda a, i: torch._foreach_copy_([a[1:]], [a[:-1]]),
    ],
)
def test_arguments_that_overlap_in_part_are_torchs_own_error_at_the_call(policy, call):
    message = "single memory location|some elements of the input tensor and the written-to"
    with pytest.raises(RuntimeError, match=message):
        call(SQUARE.clone(), torch.tensor([0, 1]))
    a, index = SQUARE.to("sim"), torch.tensor([0, 1]).to("sim")
    with pytest.raises(RuntimeError, match=message):
        call(a, index)
    torch.accelerator.synchronize()
    assert values(a) == SQUARE.tolist()


def test_arguments_of_one_memory_that_do_not_overlap_are_fine_and_stay_queued(sim):
    a = SQUARE.to("sim")
    torch.accelerator.synchronize()
    a[:1].add_(a[1:2])
    torch.add(a, 1, out=a)
    torch.cat([a[1:2], a[1:2]], out=a.view(-1)[6:9].view(1, 3)[:0].new_empty(2, 3))
    assert sim.pending(torch.accelerator.current_stream()) >= 3
    assert values(a) == [[4, 6, 8], [4, 5, 6], [7, 8, 9]]
