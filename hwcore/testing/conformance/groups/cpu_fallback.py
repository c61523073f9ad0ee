"""CPU fallback: what the backend says about what the device cannot do, and whether it is true."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hwcore.kernels.torch_ops import OPERATORS, TORCH, asked, torch_ops
from hwcore.testing.conformance.kit import conforms
from hwcore.testing.conformance.operations import leaves

if TYPE_CHECKING:
    from collections.abc import Callable

    from hwcore.kernels.torch_ops import TorchOps
    from hwcore.testing.conformance.kit import Kit


def _order(x: torch.Tensor) -> torch.Tensor:
    return torch.tensor([[1, 0, 3, 2], [2, 3, 0, 1]], device=x.device)


def _rows(x: torch.Tensor) -> torch.Tensor:
    return torch.tensor([1, 0], device=x.device)


_VALUES = [[3.0, 1.0, 2.0, 0.5], [0.0, 5.0, 4.0, 1.5]]

CALLS: dict[str, Callable[[TorchOps, torch.Tensor], object]] = {
    "amax": lambda ops, x: ops.amax(x, -1),
    "amin": lambda ops, x: ops.amin(x, -1),
    "any": lambda _, x: (x > 3).any(-1),
    "argmax": lambda _, x: x.argmax(-1),
    "cumsum": lambda ops, x: ops.cumsum(x, -1),
    "gather": lambda ops, x: ops.gather(x, -1, _order(x)),
    "index_copy": lambda ops, x: ops.index_copy_(torch.zeros_like(x), 0, _rows(x), x),
    "index_fill": lambda ops, x: ops.index_fill_(x.clone(), 0, _rows(x)[:1], -1.0),
    "index_select": lambda ops, x: ops.index_select(x, 0, _rows(x)),
    "nonzero": lambda _, x: x.nonzero(),
    "scatter": lambda ops, x: ops.scatter_(torch.zeros_like(x), -1, _order(x), x),
    "scatter_add": lambda ops, x: ops.scatter_add_(torch.zeros_like(x), -1, _order(x), x),
    "searchsorted": lambda ops, x: ops.searchsorted(x[1, :2].contiguous(), x),
    "softmax": lambda ops, x: ops.softmax(x, -1),
    "sort": lambda ops, x: ops.sort(x, -1),
    "sum": lambda ops, x: ops.sum(x, -1),
    "topk": lambda ops, x: ops.topk(x, 2),
}
"""Operators that devices were seen to lack, by the names that the core asks for."""


class CpuFallback:
    @conforms("needs_cpu_fallback")
    def test_cpu_tensors_need_no_copy_to_the_cpu(self, kit: Kit) -> None:
        for purpose in ("serialize", "numpy", *CALLS):
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
        host, tensor = torch.tensor(_VALUES), kit.tensor(_VALUES)
        for name, run in CALLS.items():
            if kit.hw.needs_cpu_fallback(tensor, name):
                continue
            fix = "Say True for an operator that the device lacks"
            try:
                got = run(TORCH, tensor)
            except (RuntimeError, NotImplementedError, TypeError) as error:
                expected = f"True, for the operator says: {str(error).splitlines()[0]}"
                kit.fail(f"for `{name}`", False, expected, fix)
            _compare(kit, f"`{name}` on the device", got, run(TORCH, host), fix)

    @conforms("needs_cpu_fallback")
    def test_an_operator_that_the_core_runs_on_the_cpu_gives_the_cpus_result(
        self, kit: Kit
    ) -> None:
        host, tensor = torch.tensor(_VALUES), kit.tensor(_VALUES)
        ops = torch_ops(kit.hw)
        for name in map(asked, OPERATORS):
            if not kit.hw.needs_cpu_fallback(tensor, name) or name not in CALLS:
                continue
            fix = "Say the same of an operator each time, and let tensors go to the host and back"
            before = ops.on_cpu[name]
            got = CALLS[name](ops, tensor)
            kit.that(ops.on_cpu[name] > before, f"for `{name}`, later", True, "as at first", fix)
            for _, leaf in leaves(got):
                where = leaf.device.type
                kit.same(f"`{name}`, device", where, kit.device.type, "the tensor's", fix)
            _compare(kit, f"`{name}` on the CPU", got, CALLS[name](TORCH, host), fix)

    @conforms("needs_cpu_fallback")
    def test_an_operator_that_nobody_knows_is_no_error(self, kit: Kit) -> None:
        got = kit.hw.needs_cpu_fallback(kit.tensor([1.0]), "no_such_operator")
        fix = "Return a bool for any name: later cores ask about others"
        kit.that(isinstance(got, bool), "for an unknown operator", got, "a bool", fix)


def _compare(kit: Kit, what: str, got: object, expected: object, fix: str) -> None:
    for (name, there), (_, here) in zip(leaves(got), leaves(expected), strict=True):
        kit.same(f"{what}, {name}", kit.raw.read(there), here, "as on the CPU", fix)
