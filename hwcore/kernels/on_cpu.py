"""A torch function run on the CPU with a device's tensors, as if it had run there."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["run_on_cpu"]


def run_on_cpu(
    function: Callable[..., Any],
    device: torch.device,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    in_place: bool,
) -> Any:
    """Call a torch function with copies on the host, and copy back what it makes or writes.

    Parameters
    ----------
    function : callable
    device : torch.device
        Where results go to.
    args, kwargs
        What it is called with; ``out`` may be a tensor or several.
    in_place : bool
        Whether it writes to its first argument.

    Returns
    -------
    What the function returns on the device: what was written is the very tensor that was passed.

    Notes
    -----
    Mutates: ``out``, or the first argument. Host sync: yes, with the current stream, which the
    copies run in. Graph-safe: no.
    """
    originals: dict[int, torch.Tensor] = {}  # by the id of what stands in for each on the host

    def stand_in(
        tensor: torch.Tensor, copy: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.cpu
    ) -> torch.Tensor:
        made = copy(tensor)
        originals[id(made)] = tensor
        return made

    named = {name: value for name, value in kwargs.items() if name != "out"}
    args, named = tree_map_only(torch.Tensor, stand_in, (args, named))
    written: Any = args[:1] if in_place else ()
    if kwargs.get("out") is not None:
        # Of the same size and dtype: torch resizes it, or refuses it, as it does on a device.
        empty = functools.partial(stand_in, copy=functools.partial(torch.empty_like, device="cpu"))
        named["out"] = written = tree_map_only(torch.Tensor, empty, kwargs["out"])
    result = function(*args, **named)
    for tensor in tree_leaves(written):
        original = originals[id(tensor)]
        if original.shape != tensor.shape:
            original.resize_(tensor.shape)
        original.copy_(tensor)

    def on_device(tensor: torch.Tensor) -> torch.Tensor:
        return originals[id(tensor)] if id(tensor) in originals else tensor.to(device)

    return tree_map_only(torch.Tensor, on_device, result)
