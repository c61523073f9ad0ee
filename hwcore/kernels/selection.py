"""A device's own kernel where it has one, the portable reference elsewhere."""

from __future__ import annotations

import functools
import inspect
import weakref
from typing import TYPE_CHECKING, Any, TypeVar

from hwcore.kernels.torch_ops import TORCH, torch_ops

if TYPE_CHECKING:
    from collections.abc import Callable

    from hwcore.backend import Backend

__all__ = ["kernel"]

F = TypeVar("F", bound="Callable[..., Any]")

_chosen: weakref.WeakKeyDictionary[Backend, dict[str, Any]] = weakref.WeakKeyDictionary()


def kernel(backend: Backend, reference: F) -> F:
    """Return the backend's kernel of the reference's name, or the reference.

    A reference that takes ``ops`` is given the backend's :class:`TorchOps`. Chosen once for each
    backend and operation.
    """
    chosen = _chosen.setdefault(backend, {})
    name = reference.__name__
    if name not in chosen:
        own = backend.kernels().get(name)
        ops = torch_ops(backend)
        if own is None and ops is not TORCH and "ops" in inspect.signature(reference).parameters:
            own = functools.partial(reference, ops=ops)
        chosen[name] = own or reference
    found: F = chosen[name]
    return found
