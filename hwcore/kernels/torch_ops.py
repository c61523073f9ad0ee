"""The torch operations that the core's algorithms stand on, each run where the backend can."""

from __future__ import annotations

import contextlib
import logging
import re
import weakref
from collections import Counter
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch.utils._pytree import tree_map_only

from hwcore.errors import CapabilityError, CaptureError
from hwcore.graphs.tape import is_capturing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hwcore.backend import Backend

    Op: TypeAlias = Callable[..., Any]

__all__ = ["OPERATORS", "TORCH", "TorchOps", "explains_missing", "torch_ops"]

_log = logging.getLogger(__name__)

OPERATORS = (
    "amax",
    "amin",
    "any",
    "argmax",
    "cumsum",
    "gather",
    "index_copy_",
    "index_fill_",
    "index_select",
    "scatter_",
    "scatter_add_",
    "searchsorted",
    "softmax",
    "sort",
    "sum",
    "topk",
)
"""What a device may lack. Elementwise operations and copies are not here: without them it is none.

The hook is asked without the underscore of what works in place.
"""


class TorchOps:
    """Torch's functions by name; for what a device lacks, one that runs it on the CPU.

    Attributes
    ----------
    on_cpu : Counter of str
        Operations that the backend sends to the CPU, and how often each has run there. Every such
        run waits for the device.
    """

    amax: Op
    amin: Op
    any: Op
    argmax: Op
    cumsum: Op
    gather: Op
    index_copy_: Op
    index_fill_: Op
    index_select: Op
    scatter_: Op
    scatter_add_: Op
    searchsorted: Op
    softmax: Op
    sort: Op
    sum: Op
    topk: Op

    def __init__(self, backend: Backend | None = None) -> None:
        self.on_cpu: Counter[str] = Counter()
        probe = torch.zeros(1, device=None if backend is None else backend.device())
        for name in OPERATORS:
            function = getattr(torch, name, None) or getattr(torch.Tensor, name)
            asked = name.rstrip("_")
            if backend is not None and backend.needs_cpu_fallback(probe, asked):
                self.on_cpu[asked] = 0
                function = self._fallback(asked, function, backend.info.name)
            setattr(self, name, function)

    def _fallback(self, name: str, function: Op, backend: str) -> Op:
        _log.warning(
            "hwcore: backend `%s` has no `%s`: it runs on the CPU, and the host waits each time",
            backend,
            name,
        )

        def on_cpu(*args: Any, out: Any = None, **kwargs: Any) -> Any:
            if is_capturing():
                message = (
                    f"`{name}` runs on the CPU for backend `{backend}` (needs_cpu_fallback), which "
                    f"a graph cannot hold; expected an eager step. Do not capture it."
                )
                raise CaptureError(message)
            self.on_cpu[name] += 1
            here, there = args, next(a.device for a in args if isinstance(a, torch.Tensor))
            args, kwargs = tree_map_only(torch.Tensor, torch.Tensor.cpu, (args, kwargs))
            result = function(*args, **kwargs)
            if out is None and function.__name__.endswith("_"):
                out = here[0]
            if out is not None:
                return out.copy_(result)
            return tree_map_only(torch.Tensor, lambda tensor: tensor.to(there), result)

        return on_cpu


TORCH = TorchOps()
"""Torch's own, for a device that has them all."""

_bound: weakref.WeakKeyDictionary[Backend, TorchOps] = weakref.WeakKeyDictionary()


def torch_ops(backend: Backend) -> TorchOps:
    """Return the operations as the backend runs them; it is asked once for each."""
    found = _bound.get(backend)
    if found is None:
        ops = TorchOps(backend)
        found = _bound.setdefault(backend, ops if ops.on_cpu else TORCH)
    return found


@contextlib.contextmanager
def explains_missing(backend: Backend) -> Iterator[None]:
    """Turn torch's error for an operator that the device lacks into one that names the hook."""
    try:
        yield
    except NotImplementedError as error:
        operator = re.search(r"aten::(\w+)", str(error))
        if operator is None:
            raise
        name = operator[1].rstrip("_")
        message = (
            f"hwcore: backend `{backend.info.name}` has no `{name}`, and needs_cpu_fallback said "
            f"False of it; expected an operator that the device has. Return True from the "
            f"plugin's needs_cpu_fallback(tensor, {name!r}), or bring a kernel."
        )
        raise CapabilityError(message) from error
