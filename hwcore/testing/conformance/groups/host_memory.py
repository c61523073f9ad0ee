"""Host memory: pinning, and the promises that the core builds on where they are made."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hwcore.testing.conformance.kit import conforms

if TYPE_CHECKING:
    from hwcore.testing.conformance.kit import Kit

_SIZE = 1 << 14


class HostMemory:
    @conforms("pin_memory")
    def test_pinning_keeps_the_values_on_the_cpu(self, kit: Kit) -> None:
        tensor = torch.arange(8.0).view(2, 4)
        pinned = kit.hw.pin_memory(tensor)
        fix = "Return a page-locked copy of the tensor"
        kit.same("the values", pinned, tensor, "those of the argument", fix)
        kit.same("the device", pinned.device.type, "cpu", "where host memory is", fix)

    @conforms("pin_memory")
    def test_a_tensor_of_any_form_can_be_pinned(self, kit: Kit) -> None:
        base = torch.arange(24.0).view(4, 6)
        for tensor in (torch.empty(0), base[:0], base.t(), base[:, ::2], base[0, 0]):
            pinned = kit.hw.pin_memory(tensor)
            form = f"for shape {list(tensor.shape)}, strides {list(tensor.stride())}"
            fix = "Take empty and non-contiguous tensors too"
            kit.same(f"the values {form}", pinned, tensor, "those of the argument", fix)

    @conforms("pin_memory", needs="pinned_memory")
    def test_pinning_copies_what_is_not_pinned(self, kit: Kit) -> None:
        tensor = torch.arange(8.0)
        pinned = kit.hw.pin_memory(tensor)
        tensor.fill_(-1.0)
        fix = "Return a copy: the core reuses the argument's memory"
        why = "what the argument held, though it was overwritten since"
        kit.same("the result", pinned, torch.arange(8.0), why, fix)

    @conforms("pin_memory", needs="pinned_memory")
    def test_pinned_memory_is_page_locked(self, kit: Kit) -> None:
        pinned = kit.hw.pin_memory(torch.arange(8.0))
        got = kit.raw.is_pinned(pinned)
        expected = "True, since `pinned_memory` is listed"
        kit.that(got, "is_pinned() of its result", got, expected, "Page-lock it, by torch's means")

    @conforms("pin_memory", needs="pinned_memory")
    def test_what_is_pinned_already_is_returned_itself(self, kit: Kit) -> None:
        pinned = kit.hw.pin_memory(torch.arange(8.0))
        again = kit.hw.pin_memory(pinned)
        fix = "Return a tensor that is page-locked already"
        kit.that(again is pinned, "of a pinned tensor", again, "the argument itself", fix)

    @conforms("pin_memory")
    def test_copies_both_ways_through_pinned_memory_keep_values(self, kit: Kit) -> None:
        sent = torch.arange(float(_SIZE))
        stream, back = kit.stream(), kit.hw.pin_memory(torch.zeros(_SIZE))
        source = kit.hw.pin_memory(sent)
        device = torch.zeros(_SIZE, device=kit.device)
        kit.raw.settle()
        with kit.raw.on(stream):
            device.copy_(source, non_blocking=True)
            device.mul_(2)
            back.copy_(device, non_blocking=True)
        kit.raw.settle()
        fix = "Return memory that the device can copy from and to"
        kit.same("what came back", back, sent * 2, "what was sent, doubled", fix)

    @conforms("host_memory_policy")
    def test_the_policy_agrees_with_the_capabilities(self, kit: Kit) -> None:
        policy = kit.hw.host_memory_policy()
        listed = kit.lists("pinned_memory")
        why = f"since `pinned_memory` is {'' if listed else 'not '}listed"
        if listed or policy.can_pin:
            kit.same("field `can_pin`", policy.can_pin, listed, why, "Make the two agree")

    @conforms("host_memory_policy")
    def test_pinned_memory_is_reused_only_after_its_copies_if_so_promised(self, kit: Kit) -> None:
        if not kit.hw.host_memory_policy().reuse_waits_for_copy:
            kit.skip("reuse_waits_for_copy", "host_memory_policy() does not promise it")
        stream = kit.stream()
        target = torch.zeros(_SIZE, device=kit.device)
        kit.raw.settle()
        source = kit.hw.pin_memory(torch.full((_SIZE,), 5.0))
        with kit.raw.on(stream):
            kit.raw.stall(stream)
            target.copy_(source, non_blocking=True)
        del source
        others = [kit.hw.pin_memory(torch.full((_SIZE,), -1.0)) for _ in range(4)]
        got = kit.raw.read(target, stream)
        what = f"a copy from pinned memory freed after it ({len(others)} more blocks were made)"
        fix = "Hand a block out again after the copies from it, or do not promise it"
        kit.same(
            what, got, torch.full((_SIZE,), 5.0), "since `reuse_waits_for_copy` is promised", fix
        )

    @conforms("host_memory_policy")
    def test_copies_are_ordered_with_kernels_if_so_promised(self, kit: Kit) -> None:
        if not kit.hw.host_memory_policy().copies_ordered_with_kernels:
            kit.skip("copies_ordered_with_kernels", "host_memory_policy() does not promise it")
        stream = kit.stream()
        source = kit.hw.pin_memory(torch.full((_SIZE,), 5.0))
        target = torch.zeros(_SIZE, device=kit.device)
        result = torch.zeros_like(target)
        kit.raw.settle()
        with kit.raw.on(stream):
            kit.raw.stall(stream)
            target.copy_(source, non_blocking=True)
            result.copy_(target * 2)
            target.fill_(-1.0)
        got = kit.raw.read(result, stream)
        fix = "Run copies in the order of the stream, or do not promise it"
        why = "since `copies_ordered_with_kernels` is promised"
        kit.same("what a kernel behind the copy read", got, torch.full((_SIZE,), 10.0), why, fix)

    @conforms("register_host_memory")
    def test_memory_stays_usable_through_its_registration(self, kit: Kit) -> None:
        buffer = bytearray(b"\x01" * 4096)
        registration = kit.hw.register_host_memory(memoryview(buffer))
        host = torch.frombuffer(buffer, dtype=torch.uint8)
        device = host.to(kit.device, non_blocking=True)
        kit.raw.settle()
        if registration is not None:
            registration.close()
        fix = "Leave what is in the buffer alone"
        expected = torch.ones(4096, dtype=torch.uint8)
        kit.same("a copy of the buffer", kit.raw.read(device), expected, "what it holds", fix)
        buffer[0] = 2
        kit.same("the buffer after close()", buffer[0], 2, "what the host wrote", fix)

    @conforms("register_host_memory", needs="host_registration")
    def test_registered_memory_is_page_locked(self, kit: Kit) -> None:
        buffer = bytearray(1 << 16)
        registration = kit.hw.register_host_memory(memoryview(buffer))
        expected = "a registration, since `host_registration` is listed"
        fix = "Page-lock the buffer, or do not list it"
        kit.that(registration is not None, "the answer", registration, expected, fix)
        assert registration is not None
        got = kit.raw.is_pinned(torch.frombuffer(buffer, dtype=torch.uint8))
        kit.that(got, "is_pinned() of a tensor over the buffer", got, "True", fix)
        registration.close()
        got = kit.raw.is_pinned(torch.frombuffer(buffer, dtype=torch.uint8))
        fix = "Let close() unlock the memory"
        kit.that(not got, "is_pinned() after close()", got, "False", fix)
