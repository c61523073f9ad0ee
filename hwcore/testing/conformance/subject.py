"""From what the user names to a kit: the backend, its raw access, and how a child gets the same."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

from hwcore import _env, discovery
from hwcore.errors import ArgumentTypeError, ArgumentValueError, PluginLoadError, describe
from hwcore.probing import child_environment
from hwcore.testing.conformance.errors import SanitizerOnError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hwcore.backend import Backend
    from hwcore.testing.conformance.kit import Kit
    from hwcore.testing.conformance.raw import RawAccess

__all__ = ["RAW_GROUP", "environment", "find_raw", "open_kit"]

RAW_GROUP = "hwcore.conformance"
"""Entry points: the backend's name, and ``module:RawAccess`` of the same distribution."""


def environment() -> dict[str, str]:
    """Return the environment of a child process: this one's, with the race sanitizer off."""
    variables = child_environment()
    variables.pop(_env.SANITIZE, None)
    return variables


@contextlib.contextmanager
def open_kit(
    backend: str | Backend,
    raw: RawAccess | None = None,
    timeout_s: float = 30.0,
    loader: str | None = None,
    on_enter: Callable[[str], None] | None = None,
) -> Iterator[Kit]:
    """Load a backend if it is named, check what touches its device, and yield a kit for it.

    Raises
    ------
    SelectionError
        If no such backend is installed, or this machine cannot run it.
    PluginError
        If it breaks the contract while it is activated.
    SanitizerOnError
        If the race sanitizer is on: the kit orders and reads past the hooks on purpose.
    """
    if isinstance(backend, str):
        from hwcore.activation import load_backend

        loader = loader or f"hwcore.load_backend({backend!r})"
        backend = load_backend(backend)
    from hwcore.backend import Backend
    from hwcore.testing.conformance.kit import Kit

    if not isinstance(backend, Backend):
        fix = "Name an installed backend, or pass hwcore.Backend(plugin)"
        expected = "a backend's name or a Backend"
        raise ArgumentTypeError(describe("conformance", "`backend`", backend, expected, fix))
    _refuse_sanitizer()
    # Device hooks are checked at the first call of one; here, so that a wrong answer is one error
    # and not one in every test.
    backend.current_stream()
    kit = Kit(backend, raw or find_raw(backend.info.name), timeout_s, loader, on_enter)
    try:
        yield kit
    finally:
        kit.close()


def _refuse_sanitizer() -> None:
    sanitizer = sys.modules.get("hwcore.testing.sanitizer.sanitizer")
    if sanitizer is not None and sanitizer.active_tracker() is not None:
        message = (
            "conformance: the race sanitizer is on; expected it to be off, for the kit orders and "
            "reads past the hooks, which it would report. Leave it first, or unset "
            f"{_env.SANITIZE}."
        )
        raise SanitizerOnError(message)


def find_raw(name: str, value: str | None = None) -> RawAccess:
    """Return raw access for a backend: what ``value`` names, what is declared, or the default.

    Parameters
    ----------
    value : str, optional
        ``"module:object"``; a class is instantiated.

    Raises
    ------
    PluginLoadError
        If what is declared cannot be imported or created, or is no RawAccess.
    ArgumentValueError
        If ``value`` cannot, or is none: then the user is wrong, and not the plugin.
    """
    from hwcore.testing.conformance.raw import RawAccess

    expected = "an object of a class derived from hwcore.testing.conformance.RawAccess"
    if value is not None:
        return _named_raw(value, expected)
    declared = [entry for entry in discovery.declared(RAW_GROUP) if entry.name == name]
    if not declared:
        return RawAccess()
    origin = declared[0]
    raw = discovery.load(origin)
    if not isinstance(raw, RawAccess):
        what = f"entry point `{origin.value}`"
        raise PluginLoadError(
            describe(str(origin), what, raw, expected, "Derive it"), name, RAW_GROUP
        )
    return raw


def _named_raw(value: str, expected: str) -> RawAccess:
    from hwcore.testing.conformance.raw import RawAccess

    fix = "Name it as module:Class"
    try:
        raw = discovery.load(discovery.Origin("raw", value, "--raw", "", ""))
    except PluginLoadError as error:
        expected += f" ({error.__cause__!r})"
        raise ArgumentValueError(describe("conformance", "`raw`", value, expected, fix)) from error
    if not isinstance(raw, RawAccess):
        expected += f", not {raw!r}"
        raise ArgumentValueError(describe("conformance", "`raw`", value, expected, fix))
    return raw
