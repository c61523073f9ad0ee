"""``hwcore.compile``: torch.compile under the backend's compile policy.

The module is not called ``compile``, since importing a submodule of that name would put the module
where ``hwcore.compile``, the function, belongs.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from typing import TYPE_CHECKING, Any, TypeVar, overload

from hwcore.errors import ArgumentTypeError, describe
from hwcore.types import CompileRequest
from hwcore.validation import Validator

if TYPE_CHECKING:
    from collections.abc import Callable

    from hwcore.backend import Backend

__all__ = ["compile"]

_log = logging.getLogger("hwcore")
_F = TypeVar("_F", bound="Callable[..., Any]")


@overload
def compile(model: _F, /) -> _F: ...
@overload
def compile(
    model: _F,
    /,
    *,
    dynamic: bool | None = ...,
    fullgraph: bool = ...,
    mode: str | None = ...,
    disable: bool = ...,
    backend: Backend | None = ...,
) -> _F: ...
@overload
def compile(
    *,
    dynamic: bool | None = ...,
    fullgraph: bool = ...,
    mode: str | None = ...,
    disable: bool = ...,
    backend: Backend | None = ...,
) -> Callable[[_F], _F]: ...
def compile(
    model: Callable[..., Any] | None = None,
    /,
    *,
    dynamic: bool | None = None,
    fullgraph: bool = False,
    mode: str | None = None,
    disable: bool = False,
    backend: Backend | None = None,
) -> Any:
    """Compile a function or module if the backend's compile policy says so.

    Usable as a decorator, with and without arguments. For a function or method the policy is
    asked at the first call, so that decorating selects no backend; a module is resolved at once
    and comes back as itself or compiled. Where the policy says no, the plain function runs, and
    the reason is logged once a backend.

    Parameters
    ----------
    model : callable or torch.nn.Module
        What to compile; left out when used as a decorator with arguments.
    dynamic, fullgraph, mode
        As for :func:`torch.compile`; the policy's own ``dynamic`` and ``mode`` win where it
        gives any.
    disable : bool
        True: return ``model`` unchanged, without asking.
    backend : Backend, optional
        Whose policy to ask; default the process's backend. The compiler is the policy's choice.

    Returns
    -------
    callable
        Of the same kind as ``model``; without ``model``, a decorator.

    Raises
    ------
    ArgumentTypeError
        If ``model`` is not a function or module instance, or an option has the wrong type.

    Notes
    -----
    Overhead of a disabled function: one Python call. Host sync: no.
    """
    _check_options(dynamic, fullgraph, mode, disable, backend)
    options: dict[str, Any] = {"dynamic": dynamic, "fullgraph": fullgraph, "mode": mode}
    if model is None:
        return functools.partial(_compile, options=options, disable=disable, backend=backend)
    return _compile(model, options=options, disable=disable, backend=backend)


def _compile(
    model: Callable[..., Any], *, options: dict[str, Any], disable: bool, backend: Backend | None
) -> Any:
    _check_model(model)
    if disable:
        return model
    if _is_module(model):
        return _resolve(model, options, backend)

    target: Callable[..., Any]

    def first_call(*args: Any, **kwargs: Any) -> Any:
        # No lock: selecting the backend takes one, and its setup() may call this very function.
        resolved = _resolve(model, options, backend)
        nonlocal target
        # Of threads that come at once the first decides, so that all run one compiled function.
        target = decided.setdefault("target", resolved)  # atomic
        return target(*args, **kwargs)

    decided: dict[str, Callable[..., Any]] = {}
    target = first_call

    # Nothing but the call: this is what a disabled function costs, every time.
    @functools.wraps(model)
    def call(*args: Any, **kwargs: Any) -> Any:
        return target(*args, **kwargs)

    return call


def _resolve(
    model: Callable[..., Any], options: dict[str, Any], backend: Backend | None
) -> Callable[..., Any]:
    """Ask the policy; return the model itself, or compiled."""
    from hwcore.activation import current_backend

    backend = backend or current_backend()
    name = getattr(model, "__qualname__", type(model).__qualname__)
    answer = backend.compile_policy(CompileRequest(name, **options))
    policy = Validator(backend.origin, {}).compile_policy(answer)
    if not policy.enabled:
        _log_once(backend.info.name, policy.reason)
        return model
    import torch

    compiled: Callable[..., Any] = torch.compile(
        model,
        backend=policy.backend,
        fullgraph=options["fullgraph"],
        dynamic=options["dynamic"] if policy.dynamic is None else policy.dynamic,
        mode=policy.mode or options["mode"],
    )
    return compiled


@functools.cache
def _log_once(backend: str, reason: str) -> None:
    _log.warning(
        "torch.compile is off on backend %s: %s. Functions run as written.", backend, reason
    )


def _is_module(model: object) -> bool:
    torch = sys.modules.get("torch")  # without it there is no module to be had
    return torch is not None and isinstance(model, torch.nn.Module)


def _check_model(model: object) -> None:
    # A staticmethod object is callable, but what replaced it in its class would get a `self`.
    if callable(model) and not inspect.isclass(model) and not isinstance(model, staticmethod):
        return
    fix = "Decorate the function itself (below @staticmethod or @classmethod), or pass an instance"
    expected = "a function, method or torch.nn.Module instance"
    raise ArgumentTypeError(describe("hwcore.compile", "`model`", model, expected, fix))


def _check_options(
    dynamic: object, fullgraph: object, mode: object, disable: object, backend: object
) -> None:
    from hwcore.backend import Backend

    for name, value, kinds, expected in (
        ("dynamic", dynamic, (bool, type(None)), "True, False or None"),
        ("fullgraph", fullgraph, bool, "True or False"),
        ("mode", mode, (str, type(None)), "a mode of torch.compile, or None"),
        ("disable", disable, bool, "True or False"),
        ("backend", backend, (Backend, type(None)), "a hwcore Backend, or None"),
    ):
        if not isinstance(value, kinds):
            fix = f"Pass {expected}"
            if name == "backend":
                fix = "Pass hwcore.load_backend(name); the compiler is the compile policy's choice"
            where = describe("hwcore.compile", f"`{name}`", value, expected, fix)
            raise ArgumentTypeError(where)
