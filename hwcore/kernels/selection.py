"""A device's own kernel where it has one, the portable reference elsewhere."""

from __future__ import annotations

import functools
import inspect
import weakref
from typing import TYPE_CHECKING, Any, TypeVar

from hwcore.errors import ArgumentTypeError, describe
from hwcore.kernels.torch_ops import KERNEL_MARK, torch_ops

if TYPE_CHECKING:
    from collections.abc import Callable

    from hwcore.backend import Backend

__all__ = ["kernel", "references"]

F = TypeVar("F", bound="Callable[..., Any]")

_chosen: weakref.WeakKeyDictionary[Backend, dict[str, Any]] = weakref.WeakKeyDictionary()


def kernel(backend: Backend, reference: F) -> F:
    """Return the backend's kernel of the reference's name, or the reference.

    A reference that takes ``ops`` is given the backend's :class:`TorchOps`, unless those are all
    torch's own. Chosen once for each backend and operation.
    """
    name = reference.__name__
    try:
        chosen = _chosen.setdefault(backend, {})
    except TypeError:  # a name, say, or a number
        fix = "Pass load_backend(name), or leave it out"
        raise ArgumentTypeError(describe(name, "backend", backend, "a Backend", fix)) from None
    if name in chosen:
        known: F = chosen[name]
        return known
    found: Any = reference
    own = backend.kernels().get(name)
    ops = torch_ops(backend)
    if own is not None:
        found = _marked(name, own)
    elif (ops.on_cpu or not ops.is_bound) and "ops" in inspect.signature(reference).parameters:
        found = functools.partial(reference, ops=ops)
    if own is not None or ops.is_bound:  # else the device is not in use yet: decided when it is
        found = chosen.setdefault(name, found)  # of threads that come at once the first decides
    decided: F = found
    return decided


def references() -> dict[str, Callable[..., Any]]:
    """Return the portable references by the names that ``kernels()`` uses for them."""
    import hwcore.kernels as package

    helpers = (__name__, torch_ops.__module__)  # what is no operation
    return {
        name: value
        for name, value in sorted(vars(package).items())
        if inspect.isfunction(value) and value.__module__ not in helpers
    }


def _marked(name: str, own: F) -> F:
    """Return a kernel whose errors tell that they are its own, for explains_missing."""

    @functools.wraps(own)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return own(*args, **kwargs)
        except NotImplementedError as error:
            setattr(error, KERNEL_MARK, name)
            raise

    return run  # type: ignore[return-value] # the same signature, by functools.wraps
