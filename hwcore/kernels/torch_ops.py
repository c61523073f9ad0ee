"""The torch operations that the core's algorithms stand on, each run where the backend can."""

from __future__ import annotations

import functools
import logging
import os
import re
import threading
import traceback
import weakref
from collections import Counter
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch.utils._pytree import tree_leaves

from hwcore.errors import CapabilityError, CaptureError
from hwcore.graphs.tape import is_capturing
from hwcore.kernels.on_cpu import run_on_cpu

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType, TracebackType

    from hwcore.backend import Backend

    Op: TypeAlias = Callable[..., Any]

__all__ = [
    "KERNEL_MARK",
    "OPERATORS",
    "TORCH",
    "TorchOps",
    "asked",
    "explain_missing",
    "explains_missing",
    "torch_ops",
]

_log = logging.getLogger("hwcore")
_lock = threading.RLock()

KERNEL_MARK = "hwcore_kernel"
"""Attribute of an error that came out of a plugin's kernel."""

OPERATORS = (
    "amax",
    "amin",
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
"""What a device may lack. One whose name ends in ``_`` works in place, on its first argument.

Not here, for without them it is no device: elementwise operations, views, what makes tensors
(``zeros``, ``arange``, ``full``) and what copies them whole (``copy_``, ``clone``, ``cat``,
``repeat``, padding).
"""


class TorchOps:
    """Torch's functions by name; for what a device lacks, one that runs it on the CPU.

    Such a one takes and returns what torch's own does, ``out=`` included. The host waits for the
    current stream first, and copies back into it. Tensors that are not on the backend's device are
    left to torch.

    Parameters
    ----------
    backend : Backend, optional
        Whose word counts; none: torch's own functions throughout.

    Attributes
    ----------
    is_bound : bool
        Whether the backend has been asked. It is when its device is in use, or first comes by in a
        tensor: asking takes a tensor of the device, and making one would make a context.
    on_cpu : Counter of str
        By the names that the hook is asked by: what the backend sends to the CPU, and how often
        each has run there since. Every such run is a wait of the host.
    """

    amax: Op
    amin: Op
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
        self.is_bound = backend is None
        self.on_cpu: Counter[str] = Counter()
        # Weakly: a backend's operations are kept as long as the backend is.
        self._backend: Callable[[], Backend | None] = (
            weakref.ref(backend) if backend is not None else lambda: None
        )
        self._device_type = None if backend is None else backend.info.device_type
        for name in OPERATORS:
            first = functools.partial(self._first_call, name)
            setattr(self, name, _torch(name) if self.is_bound else first)

    def bind(self) -> None:
        """Ask the backend for each operation, once, whichever thread comes first."""
        with _lock:
            if self.is_bound:
                return
            lacking = _lacking(self._backend())
            self.on_cpu.update(dict.fromkeys(lacking, 0))
            for name in OPERATORS:
                on_cpu = functools.partial(self._run_on_cpu, name)
                setattr(self, name, on_cpu if asked(name) in lacking else _torch(name))
            self.is_bound = True

    def _first_call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        if self._device_of(args, kwargs) is None:
            return _torch(name)(*args, **kwargs)
        self.bind()
        return getattr(self, name)(*args, **kwargs)

    def _run_on_cpu(self, name: str, *args: Any, **kwargs: Any) -> Any:
        device = self._device_of(args, kwargs)
        if device is None:
            return _torch(name)(*args, **kwargs)
        self._enter(asked(name))
        return run_on_cpu(_torch(name), device, args, kwargs, in_place=name.endswith("_"))

    def _enter(self, operator: str) -> None:
        """Count a run on the CPU, and log the first; refuse it where a graph is captured."""
        backend = self._backend()
        name = backend.info.name if backend is not None else self._device_type
        if is_capturing() or (backend is not None and backend.is_capturing()):
            message = (
                f"hwcore: `{operator}` runs on the CPU for backend `{name}` (needs_cpu_fallback), "
                f"which a graph cannot hold; expected an eager step. Run it outside the capture."
            )
            raise CaptureError(message)
        with _lock:
            self.on_cpu[operator] += 1
            first = self.on_cpu[operator] == 1
        if first:
            _log.warning(
                "hwcore: backend `%s` has no `%s` (needs_cpu_fallback): it runs on the CPU, and "
                "the host waits for the device each time",
                name,
                operator,
            )

    def _device_of(self, args: Any, kwargs: Any) -> torch.device | None:
        """Return where the first tensor is that is on a device of the backend."""
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == self._device_type:
                return leaf.device
        return None


def _lacking(backend: Backend | None) -> list[str]:
    """Ask a backend which operators are to run on the CPU."""
    if backend is None:  # gone, and its operations were held
        return []
    probe = torch.empty(1, device=backend.device())
    names = dict.fromkeys(map(asked, OPERATORS))
    return [name for name in names if backend.needs_cpu_fallback(probe, name)]


def asked(name: str) -> str:
    """Return the name by which the hook is asked for an operation, in place or not."""
    return name.rstrip("_")


def _torch(name: str) -> Op:
    """Return torch's own: what works in place is a method only."""
    found: Op = getattr(torch, name, None) or getattr(torch.Tensor, name)
    return found


TORCH = TorchOps()
"""Torch's own, for a device that has them all."""

_ops: weakref.WeakKeyDictionary[Backend, TorchOps] = weakref.WeakKeyDictionary()


def torch_ops(backend: Backend) -> TorchOps:
    """Return the operations as the backend runs them; there is one such object for each backend."""
    ops = _ops.get(backend)
    if ops is None:
        with _lock:
            ops = _ops.setdefault(backend, TorchOps(backend))
    if not ops.is_bound and (backend.info.device_type == "cpu" or backend.is_initialized()):
        ops.bind()
    return ops


# How torch's messages begin that say so: of the dispatcher, of one device's own, of meta tensors.
_OPERATOR = re.compile(r"(?:^|Could not run '|[Oo]perator ')(aten::(\w+)[\w.]*)")
_TORCH_FILES = os.path.join(os.path.dirname(torch.__file__), "")


class explains_missing:
    """Turn torch's error for an operator that the device lacks into one that names the hook.

    A context manager, which may be entered again and again. What a plugin's own kernel raises is
    left as it is: the hook would not help it.

    Parameters
    ----------
    backend : Backend

    Raises
    ------
    CapabilityError
        Instead of the error of torch, which becomes its cause.
    """

    __slots__ = ("_backend",)

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        if isinstance(error, NotImplementedError):
            explain_missing(self._backend, error)


def explain_missing(backend: Backend, error: NotImplementedError) -> None:
    """Raise the error that names the hook, if this one is torch's for an operator that is missing.

    For ``except NotImplementedError`` where :class:`explains_missing` would cost a hot path time;
    ``raise`` follows it.
    """
    found = _OPERATOR.search(str(error))
    if found is None or not _is_ours(error):
        return
    # torch names what an operation is made of at last: `_softmax`, `_index_put_impl_`.
    name = found[2].strip("_").removesuffix("_impl")
    where = f"hwcore: backend `{backend.info.name}` has no `{name}` ({found[1]})"
    expected = "expected an operator that the device has"
    if name in map(asked, OPERATORS) and name not in torch_ops(backend).on_cpu:
        message = (
            f"{where}, and needs_cpu_fallback said False of it; {expected}. Return True from the "
            f"plugin's needs_cpu_fallback(tensor, {name!r}), or bring a kernel for what calls it."
        )
    else:
        message = (
            f"{where}, which the core takes every device to have, and calls without asking "
            f"needs_cpu_fallback; {expected}. Bring it, or a kernel for what calls it."
        )
    raise CapabilityError(message) from error


def _is_ours(error: NotImplementedError) -> bool:
    """Say whether whoever explains the error called torch, or the core did; no plugin or user."""
    if hasattr(error, KERNEL_MARK):
        return False
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    callers = [it for it in frames if not it.f_code.co_filename.startswith(_TORCH_FILES)]
    return callers[-1:] == frames[:1] or _module_of(callers[-1]).startswith("hwcore.")


def _module_of(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _after_fork() -> None:
    global _lock
    _lock = threading.RLock()  # its holder, if any, is not in this process


os.register_at_fork(after_in_child=_after_fork)
