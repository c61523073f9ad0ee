"""Device memory and pinned memory: reuse, limits, statistics."""

from __future__ import annotations

import pytest
import torch

from hwcore.errors import ArgumentTypeError, ArgumentValueError

MIB = 1 << 20


def test_a_freed_block_is_reused_by_its_stream_at_once(sim):
    x = torch.empty(100, device="sim")
    address = x.data_ptr()
    del x
    assert torch.empty(100, device="sim").data_ptr() == address


def test_a_freed_block_is_not_reused_by_another_stream(sim):
    x = torch.empty(100, device="sim")
    address = x.data_ptr()
    del x
    with torch.Stream("sim"):
        assert torch.empty(100, device="sim").data_ptr() != address


def test_a_block_somewhat_too_large_is_reused(sim):
    x = torch.empty(10_000, device="sim")
    address = x.data_ptr()
    del x
    assert torch.empty(9_000, device="sim").data_ptr() == address
    assert torch.empty(1_000, device="sim").data_ptr() != address


def test_a_recorded_block_comes_back_once_the_other_stream_is_there(sim):
    side = torch.Stream("sim")
    x = torch.empty(100, device="sim")
    address = x.data_ptr()
    with side:
        y = x + 1
    x.record_stream(side)
    del x
    other = torch.empty(100, device="sim")
    assert other.data_ptr() != address
    side.synchronize()
    again = torch.empty(100, device="sim")
    assert again.data_ptr() == address
    del y


def test_new_memory_holds_poison_too(sim):
    x = torch.empty(1234, dtype=torch.uint8, device="sim")
    assert sim.peek(x).unique().tolist() == [0xDD]


def test_an_empty_tensor_takes_no_memory(sim):
    before = torch.accelerator.memory_allocated()
    x = torch.empty(0, 3, device="sim")
    assert torch.accelerator.memory_allocated() == before
    assert x.cpu().shape == (0, 3)


def test_beyond_the_capacity_is_torchs_own_error_and_nothing_is_lost(sim):
    torch.accelerator.empty_cache()
    kept = torch.ones(MIB // 4, device="sim")
    used = torch.accelerator.memory_allocated()
    sim.set_memory_capacity(torch.accelerator.memory_reserved() + 4 * MIB)
    with pytest.raises(
        torch.OutOfMemoryError, match=r"allocate got 8\.00 MiB on sim:0; expected at"
    ):
        torch.empty(8 * MIB, dtype=torch.uint8, device="sim")
    assert torch.accelerator.memory_allocated() == used
    assert kept.sum().item() == MIB // 4
    fits = torch.empty(2 * MIB, dtype=torch.uint8, device="sim")
    assert fits.fill_(1).sum().item() == 2 * MIB


def test_cached_blocks_make_room_before_memory_runs_out(sim):
    torch.accelerator.empty_cache()
    sim.set_memory_capacity(torch.accelerator.memory_reserved() + 4 * MIB)
    x = torch.ones(3 * MIB // 4, device="sim")  # its work is still queued when it is freed
    del x
    y = torch.empty(4 * MIB, dtype=torch.uint8, device="sim")
    assert y.nbytes == 4 * MIB
    assert sim.memory_stats()["num_alloc_retries"] > 0


def test_beyond_the_capacity_inside_a_host_function_is_the_same_error(sim):
    torch.accelerator.empty_cache()
    sim.set_memory_capacity(torch.accelerator.memory_reserved() + MIB)
    sim.launch_host_function(lambda: torch.empty(MIB, device="sim"))
    with pytest.raises(torch.OutOfMemoryError, match=r"allocate got 4\.00 MiB on sim:0"):
        torch.accelerator.synchronize()


def test_sizes_beyond_all_memory_are_the_same_error(sim):
    for size in (1 << 40, 1 << 60):
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(size, dtype=torch.uint8, device="sim")


def test_memory_that_queued_work_could_touch_is_not_unmapped(sim):
    side = torch.Stream("sim")
    x = torch.ones(4 * MIB, device="sim")
    torch.accelerator.synchronize()
    with side:
        y = x + 1  # and no record_stream
    del x
    torch.accelerator.empty_cache()
    side.synchronize()  # a wrong value, not a crash
    assert sim.peek(y)[0].item() != 2


def test_empty_cache_gives_memory_back(sim):
    x = torch.empty(8 * MIB, dtype=torch.uint8, device="sim")
    reserved = torch.accelerator.memory_reserved()
    del x
    assert torch.accelerator.memory_reserved() == reserved
    torch.accelerator.empty_cache()
    assert torch.accelerator.memory_reserved() <= reserved - 8 * MIB


def test_each_device_has_its_own_memory(sim):
    before = torch.accelerator.memory_allocated(1)
    x = torch.empty(MIB, dtype=torch.uint8, device="sim:1")
    assert torch.accelerator.memory_allocated(1) == before + MIB
    assert sim.memory_stats(1)["allocated_bytes.all.current"] == before + MIB
    del x
    assert torch.accelerator.memory_allocated(1) == before


def test_free_and_total_memory_are_told(sim):
    free, total = torch.sim.mem_get_info(0)
    x = torch.empty(64 * MIB, dtype=torch.uint8, device="sim")
    assert total == 4 << 30
    assert torch.sim.mem_get_info(0) == (free - 64 * MIB, total)
    assert torch.accelerator.get_memory_info(0) == (free - 64 * MIB, total)
    del x
    torch.accelerator.empty_cache()


def test_the_peak_is_remembered_until_it_is_reset(sim):
    torch.accelerator.reset_peak_memory_stats()
    before = torch.accelerator.memory_allocated()
    x = torch.empty(MIB, dtype=torch.uint8, device="sim")
    del x
    assert torch.accelerator.max_memory_allocated() == before + MIB
    torch.accelerator.reset_peak_memory_stats()
    assert torch.accelerator.max_memory_allocated() == before


@pytest.mark.parametrize("size", [-1, 1.5, None])
def test_a_capacity_that_is_no_size_is_an_error(sim, size):
    with pytest.raises(ArgumentValueError, match="set_memory_capacity"):
        sim.set_memory_capacity(size)


def test_peek_is_for_tensors_of_the_device(sim):
    with pytest.raises(ArgumentTypeError, match="expected a tensor on `sim`"):
        sim.peek(torch.ones(1))


def test_a_stream_of_another_device_can_be_recorded(sim):
    x = torch.ones(3, device="sim:0")
    x.record_stream(torch.Stream("sim:1"))
    assert x.sum().item() == 3


# --- Pinned memory -------------------------------------------------------------------------------


def test_pinned_memory_is_told_from_other_memory(sim):
    pinned = torch.ones(8).pin_memory()
    assert pinned.is_pinned()
    assert pinned[3:].is_pinned()
    assert not torch.ones(8).is_pinned()
    assert torch.empty(8, pin_memory=True).is_pinned()


def race(sim):
    """Free a pinned block while a copy from it is queued, and write to its next owner."""
    x = torch.empty(1000, device="sim")
    host = torch.full((1000,), 1.0).pin_memory()
    x.copy_(host, non_blocking=True)
    address = host.data_ptr()
    del host
    other = torch.empty(1000, pin_memory=True)
    other.fill_(2)
    return other.data_ptr() == address, x[0].item()


def test_a_pinned_block_is_reused_once_its_copy_has_run(sim):
    reused, value = race(sim)
    assert not reused
    assert value == 1


def test_early_reuse_of_a_pinned_block_spoils_the_copy(sim):
    with sim.pinned_reuse("early"):
        reused, value = race(sim)
    assert reused
    assert value == 2
    assert race(sim) == (False, 1)


def test_after_its_copy_a_pinned_block_is_reused(sim):
    x = torch.empty(1000, device="sim")
    host = torch.ones(1000).pin_memory()
    x.copy_(host, non_blocking=True)
    address = host.data_ptr()
    del host
    torch.accelerator.synchronize()
    assert torch.empty(1000, pin_memory=True).data_ptr() == address


@pytest.mark.parametrize("size", [1000, 16 * MIB])
def test_new_and_recycled_pinned_memory_holds_poison(sim, size):
    for _ in range(2):
        host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        assert host.eq(0xDD).all()
        host.fill_(1)
        del host


def test_a_missing_wait_for_a_copy_to_the_host_gives_a_wrong_value_every_time(sim):
    x = torch.full((4,), 3.0, device="sim")
    for _ in range(3):
        assert x.to("cpu", non_blocking=True).tolist() != [3] * 4
        torch.accelerator.synchronize()


def test_an_unknown_reuse_is_an_error(sim):
    with pytest.raises(ArgumentValueError, match='expected "safe" or "early"'):
        sim.set_pinned_reuse("late")
