"""The environment variables that hwcore reads, in one place."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from hwcore.errors import ArgumentValueError, describe

BACKEND = "HWCORE_BACKEND"
DISABLE_PLUGINS = "HWCORE_DISABLE_PLUGINS"
DEBUG = "HWCORE_DEBUG"
SANITIZE = "HWCORE_SANITIZE"
PLAN_STREAM = "HWCORE_PLAN_STREAM"
CAPTURE_BUDGET = "HWCORE_CAPTURE_BUDGET"
CACHE = "HWCORE_CACHE"
TOKEN_FD = "HWCORE_TOKEN_FD"
TOKEN_FILE = "HWCORE_TOKEN_FILE"
AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"

MEANINGS = {
    BACKEND: "the backend to select; empty: automatic",
    DISABLE_PLUGINS: "plugins or distributions to leave out, separated by commas",
    DEBUG: "1: debug checks on",
    SANITIZE: "1 or raise, warn, collect: race sanitizer on, and what it does at a race",
    PLAN_STREAM: "1 or 0: steps are prepared on a side stream, or not; empty: as the device says",
    CAPTURE_BUDGET: "how many graphs the process may hold; empty: the backend's default",
    CACHE: "where measured costs of draft trees are kept; empty: ~/.cache/hwcore",
    TOKEN_FD: "inherited descriptor that holds the launch token of transfer engines",
    TOKEN_FILE: "file of mode 0600 that holds the launch token of transfer engines",
    AUTOLOAD: "torch's own; 0: import torch loads no device extension",
}


def cache_folder() -> Path:
    """Return where files are kept that can be made again: ``HWCORE_CACHE``, else in the home."""
    return Path(os.environ.get(CACHE) or Path.home() / ".cache" / "hwcore")


def requested_backend() -> str | None:
    """Return the backend named by the environment, or None where it is unset or blank."""
    return os.environ.get(BACKEND, "").strip() or None


def disabled_plugins() -> tuple[str, ...]:
    """Return the names in ``HWCORE_DISABLE_PLUGINS``, without blanks and repeats."""
    names = os.environ.get(DISABLE_PLUGINS, "").split(",")
    return tuple(dict.fromkeys(name.strip() for name in names if name.strip()))


_NO = ("0", "false", "no", "off")
_YES = ("1", "true", "yes", "on")


def debug_enabled() -> bool:
    """Say whether ``HWCORE_DEBUG`` is on: set to anything but 0, false, no or off."""
    return os.environ.get(DEBUG, "").strip().lower() not in ("", *_NO)


def plan_stream() -> bool | None:
    """Return what ``HWCORE_PLAN_STREAM`` says, or None where it is unset or blank.

    Raises
    ------
    ArgumentValueError
        If the value has no meaning: a misspelt one would be a switch that does nothing.
    """
    value = os.environ.get(PLAN_STREAM, "").strip().lower()
    if value in ("", *_NO, *_YES):
        return None if not value else value in _YES
    expected = "1 for on, 0 for off, or nothing"
    raise ArgumentValueError(
        describe("hwcore", f"the variable {PLAN_STREAM}", value, expected, "Set it to one of these")
    )


def sanitize() -> Literal["raise", "warn", "collect"] | None:
    """Return what ``HWCORE_SANITIZE`` asks for at a race, or None where it is off.

    Raises
    ------
    ArgumentValueError
        If the value has no meaning: a misspelt one would be a sanitizer that is silently off.
    """
    value = os.environ.get(SANITIZE, "").strip().lower()
    if value in ("", *_NO):
        return None
    if value in (*_YES, "raise"):
        return "raise"
    if value == "warn":
        return "warn"
    if value == "collect":
        return "collect"
    expected = "1, raise, warn, collect, or 0 for off"
    raise ArgumentValueError(
        describe("hwcore", f"the variable {SANITIZE}", value, expected, "Set it to one of these")
    )


def capture_budget() -> int | None:
    """Return the number of graphs in ``HWCORE_CAPTURE_BUDGET``, or None where it is unset.

    Raises
    ------
    ArgumentValueError
        If the value is no number ≥ 0.
    """
    value = os.environ.get(CAPTURE_BUDGET, "").strip()
    if not value:
        return None
    if value.isascii() and value.isdigit():
        return int(value)
    expected, fix = "a number of graphs ≥ 0", "Set it to one, or unset it"
    raise ArgumentValueError(
        describe("hwcore", f"the variable {CAPTURE_BUDGET}", value, expected, fix)
    )
