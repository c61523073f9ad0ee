"""Identity and strings: who the backend says it is, and what it calls its devices."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hwcore.probing import probe
from hwcore.testing.conformance.kit import conforms

if TYPE_CHECKING:
    from hwcore.testing.conformance.kit import Kit

_MOST_DEVICES = 16


class Identity:
    @conforms("backend_info")
    def test_backend_info_is_the_same_every_time(self, kit: Kit) -> None:
        fix = "Let it look at nothing that changes"
        for _ in range(2):
            kit.same("a later answer", kit.hw.backend_info(), kit.hw.info, "the first answer", fix)

    @conforms("probe")
    def test_probe_says_that_the_device_which_runs_is_available(self, kit: Kit) -> None:
        answer = kit.hw.probe()
        fix = "Look at what this machine has; setup() was able to use it"
        kit.that(answer.ok, "on this machine", answer, "ok=True", fix)

    @conforms("probe")
    def test_probe_answers_in_a_process_without_torch(self, kit: Kit) -> None:
        origin = kit.hw.origin
        if not origin.location:
            kit.skip("installed plugin", "the backend was passed as an object")
        (result,) = probe([origin])
        answer = result.error or result.availability
        ok = result.availability is not None and result.availability.ok
        fix = "Look at files and metadata; import neither torch nor the vendor's library"
        kit.that(ok, "in a child process", answer, "Availability(ok=True)", fix)

    @conforms("device_string")
    def test_torch_takes_every_device_string(self, kit: Kit) -> None:
        indexed = not kit.has_quirk("unindexed_device")
        for index in range(min(kit.hw.device_count(), _MOST_DEVICES)):
            device = torch.device(kit.hw.device_string(index))
            fix = "Return the string that torch takes for that device"
            kit.same(
                f"the type for index {index}",
                device.type,
                kit.hw.info.device_type,
                "backend_info().device_type",
                fix,
            )
            expected = index if indexed else None
            why = "the index asked for" if indexed else "as the quirk `unindexed_device` says"
            kit.same(f"the index for index {index}", device.index, expected, why, fix)

    @conforms("device_string")
    def test_the_device_string_without_an_index_is_the_current_device(self, kit: Kit) -> None:
        for device in kit.each_device():
            got = torch.zeros(1, device=kit.hw.device_string()).device
            expected = torch.zeros(1, device=device).device
            fix = "Return the device type alone for None"
            kit.same("a tensor's device", got, expected, "the current device", fix)

    @conforms("device_count")
    def test_every_device_that_is_counted_holds_tensors(self, kit: Kit) -> None:
        count = kit.hw.device_count()
        for index in range(min(count, _MOST_DEVICES)):
            try:
                tensor = torch.ones(3, device=kit.hw.device_string(index))
                total = kit.raw.read(tensor).sum().item()
            except (RuntimeError, AssertionError) as error:
                expected = f"a count of usable devices; device {index} said: {error}"
                kit.fail("the answer", count, expected, "Count what this process can use")
            fix = "Count what this process can use"
            kit.same(f"the sum of three ones on device {index}", total, 3.0, "their sum", fix)

    @conforms("is_initialized")
    def test_a_device_in_use_counts_as_initialized_where_torch_says_so(self, kit: Kit) -> None:
        kit.tensor([1.0])
        answer = kit.hw.is_initialized()
        if kit.device.type == "cpu":
            return  # a fork breaks nothing, whatever torch calls it
        module = torch.get_device_module(kit.device.type)
        if getattr(module, "is_initialized", bool)():
            fix = "Say True once a tensor is on the device: a fork would break it"
            kit.that(answer, "with a tensor on the device", answer, "True, as torch says", fix)

    @conforms("device_count")
    def test_two_devices_are_listed_only_where_there_are_two(self, kit: Kit) -> None:
        if not kit.lists("multi_device"):
            kit.skip("multi_device")
        count = kit.hw.device_count()
        expected = "at least 2, since the capability `multi_device` is listed"
        fix = "Do not list it, or run on a machine with two"
        kit.that(count >= 2, "the answer", count, expected, fix)

    @conforms("set_device")
    def test_set_device_takes_the_first_device(self, kit: Kit) -> None:
        kit.hw.set_device(0)
        got = torch.zeros(1, device=kit.hw.info.device_type).device
        expected = torch.zeros(1, device=kit.device).device
        fix = "Set the current device of torch for the calling thread"
        kit.same("where a tensor went after it", got, expected, "the device that was set", fix)

    @conforms("set_device", needs="multi_device")
    def test_set_device_makes_the_device_current(self, kit: Kit) -> None:
        kit.hw.set_device(1)
        got = torch.zeros(1, device=kit.hw.info.device_type).device.index
        fix = "Set the current device of torch for the calling thread"
        kit.same("where a tensor went after it", got, 1, "the device that was set", fix)
        stream = kit.hw.current_stream()
        kit.same("the current stream's device", stream.device.index, 1, "likewise", fix)

    @conforms("set_device", needs="multi_device")
    def test_set_device_leaves_other_threads_alone(self, kit: Kit) -> None:
        kit.hw.set_device(0)
        kit.in_thread(lambda: kit.hw.set_device(1))
        got = torch.zeros(1, device=kit.hw.device_string()).device.index
        fix = "Set the device of the calling thread only"
        what = "this thread's device after another thread called it"
        kit.same(what, got, 0, "the device that this thread had set", fix)

    @conforms("backend_info", needs="float64")
    def test_float64_is_computed_where_it_is_listed(self, kit: Kit) -> None:
        third = kit.tensor([1.0], torch.float64) / 3
        fix = "Do not list `float64`, or compute in it"
        got = kit.raw.read(third).item()
        kit.same("a third in float64", got, 1 / 3, "since `float64` is listed", fix)

    @conforms("backend_info", needs="float8")
    def test_float8_converts_where_it_is_listed(self, kit: Kit) -> None:
        values = [0.0, 1.0, -2.5, 448.0]
        fix = "Do not list `float8`, or convert to and from it"
        stored = kit.tensor(values).to(torch.float8_e4m3fn)
        got = kit.raw.read(stored.to(torch.float32))
        kit.same("values through float8_e4m3fn", got, torch.tensor(values), "the values", fix)

    @conforms("backend_info", needs="triton")
    def test_a_triton_kernel_runs_where_triton_is_listed(self, kit: Kit) -> None:
        # Imported here: the module needs the compiler, and few machines have it.
        from hwcore.testing.conformance.triton_add import add

        a, b = kit.tensor([1.0, 2.0, 3.0]), kit.tensor([10.0, 20.0, 30.0])
        got = kit.raw.read(add(a, b))
        fix = "Do not list `triton`, or install its compiler for the device"
        kit.same("a sum by Triton", got, torch.tensor([11.0, 22.0, 33.0]), "the sum", fix)
