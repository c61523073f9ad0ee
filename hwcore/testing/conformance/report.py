"""What a conformance run found, as data. ``--json`` writes it; docs/conformance.md explains it."""

from __future__ import annotations

import collections
import platform
from typing import TYPE_CHECKING, Literal

import msgspec

from hwcore._version import __version__
from hwcore.hookspecs import API_VERSION

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = [
    "SCHEMA_VERSION",
    "BackendFacts",
    "Feature",
    "Group",
    "HookFailures",
    "Quirk",
    "Report",
    "Result",
    "build",
    "refusal",
]

SCHEMA_VERSION = 1
"""Raised when a field is removed or changes its meaning; new fields do not raise it."""

Outcome = Literal["passed", "failed", "skipped"]


class BackendFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The backend under test, by its own words."""

    name: str
    device_type: str = ""
    vendor: str = ""
    api_version: str = ""
    distribution: str = ""
    version: str = ""
    capabilities: list[str] = []
    quirks: list[str] = []


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """One test. ``hook`` is the one it is about or, if it failed, the one at fault."""

    id: str
    group: str
    name: str
    hook: str
    outcome: Outcome
    message: str = ""
    feature: str | None = None
    quirks: list[str] = []
    calls: list[str] = []
    hung: bool = False
    duration_s: float = 0.0

    @property
    def adapted(self) -> bool:
        """Whether a quirk changed what the test expected."""
        return bool(self.quirks) and self.outcome != "skipped"


class Group(msgspec.Struct, frozen=True, kw_only=True):
    """Counts of a group; ``adapted`` tests are among the passed and failed ones."""

    name: str
    passed: int
    failed: int
    skipped: int
    adapted: int


class HookFailures(msgspec.Struct, frozen=True, kw_only=True):
    """A hook at fault, and the tests that found it."""

    hook: str
    tests: list[str]
    messages: list[str]


class Feature(msgspec.Struct, frozen=True, kw_only=True):
    """Something the backend does not claim, and the tests skipped for it."""

    name: str
    tests: list[str]


class Quirk(msgspec.Struct, frozen=True, kw_only=True):
    """A quirk that the backend declares, and the tests that it adapted."""

    name: str
    tests: list[str]


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Everything; ``exit_code`` is that of the command."""

    schema_version: int = SCHEMA_VERSION
    python: str
    hwcore: str
    api_version: str
    torch: str | None = None
    backend: BackendFacts
    error: str | None = None
    groups: list[Group] = []
    failures: list[HookFailures] = []
    features_skipped: list[Feature] = []
    quirks: list[Quirk] = []
    tests: list[Result] = []
    duration_s: float = 0.0
    exit_code: Literal[0, 1, 2]


def build(
    backend: BackendFacts,
    results: Sequence[Result],
    groups: Iterable[str],
    *,
    torch: str | None = None,
    duration_s: float = 0.0,
) -> Report:
    """Return the report of a run that took place; it conforms if no test failed."""
    failed = [result for result in results if result.outcome == "failed"]
    skipped = [result for result in results if result.outcome == "skipped"]
    at_fault = collections.Counter(result.hook for result in failed)  # the most frequent first
    features = dict.fromkeys(result.feature or "other" for result in skipped)
    names = dict.fromkeys([*groups, *(result.group for result in results)])
    return Report(
        python=platform.python_version(),
        hwcore=__version__,
        api_version=API_VERSION,
        torch=torch,
        backend=backend,
        groups=[_counted(name, [r for r in results if r.group == name]) for name in names],
        failures=[
            HookFailures(
                hook=hook,
                tests=[r.id for r in failed if r.hook == hook],
                messages=[r.message for r in failed if r.hook == hook],
            )
            for hook, _ in at_fault.most_common()
        ],
        features_skipped=[
            Feature(name=name, tests=[r.id for r in skipped if (r.feature or "other") == name])
            for name in features
        ],
        quirks=[
            Quirk(name=name, tests=[r.id for r in results if name in r.quirks])
            for name in backend.quirks
        ],
        tests=list(results),
        duration_s=round(duration_s, 3),
        exit_code=1 if failed else 0,
    )


def refusal(backend: str, error: str) -> Report:
    """Return the report of a run that could not take place."""
    return Report(
        python=platform.python_version(),
        hwcore=__version__,
        api_version=API_VERSION,
        backend=BackendFacts(name=backend),
        error=error,
        exit_code=2,
    )


def _counted(name: str, results: list[Result]) -> Group:
    outcomes = [result.outcome for result in results]
    return Group(
        name=name,
        passed=outcomes.count("passed"),
        failed=outcomes.count("failed"),
        skipped=outcomes.count("skipped"),
        adapted=sum(result.adapted for result in results),
    )
