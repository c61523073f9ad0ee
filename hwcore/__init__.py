"""The hardware layer of LLM and diffusion serving, as plugins.

``hw = hwcore.current_backend()`` is the process's device; every hook of the contract is a method
of it. The names below are imported when they are first used: ``import hwcore`` imports no torch
and selects no backend.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hwcore._version import __version__

if TYPE_CHECKING:
    from hwcore.activation import current_backend, load_backend, use
    from hwcore.backend import Backend
    from hwcore.compilation import compile
    from hwcore.errors import HwcoreError
    from hwcore.hookspecs import API_VERSION, hookimpl

__all__ = [
    "API_VERSION",
    "Backend",
    "HwcoreError",
    "__version__",
    "compile",
    "current_backend",
    "hookimpl",
    "load_backend",
    "use",
]

_HOMES = {
    "API_VERSION": "hookspecs",
    "Backend": "backend",
    "HwcoreError": "errors",
    "compile": "compilation",
    "current_backend": "activation",
    "hookimpl": "hookspecs",
    "load_backend": "activation",
    "use": "activation",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        message = f"module 'hwcore' has no attribute {name!r}"
        raise AttributeError(message)
    value = getattr(importlib.import_module(f"hwcore.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
