"""A device's own kernel where it has one, the portable reference elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

    from hwcore.backend import Backend

__all__ = ["kernel"]

F = TypeVar("F", bound="Callable[..., Any]")


def kernel(backend: Backend, reference: F) -> F:
    """Return the backend's kernel of the reference's name, or the reference.

    Called when an object is made, not per step.
    """
    chosen: F = backend.kernels().get(reference.__name__, reference)  # type: ignore[assignment]
    return chosen
