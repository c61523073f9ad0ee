"""Overlap: the core's hand-over between steps and its plan stream, on the device's own streams."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hwcore.errors import ConsumeOnceError
from hwcore.overlap import FutureMap, PlanStream, RelayPayload, RelaySpec
from hwcore.testing.conformance.kit import conforms

if TYPE_CHECKING:
    from hwcore.testing.conformance.kit import Kit

_SPEC = RelaySpec(pool_size=6, topk=2, hidden_size=5)
_TOPK_P, _HIDDEN = [[0.5, 0.25], [0.75, 0.125]], [[1.0, -2, 3, -4, 5], [6.0, 7, -8, 9, -10]]
_OPERATORS = "Bring a kernel for `gather_rows`, or the operators that the portable one needs"
_WAIT = "Make later work of the waiting stream wait"


class Overlap:
    @conforms("kernels")
    def test_a_row_comes_back_as_it_was_stashed(self, kit: Kit) -> None:
        batch = kit.tensor([4, 2], torch.int64)
        with FutureMap(_SPEC, backend=kit.hw, device=kit.device, debug=False) as relay:
            relay.stash(batch, _payload(kit))
            relay.publish(batch, kit.tensor([40, 20], torch.int64))
            got = relay.resolve(kit.tensor([2, 0, 4], torch.int64))
            lens = relay.resolve_seq_lens(batch)
            for name, value in (
                ("next_token", torch.tensor([8, 0, 7])),
                ("topk_index", torch.tensor([[3, 4], [0, 0], [1, 2]])),
                ("topk_p", torch.tensor([_TOPK_P[1], [0.0, 0], _TOPK_P[0]])),
                ("hidden_states", torch.tensor([_HIDDEN[1], [0.0] * 5, _HIDDEN[0]]).bfloat16()),
            ):
                read = kit.raw.read(getattr(got, name))
                kit.same(f"`{name}` of a FutureMap", read, value, "what was stashed", _OPERATORS)
            read = kit.raw.read(lens)
            kit.same("lengths", read, torch.tensor([40, 20]), "what was published", _OPERATORS)

    @conforms("kernels")
    def test_a_row_that_is_read_twice_is_found_on_the_device(self, kit: Kit) -> None:
        batch = kit.tensor([4, 2], torch.int64)
        relay = FutureMap(_SPEC, backend=kit.hw, device=kit.device, debug=True)
        relay.stash(batch, _payload(kit))
        relay.resolve(batch)
        relay.check()
        relay.resolve(kit.tensor([2], torch.int64))
        try:
            relay.close()
        except ConsumeOnceError as error:
            row, kind = error.row, error.kind
        else:
            row, kind = 0, "no error"
        why = "the row that was read twice"
        fix = "Bring a kernel for `assert_and_invalidate`, or correct it"
        kit.same("what debugging found", (row, kind), (2, "read twice"), why, fix)

    @conforms("wait_event")
    def test_a_step_resolves_what_another_stream_stashed(self, kit: Kit) -> None:
        batch, payload, forward = kit.tensor([4, 2], torch.int64), _payload(kit), kit.stream()
        with FutureMap(_SPEC, backend=kit.hw, device=kit.device, debug=False) as relay:
            with kit.hw.stream_context(forward):
                kit.raw.stall(forward)
                relay.stash(batch, payload)
            got = relay.resolve(batch).next_token
            read = kit.raw.read(got, kit.hw.current_stream(kit.device))
            why = "what the forward stream had stashed"
            kit.same("`next_token` of a FutureMap", read, torch.tensor([7, 8]), why, _WAIT)

    @conforms("wait_event")
    def test_the_host_reads_lengths_that_another_stream_published(self, kit: Kit) -> None:
        batch, lens, forward = kit.tensor([4, 2], torch.int64), kit.tensor([9, 5]), kit.stream()
        with FutureMap(_SPEC, backend=kit.hw, device=kit.device, debug=False) as relay:
            with kit.hw.stream_context(forward):
                kit.raw.stall(forward)
                relay.publish(batch, lens.to(torch.int64))
            read = relay.resolve_seq_lens(batch, to_cpu=True)
            why = "what the forward stream had published"
            kit.same("lengths on the host", read, torch.tensor([9, 5]), why, _WAIT)

    @conforms("wait_event")
    def test_a_plan_stream_gives_what_one_stream_gives(self, kit: Kit) -> None:
        drafted, fresh = kit.tensor([0.0, 0]), kit.tensor([3.0, 4])
        policy = kit.hw.plan_stream_policy()
        if not policy.enabled and not kit.lists("async_streams"):
            kit.skip("async_streams", policy.reason)
        plan = PlanStream(
            backend=kit.hw,
            device=kit.device,
            enabled=True,
            recompute=dict.fromkeys(policy.recompute_after_join, lambda outputs, _: outputs["x"]),
        )
        main = kit.hw.current_stream(kit.device)
        kit.raw.stall(main)
        drafted.copy_(fresh)
        with plan.block(drafted) as outputs:
            outputs["x"] = drafted * 2
        joined = plan.join().outputs["x"] + 1
        why = "computed from the draft"
        kit.same("a joined plan", kit.raw.read(joined, main), torch.tensor([7.0, 9.0]), why, _WAIT)


def _payload(kit: Kit) -> RelayPayload:
    return RelayPayload(
        next_token=kit.tensor([7, 8], torch.int64),
        topk_p=kit.tensor(_TOPK_P),
        topk_index=kit.tensor([[1, 2], [3, 4]], torch.int64),
        hidden_states=kit.tensor(_HIDDEN, torch.bfloat16),
    )
