"""Other processes' tensors: the name for torch.distributed, and the transfer engines."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hwcore.testing.conformance.kit import conforms

if TYPE_CHECKING:
    from hwcore.testing.conformance.kit import Kit

_HOST_ONLY = "gloo"
"""The one name on which the core stages tensors through the host by itself."""


class Distributed:
    @conforms("distributed_backend", patience=2)
    def test_a_group_of_one_reduces_a_tensor(self, kit: Kit) -> None:
        name = kit.hw.distributed_backend()
        fix = "Return the name that torch.distributed knows the device's communication library by"
        if not torch.distributed.is_available():
            kit.skip("torch.distributed", "this torch was built without it")
        known = torch.distributed.Backend.backend_list
        kit.that(name in known, "the answer", name, f"one of {', '.join(known)}", fix)
        if torch.distributed.is_initialized():
            kit.skip("torch.distributed", "this process is in a process group already")
        from torch.distributed import HashStore  # type: ignore[attr-defined] # not exported

        tensor = kit.tensor([3.0])
        if name == _HOST_ONLY:
            tensor = tensor.cpu()
        store = HashStore()
        torch.distributed.init_process_group(name, store=store, rank=0, world_size=1)
        try:
            torch.distributed.all_reduce(tensor)
            got = kit.raw.read(tensor)
        finally:
            torch.distributed.destroy_process_group()
        kit.same("a sum over one process", got, torch.tensor([3.0]), "its own value", fix)

    @conforms("transfer_engines")
    def test_every_engine_is_named_once(self, kit: Kit) -> None:
        engines = kit.hw.transfer_engines()
        named = [(engine.name, engine.protocol) for engine in engines]
        fix = "List each engine and protocol once, best first"
        kit.that(len(set(named)) == len(named), "the answer", named, "no pair twice", fix)

    @conforms("transfer_engines")
    def test_engines_on_device_memory_are_listed_as_a_capability(self, kit: Kit) -> None:
        direct = [engine.name for engine in kit.hw.transfer_engines() if engine.memory == "device"]
        listed = kit.lists("device_direct_transfer")
        if listed or direct:
            expected = "engines on device memory, and the capability `device_direct_transfer`"
            got = f"engines on device memory {direct}, capability {listed}"
            kit.that(listed and bool(direct), "the answer", got, expected, "Make the two agree")
