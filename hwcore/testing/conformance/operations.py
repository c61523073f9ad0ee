"""The core's operations that a device may bring a kernel for, with reference and inputs.

A kernel takes what the reference takes and returns what it returns. A new operation of the core is
one more entry here; a plugin's kernel under any other name would never be called.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from hwcore.kernels import (
    assert_and_invalidate,
    build_tree,
    commit_paths,
    gather_rows,
    move_kv,
    mrope_positions,
    verify_tree_greedy,
    verify_tree_sampling,
)
from hwcore.testing.conformance import inputs

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["OPERATIONS", "Operation", "leaves", "mapped"]


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation of the core.

    Attributes
    ----------
    name : str
        Its key in ``kernels()``.
    reference : callable
        The portable implementation, which runs on any device.
    inputs : callable
        From a generator and a batch size to positional and named arguments on the CPU: tensors,
        dataclasses of tensors, plain values. Values random, the batch size 0 allowed.
    tolerance : float
        Relative and absolute; 0: bit for bit.
    """

    name: str
    reference: Callable[..., Any]
    inputs: Callable[[torch.Generator, int], tuple[tuple[Any, ...], dict[str, Any]]]
    tolerance: float = 0.0


def leaves(result: Any, name: str = "result") -> list[tuple[str, Any]]:
    """Return the tensors and plain values of a result, with names."""
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        fields = dataclasses.fields(result)
        return [leaf for f in fields for leaf in leaves(getattr(result, f.name), f.name)]
    if isinstance(result, (list, tuple)):
        return [leaf for n, part in enumerate(result) for leaf in leaves(part, f"{name}[{n}]")]
    return [(name, result)]


def mapped(change: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """Return a value with every tensor in it changed; dataclasses are looked into."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)(mapped(change, part) for part in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: mapped(change, getattr(value, f.name)) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value


OPERATIONS: dict[str, Operation] = {
    operation.name: operation
    for operation in (
        Operation("build_tree", build_tree, inputs.tree_inputs),
        Operation("verify_tree_greedy", verify_tree_greedy, inputs.greedy_inputs),
        Operation("verify_tree_sampling", verify_tree_sampling, inputs.sampling_inputs),
        Operation("commit_paths", commit_paths, inputs.commit_inputs),
        Operation("move_kv", move_kv, inputs.move_inputs),
        Operation("mrope_positions", mrope_positions, inputs.mrope_inputs),
        Operation("gather_rows", gather_rows, inputs.gather_inputs),
        Operation("assert_and_invalidate", assert_and_invalidate, inputs.invalidate_inputs),
    )
}
"""Every operation that has a reference, by the name that ``kernels()`` uses for it."""
