"""Kernels against the portable reference, and the reference on the device against the CPU."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

import torch

from hwcore.kernels import kernel
from hwcore.testing.conformance.kit import conforms
from hwcore.testing.conformance.operations import OPERATIONS, leaves, mapped

if TYPE_CHECKING:
    from collections.abc import Callable

    from hwcore.testing.conformance.kit import Kit
    from hwcore.testing.conformance.operations import Operation


class Kernels:
    @conforms("kernels")
    def test_every_kernel_is_for_an_operation_of_the_core(self, kit: Kit) -> None:
        for name in kit.hw.kernels():
            near = difflib.get_close_matches(name, OPERATIONS, n=1)
            fix = f"Rename it to `{near[0]}`" if near else "Remove it: the core would never call it"
            expected = f"one of {', '.join(sorted(OPERATIONS))}"
            kit.that(name in OPERATIONS, "a name", name, expected, fix)

    @conforms("kernels")
    def test_kernels_agree_with_the_reference_on_random_inputs(self, kit: Kit) -> None:
        _compare_kernels(kit, "random")

    @conforms("kernels")
    def test_kernels_take_an_empty_batch(self, kit: Kit) -> None:
        _compare_kernels(kit, "empty batch")

    @conforms("kernels")
    def test_kernels_take_non_contiguous_inputs(self, kit: Kit) -> None:
        _compare_kernels(kit, "non-contiguous")

    @conforms("kernels")
    def test_where_there_is_no_kernel_the_reference_runs_on_the_device(self, kit: Kit) -> None:
        _compare_references(kit, "random")

    @conforms("kernels")
    def test_where_there_is_no_kernel_the_reference_takes_an_empty_batch(self, kit: Kit) -> None:
        _compare_references(kit, "empty batch")


def _compare_kernels(kit: Kit, kind: str) -> None:
    for name, own in kit.hw.kernels().items():
        if name in OPERATIONS:
            fix = "Let it take what the reference takes, and return what it returns"
            _compare(kit, OPERATIONS[name], own, kind, fix)


def _compare_references(kit: Kit, kind: str) -> None:
    for operation in OPERATIONS.values():
        if operation.name not in kit.hw.kernels():
            fix = "Bring a kernel of that name, or the operators that the reference needs"
            # What the device lacks, and says so, runs on the CPU.
            _compare(kit, operation, kernel(kit.hw, operation.reference), kind, fix)


def _compare(
    kit: Kit, operation: Operation, function: Callable[..., Any], kind: str, fix: str
) -> None:
    """Fail unless ``function`` on the device gives what the reference gives on the CPU."""
    for seed in range(1 if kind == "empty batch" else 3):
        generator = torch.Generator().manual_seed(seed)
        arguments, named = operation.inputs(generator, 0 if kind == "empty batch" else 3)
        if kind == "non-contiguous":
            arguments = mapped(_spread, arguments)
        expected = leaves(operation.reference(*arguments, **named))
        on_device = _moved(arguments, kit.device)
        try:
            got = leaves(function(*on_device, **named))
        except Exception as error:  # noqa: BLE001 - any is the kernel's fault
            raised = f"{type(error).__name__}: {error}"
            kit.fail(f"`{operation.name}`, {kind}", raised, "a result", fix)
        names = [name for name, _ in got]
        expected_names = [name for name, _ in expected]
        kit.same(f"`{operation.name}`, fields", names, expected_names, "the reference's", fix)
        for (name, value), (_, want) in zip(got, expected, strict=True):
            what = f"`{operation.name}`, {kind}, {name}"
            if isinstance(value, torch.Tensor):
                where = value.device.type
                kit.same(f"{what}, device", where, kit.device.type, "the inputs'", fix)
                value = kit.raw.read(value)
            if operation.tolerance and isinstance(want, torch.Tensor):
                close = value.dtype == want.dtype and torch.allclose(
                    value, want, rtol=operation.tolerance, atol=operation.tolerance
                )
                kit.that(close, what, value, f"{want}, within {operation.tolerance}", fix)
            else:
                kit.same(what, value, want, "the reference's result", fix)


def _moved(arguments: Any, device: torch.device) -> Any:
    """Return arguments on a device, strides kept."""

    def move(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_contiguous():
            return tensor.to(device)
        return _spread(tensor.contiguous().to(device))

    return mapped(move, arguments)


def _spread(tensor: torch.Tensor) -> torch.Tensor:
    """Return the same values as a view of every second element of something larger."""
    wide = tensor.unsqueeze(-1).repeat(*[1] * tensor.dim(), 2)
    return wide[..., 0]
