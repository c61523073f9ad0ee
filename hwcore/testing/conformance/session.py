"""A run in this process: pytest over every group, one result for each test."""

from __future__ import annotations

import contextlib
import io
import os
import pathlib
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch

from hwcore.errors import PluginError
from hwcore.testing.conformance import report
from hwcore.testing.conformance.errors import ConformanceError, NothingSelectedError
from hwcore.testing.conformance.subject import open_kit

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Generator

    from hwcore.backend import Backend
    from hwcore.testing.conformance.kit import Kit
    from hwcore.testing.conformance.raw import RawAccess

__all__ = ["ACTIVATION", "KIT", "facts", "run", "run_tests"]

KIT = pytest.StashKey["Kit"]()
"""Where a session keeps the kit for its tests."""

ACTIVATION = "activation"
"""The group of what a plugin is refused for before any test runs."""

# The last two collect all garbage several times a run, to warn of what is ignored here.
_UNUSED = (
    *("cacheprovider", "terminal", "logging", "faulthandler"),
    *("unraisableexception", "threadexception"),
)

_USAGE = (pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.NO_TESTS_COLLECTED)


def run(
    backend: str | Backend | Callable[[], Backend],
    *,
    raw: RawAccess | None = None,
    keyword: str = "",
    timeout_s: float = 30.0,
    loader: str | None = None,
    first_failure: bool = False,
) -> report.Report:
    """Run the conformance tests in this process and return what they found.

    Parameters
    ----------
    backend : str, Backend or callable
        The backend under test: its name, the object, or what makes the object. A plugin that is
        refused while it is activated is one failure, of the hook at fault.
    raw : RawAccess, optional
        Default: what the plugin's distribution declares, else torch alone.
    keyword : str
        Which tests to run, as pytest's ``-k`` takes it: hooks, groups and words of test names.
    timeout_s : float
        Limit for each test. A hook that keeps the interpreter's lock for ever is not ended here;
        ``hwcore conformance`` runs the tests in a child process for that.
    loader : str, optional
        Source of an expression that makes the same backend in a new process.
    first_failure : bool
        Stop there.

    Raises
    ------
    SelectionError
        If the backend is unknown, or this machine cannot run it.
    NothingSelectedError
        If ``keyword`` is malformed or matches no test.
    """
    began = time.perf_counter()
    results: list[report.Result] = []
    name = backend if isinstance(backend, str) else ""
    try:
        made = backend if isinstance(backend, str) or not callable(backend) else backend()
        with open_kit(made, raw, timeout_s, loader) as kit:
            run_tests(kit, results.append, keyword=keyword, first_failure=first_failure)
            about = facts(kit.hw)
    except PluginError as error:
        about = report.BackendFacts(name=name or error.plugin)
        results.append(refused(error))
    from hwcore.testing.conformance.suite import GROUPS

    return report.build(
        about,
        results,
        [group.__module__.rpartition(".")[2] for group in GROUPS],
        torch=str(torch.__version__),
        duration_s=time.perf_counter() - began,
    )


def run_tests(
    kit: Kit,
    on_result: Callable[[report.Result], None],
    *,
    keyword: str = "",
    leave_out: Collection[str] = (),
    first_failure: bool = False,
    on_start: Callable[[str, str, float], None] = lambda test, hook, limit_s: None,
) -> None:
    """Run pytest over the groups, apart from the caller's own configuration and plugins.

    Parameters
    ----------
    on_result, on_start : callable
        Told each result; and the name, hook and limit in seconds of each test that begins.
    leave_out : collection of str
        Names of tests not to run, because an earlier process did.

    Raises
    ------
    NothingSelectedError
        If ``keyword`` is malformed or matches no test.
    """
    here = pathlib.Path(__file__).parent
    arguments = [
        *(str(here / "entry.py"), f"--rootdir={here}", "-c", os.devnull, "--noconftest"),
        *(part for plugin in _UNUSED for part in ("-p", f"no:{plugin}")),
        *("--import-mode=importlib", "--capture=no", "-W", "ignore"),
        *(("-k", keyword) if keyword else ()),
        *(("-x",) if first_failure else ()),
    ]
    session = _Session(kit, on_result, on_start, frozenset(leave_out))
    said = io.StringIO()
    with _apart_from_the_callers_pytest(), contextlib.redirect_stderr(said):
        status = pytest.main(arguments, plugins=[session])
    if status in _USAGE and not (leave_out and not session.usage_error):
        text = session.usage_error or said.getvalue().strip().partition("\n")[0]
        reason = text.removeprefix("ERROR: ") or "no test matches"
        message = (
            f"conformance: `-k` got {keyword!r}; expected an expression that matches a test "
            f"({reason}). Use a hook, a group or words of a test's name, with and, or, not."
        )
        raise NothingSelectedError(message)
    if session.broken:
        message = f"conformance: the kit's own tests cannot be collected: {session.broken}"
        raise RuntimeError(message)


def facts(backend: Backend) -> report.BackendFacts:
    """Return what a backend says of itself."""
    info, origin = backend.info, backend.origin
    return report.BackendFacts(
        name=info.name,
        device_type=info.device_type,
        vendor=info.vendor,
        api_version=info.api_version,
        distribution=origin.distribution,
        version=origin.version,
        capabilities=sorted(info.capabilities),
        quirks=sorted(info.quirks),
    )


def refused(error: PluginError) -> report.Result:
    """Return as a failed test that a plugin broke the contract before any test ran."""
    hook = error.hook or "plugin"
    return report.Result(
        id=f"{ACTIVATION}::{hook}",
        group=ACTIVATION,
        name=hook,
        hook=hook,
        outcome="failed",
        message=f"{hook}: {error}",
    )


class _Session:
    """The kit's own pytest plugin: hands the kit out and turns outcomes into results."""

    def __init__(
        self,
        kit: Kit,
        on_result: Callable[[report.Result], None],
        on_start: Callable[[str, str, float], None],
        leave_out: frozenset[str],
    ) -> None:
        self.usage_error = ""
        self.broken = ""
        self._kit = kit
        self._on_result = on_result
        self._on_start = on_start
        self._leave_out = leave_out

    def pytest_configure(self, config: pytest.Config) -> None:
        config.stash[KIT] = self._kit

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.broken = report.longreprtext

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Leave out what was run before, and let -k match hooks and groups."""
        from hwcore.testing.conformance.suite import GROUPS

        items[:] = [item for item in items if item.name not in self._leave_out]
        order = [group.__module__.rpartition(".")[2] for group in GROUPS]
        items.sort(key=lambda item: order.index(_group_of(item)))
        for item in items:
            item.extra_keyword_matches |= {_hook_of(item), _group_of(item)}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        patience = getattr(getattr(item, "function", None), "patience", 1.0)
        self._on_start(item.name, _hook_of(item), self._kit.timeout_s * patience)
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        outcome = yield
        if outcome.when == "call" or outcome.failed:
            self._on_result(self._result(item, call, outcome))
        return outcome

    def _result(
        self, item: pytest.Item, call: pytest.CallInfo[None], outcome: pytest.TestReport
    ) -> report.Result:
        error = call.excinfo.value if call.excinfo else None
        notes = self._kit.notes
        hook = error.hook if isinstance(error, ConformanceError) else _hook_of(item)
        group = _group_of(item)
        return report.Result(
            id=f"{group}::{item.name}",
            group=group,
            name=item.name,
            hook=hook,
            outcome=outcome.outcome,
            message="" if error is None else str(getattr(error, "msg", None) or error),
            feature=notes.feature if outcome.skipped else None,
            quirks=list(notes.quirks),
            calls=list(notes.calls),
            hung=notes.hung,
            duration_s=round(call.duration, 4),
        )


def _hook_of(item: pytest.Item) -> str:
    return str(getattr(getattr(item, "function", None), "conforms_to", ""))


def _group_of(item: pytest.Item) -> str:
    from hwcore.testing.conformance.suite import group_of

    return group_of(getattr(item, "function", None))


@contextlib.contextmanager
def _apart_from_the_callers_pytest() -> Generator[None, None, None]:
    """Hide the variables through which pytest takes options and plugins."""
    ours = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    hidden = ("PYTEST_ADDOPTS", "PYTEST_PLUGINS", *ours)
    before = {name: os.environ.pop(name, None) for name in hidden}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
