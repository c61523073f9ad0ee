"""The one place where kernels are started."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch

from hwcore.kernels.triton.tuning import TUNED

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["launch", "power_of_two"]


def launch(
    kernel: Any, operation: str, grid: tuple[int, ...], *arguments: Any, **constants: Any
) -> None:
    """Run a kernel on the device of its first argument, on the current stream.

    Parameters
    ----------
    kernel : triton.JITFunction
    operation : str
        Whose tuned figures to use.
    grid : tuple of int
        Numbers of programs; where one is 0, nothing runs.
    """
    if 0 in grid:
        return
    with _device_of(arguments[0]):
        kernel[grid](*arguments, num_warps=TUNED[operation].num_warps, **constants)


def power_of_two(count: int) -> int:
    """Return the least power of two that is at least ``count``: what a block can hold."""
    return 1 << max(0, count - 1).bit_length()


def _device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make the tensor's device the current one, as torch does for its own operations."""
    if tensor.device.type == "cpu":  # Triton's interpreter
        return contextlib.nullcontext()
    module: Any = torch.get_device_module(tensor.device)
    guard: contextlib.AbstractContextManager[Any] = module.device(tensor.device)
    return guard
