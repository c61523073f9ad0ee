"""The conformance kit: what a backend must do for hwcore's core to run on it, as tests.

``hwcore conformance --backend NAME`` runs it and reports; a plugin's own suite runs it in a file of
about ten lines (docs/conformance.md):

>>> from hwcore.testing.conformance import ConformanceSuite
>>> class TestAcme(ConformanceSuite):
...     backend = "acme"

The names below are imported when they are first used, so that reading a report needs neither torch
nor pytest.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hwcore.testing.conformance.errors import ConformanceError, PytestMissingError
    from hwcore.testing.conformance.kit import Kit, conforms
    from hwcore.testing.conformance.operations import OPERATIONS, Operation
    from hwcore.testing.conformance.raw import RawAccess
    from hwcore.testing.conformance.report import Report
    from hwcore.testing.conformance.session import run
    from hwcore.testing.conformance.suite import ConformanceSuite

__all__ = [
    "OPERATIONS",
    "ConformanceError",
    "ConformanceSuite",
    "Kit",
    "Operation",
    "PytestMissingError",
    "RawAccess",
    "Report",
    "conforms",
    "run",
]

_HOMES = {
    "OPERATIONS": "operations",
    "ConformanceError": "errors",
    "ConformanceSuite": "suite",
    "Kit": "kit",
    "Operation": "operations",
    "PytestMissingError": "errors",
    "RawAccess": "raw",
    "Report": "report",
    "conforms": "kit",
    "run": "session",
}
_NEED_PYTEST = ("kit", "session", "suite")


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        message = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(message)
    home = _HOMES[name]
    if home in _NEED_PYTEST:
        from hwcore.testing.conformance.errors import require_pytest

        require_pytest()
    if home == "suite":
        import pytest

        # Without it a failing `assert` of the groups, which are no test files, would say nothing.
        pytest.register_assert_rewrite(f"{__name__}.groups")
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
