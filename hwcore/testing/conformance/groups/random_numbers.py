"""Random numbers: that a seed decides them, on the host and on every device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hwcore.testing.conformance.kit import conforms

if TYPE_CHECKING:
    from hwcore.testing.conformance.kit import Kit

_SIZE = 16


class RandomNumbers:
    @conforms("generator")
    def test_a_seed_decides_what_a_generator_draws(self, kit: Kit) -> None:
        first, again, other = (_drawn(kit, seed) for seed in (1, 1, 2))
        fix = "Return a generator that manual_seed() of its own seeds"
        kit.same("a second draw with seed 1", again, first, "the first draw", fix)
        kit.that(not torch.equal(first, other), "a draw with seed 2", other, "other numbers", fix)

    @conforms("generator")
    def test_a_generator_is_for_its_device(self, kit: Kit) -> None:
        for index in kit.indices:
            generator = kit.hw.generator(index).manual_seed(1)
            device = kit.hw.device(index)
            fix = "Make it on device `index`"
            kit.same("attribute `device`", generator.device, device, "the device asked for", fix)
            drawn = torch.rand(_SIZE, generator=generator, device=device)
            expected = torch.zeros(1, device=device).device
            kit.same("a draw's device", drawn.device, expected, "the generator's", fix)

    @conforms("generator")
    def test_a_generator_is_for_the_current_device_where_none_is_given(self, kit: Kit) -> None:
        for device in kit.each_device():
            generator = kit.hw.generator()
            expected = torch.zeros(1, device=device).device
            fix = "Take None as the current device"
            got = torch.zeros(1, device=generator.device).device
            kit.same("attribute `device`", got, expected, "the current device", fix)
            torch.rand(_SIZE, generator=generator, device=device)

    @conforms("generator")
    def test_generators_are_independent(self, kit: Kit) -> None:
        one, two = (kit.hw.generator(0).manual_seed(1) for _ in range(2))
        torch.rand(_SIZE, generator=one, device=kit.device)
        second = torch.rand(_SIZE, generator=two, device=kit.device)
        first = _drawn(kit, 1)
        fix = "Return a new generator at each call"
        got = kit.raw.read(second)
        kit.same("a draw after one of another generator", got, first, "as if alone", fix)

    @conforms("generator")
    def test_a_generators_state_can_be_kept(self, kit: Kit) -> None:
        generator = kit.hw.generator(0).manual_seed(1)
        torch.rand(_SIZE, generator=generator, device=kit.device)
        state = generator.get_state()
        draws = []
        for _ in range(2):
            generator.set_state(state)
            drawn = torch.rand(_SIZE, generator=generator, device=kit.device)
            draws.append(kit.raw.read(drawn))
        fix = "Return a generator whose get_state() and set_state() work"
        kit.same("a draw from a state set again", draws[1], draws[0], "the same draw", fix)

    @conforms("manual_seed")
    def test_a_seed_decides_the_default_generators_of_all_devices(self, kit: Kit) -> None:
        devices = [torch.device("cpu")]
        devices += [kit.hw.device(index) for index in kit.indices]
        fix = "Seed the default generators of the host and of all devices"
        for device in devices:
            draws = []
            for seed in (1, 1, 2):
                kit.hw.manual_seed(seed)
                draws.append(kit.raw.read(torch.rand(_SIZE, device=device)))
            first, again, other = draws
            kit.same(f"a second draw on {device} with seed 1", again, first, "the first", fix)
            differs = not torch.equal(first, other)
            kit.that(differs, f"a draw on {device} with seed 2", other, "other numbers", fix)


def _drawn(kit: Kit, seed: int) -> torch.Tensor:
    generator = kit.hw.generator(0)
    generator.manual_seed(seed)
    return kit.raw.read(torch.rand(_SIZE, generator=generator, device=kit.device))
