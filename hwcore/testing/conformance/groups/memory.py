"""Memory: how much there is, and that it is not handed out again while it is in use."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hwcore.testing.conformance.kit import conforms

if TYPE_CHECKING:
    from collections.abc import Callable

    from hwcore.testing.conformance.kit import Kit

_LARGE_BYTES = 32 << 20
_NONE = "Take None as the current device"


class Memory:
    @conforms("memory_info")
    def test_memory_in_use_is_not_free(self, kit: Kit) -> None:
        held = torch.ones(_LARGE_BYTES, dtype=torch.uint8, device=kit.device)
        kit.raw.settle()
        memory = kit.hw.memory_info(0)
        expected = f"total_bytes - free_bytes of at least the {_LARGE_BYTES} bytes that are held"
        fix = "Return the device's free and total memory, in this order, in bytes"
        used = memory.total_bytes - memory.free_bytes
        kit.that(used >= held.nbytes, "the answer", memory, expected, fix)

    @conforms("memory_info")
    def test_the_total_does_not_change(self, kit: Kit) -> None:
        before = kit.hw.memory_info(0).total_bytes
        held = torch.ones(_LARGE_BYTES, dtype=torch.uint8, device=kit.device)
        kit.raw.settle()
        after = kit.hw.memory_info(0).total_bytes
        fix = "Return the memory that the device has, not what is left of it"
        why = f"as before {held.nbytes} bytes were taken"
        kit.same("total_bytes", after, before, why, fix)

    @conforms("memory_info")
    def test_none_means_the_current_device(self, kit: Kit) -> None:
        for index, _ in enumerate(kit.each_device()):
            current, named = kit.hw.memory_info(), kit.hw.memory_info(index)
            why = f"device {index}'s, which is current"
            kit.same("total_bytes for None", current.total_bytes, named.total_bytes, why, _NONE)

    @conforms("memory_info", needs="multi_device")
    def test_none_means_the_memory_of_the_device_that_is_current(self, kit: Kit) -> None:
        for device in kit.each_device():
            taken = _taken(kit, device, None)
            expected = f"a fall by about {_LARGE_BYTES} bytes taken on {device}, the current one"
            kit.that(taken >= _LARGE_BYTES // 2, "free_bytes fell by", taken, expected, _NONE)

    @conforms("memory_info", needs="multi_device")
    def test_every_device_has_its_own_memory(self, kit: Kit) -> None:
        taken = _taken(kit, kit.hw.device(1), 1)
        expected = f"a fall by about the {_LARGE_BYTES} bytes taken on that device"
        fix = "Look at the device of the index"
        kit.that(taken >= _LARGE_BYTES // 2, "free_bytes fell by", taken, expected, fix)

    @conforms("record_stream")
    def test_recorded_memory_is_not_reused_before_the_stream_is_done(self, kit: Kit) -> None:
        _keep_from_reuse(kit, lambda tensor: tensor)

    @conforms("record_stream")
    def test_recording_a_view_keeps_all_the_memory_that_it_views(self, kit: Kit) -> None:
        _keep_from_reuse(kit, lambda tensor: tensor[1:])

    @conforms("record_stream")
    def test_recording_a_view_or_nothing_is_no_error(self, kit: Kit) -> None:
        stream = kit.stream()
        tensor = kit.tensor([[1.0, 2.0], [3.0, 4.0]])
        for part in (tensor[1:], tensor.t(), tensor[:0]):
            kit.hw.record_stream(part, stream)
        kit.hw.record_stream(tensor, kit.hw.current_stream())


def _taken(kit: Kit, device: torch.device, index: int | None) -> int:
    """Return by how much free memory falls, as asked for ``index``, when some is taken."""
    torch.ones(1, device=device)
    kit.raw.release_cached()
    before = kit.hw.memory_info(index).free_bytes
    held = torch.ones(_LARGE_BYTES, dtype=torch.uint8, device=device)
    kit.raw.settle()
    after = kit.hw.memory_info(index).free_bytes
    del held
    return before - after


def _keep_from_reuse(kit: Kit, recorded: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Free a tensor that a late stream reads, with a part of it recorded, and make others."""
    side, size = kit.stream(), 1 << 16
    owner = kit.hw.current_stream()
    handed_over = torch.full((size,), 5.0, device=kit.device)
    result = torch.zeros(size, device=kit.device)
    kit.raw.settle()
    with kit.raw.on(side):
        kit.raw.stall(side)
        result.copy_(handed_over)
    kit.hw.record_stream(recorded(handed_over), side)
    del handed_over
    # The same size on the same stream: an allocator that may reuse the block takes it now.
    reused = [torch.full((size,), -1.0, device=kit.device) for _ in range(4)]
    owner.synchronize()
    got = kit.raw.read(result, side)
    fix = "Keep the memory from reuse until the stream's work has finished"
    what = f"what the stream read of a tensor freed after it ({len(reused)} more were made)"
    kit.same(what, got, torch.full((size,), 5.0), "the tensor's value", fix)
