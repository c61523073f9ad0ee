"""CPU fallback: what the backend says about what the device cannot do, and whether it is true."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hwcore.testing.conformance.kit import conforms

if TYPE_CHECKING:
    from collections.abc import Callable

    from hwcore.testing.conformance.kit import Kit


def _order(x: torch.Tensor) -> torch.Tensor:
    return torch.tensor([[1, 0, 3, 2], [2, 3, 0, 1]], device=x.device)


OPERATORS: dict[str, Callable[[torch.Tensor], object]] = {
    "argmax": lambda x: x.argmax(-1),
    "cumsum": lambda x: x.cumsum(-1),
    "gather": lambda x: x.gather(-1, _order(x)),
    "index_select": lambda x: x.index_select(0, torch.tensor([1, 0], device=x.device)),
    "nonzero": lambda x: x.nonzero(),
    "scatter": lambda x: torch.zeros_like(x).scatter(-1, _order(x), x),
    "softmax": lambda x: x.softmax(-1),
    "sort": lambda x: x.sort(-1).values,
    "topk": lambda x: x.topk(2).values,
}
"""Operators that devices were seen to lack, by the names that the core asks for."""


class CpuFallback:
    @conforms("needs_cpu_fallback")
    def test_cpu_tensors_need_no_copy_to_the_cpu(self, kit: Kit) -> None:
        for purpose in ("serialize", "numpy", *OPERATORS):
            got = kit.hw.needs_cpu_fallback(torch.ones(2), purpose)
            what = f"for a CPU tensor and `{purpose}`"
            kit.that(got is False, what, got, "False", "Look at where the tensor is")

    @conforms("needs_cpu_fallback")
    def test_what_the_host_cannot_read_needs_a_copy(self, kit: Kit) -> None:
        tensor = kit.tensor([1.0, 2.0])
        try:
            tensor.numpy()
        except (TypeError, RuntimeError) as error:
            for purpose in ("serialize", "numpy"):
                got = kit.hw.needs_cpu_fallback(tensor, purpose)
                what = f"for a device tensor and `{purpose}`"
                expected = f"True, for numpy() says: {error}"
                kit.that(got is True, what, got, expected, "Say True for tensors on the device")

    @conforms("needs_cpu_fallback")
    def test_an_operator_that_needs_no_fallback_runs_on_the_device(self, kit: Kit) -> None:
        host = torch.tensor([[3.0, 1.0, 2.0, 0.5], [0.0, 5.0, 4.0, 1.5]])
        tensor = kit.tensor(host.tolist())
        for name, run in OPERATORS.items():
            if kit.hw.needs_cpu_fallback(tensor, name):
                continue
            fix = "Say True for an operator that the device lacks"
            try:
                got = run(tensor)
            except (RuntimeError, NotImplementedError, TypeError) as error:
                expected = f"True, for the operator says: {str(error).splitlines()[0]}"
                kit.fail(f"for `{name}`", False, expected, fix)
            assert isinstance(got, torch.Tensor)
            kit.same(f"`{name}` on the device", kit.raw.read(got), run(host), "as on the CPU", fix)

    @conforms("needs_cpu_fallback")
    def test_an_operator_that_nobody_knows_is_no_error(self, kit: Kit) -> None:
        got = kit.hw.needs_cpu_fallback(kit.tensor([1.0]), "no_such_operator")
        fix = "Return a bool for any name: later cores ask about others"
        kit.that(isinstance(got, bool), "for an unknown operator", got, "a bool", fix)
