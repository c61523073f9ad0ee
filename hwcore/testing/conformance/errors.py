"""Errors of the conformance kit."""

from __future__ import annotations

import importlib.util

from hwcore.errors import ArgumentValueError, HwcoreError

__all__ = [
    "ConformanceError",
    "NothingSelectedError",
    "PytestMissingError",
    "SanitizerOnError",
    "require_pytest",
]


class ConformanceError(HwcoreError, AssertionError):
    """A backend does not do what the contract says.

    Attributes
    ----------
    hook : str
        The hook at fault, which the message begins with.
    """

    def __init__(self, message: str, hook: str = "") -> None:
        super().__init__(message)
        self.hook = hook


class PytestMissingError(HwcoreError, ImportError):
    """The kit's tests were asked for where pytest is not installed."""


class NothingSelectedError(ArgumentValueError):
    """An expression that chooses tests is malformed, or matches none."""


class SanitizerOnError(HwcoreError, RuntimeError):
    """The race sanitizer is on, which would report what the kit does past the hooks."""


def require_pytest() -> None:
    """Raise unless pytest can be imported.

    Raises
    ------
    PytestMissingError
        If it is not installed.
    """
    if importlib.util.find_spec("pytest") is None:
        message = (
            "hwcore.testing.conformance: its tests need pytest, which is not installed. "
            "Run `pip install 'hwcore[conformance]'`."
        )
        raise PytestMissingError(message)
