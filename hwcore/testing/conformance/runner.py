"""A run in child processes, which ends whatever the plugin does.

Two limits. In the child each test runs in a thread with a deadline, so that a hook that waits for
ever costs one test (:mod:`hwcore.testing.conformance.deadline`). Native code that keeps the
interpreter's lock stops that thread's clock too, and a crash ends the process: then this process
ends the child, counts the test as failed by the hook it was in, and has another child go on with
the rest.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from typing import IO, TYPE_CHECKING, Any

import msgspec

from hwcore.probing import Lines, kill, last_words, status_text
from hwcore.testing.conformance.report import BackendFacts, Report, Result, build, refusal
from hwcore.testing.conformance.subject import environment

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["run_in_children"]

START_S = 180.0
"""Seconds for importing torch and activating the backend; a first build may be part of it."""

GRACE_S = 10.0
"""Seconds beyond a test's limit before the child itself is ended."""

MOST_CHILDREN = 6


@dataclasses.dataclass
class _State:
    """What is known so far; a child's lines are folded into it."""

    backend: BackendFacts
    torch: str | None = None
    results: list[Result] = dataclasses.field(default_factory=list)
    refused: str | None = None
    test: str | None = None
    hook: str = "setup"
    began: float = 0.0
    limit_s: float = 0.0
    ended: bool = False
    avoid: dict[str, str] = dataclasses.field(default_factory=dict)

    def fold(self, heard: dict[str, Any], on_result: Callable[[Result], None]) -> None:
        if "start" in heard:
            self.test, self.began = heard["start"], time.monotonic()
            self.limit_s = heard["limit_s"] + GRACE_S
        self.hook = heard.get("hook", self.hook)
        if "backend" in heard:
            self.backend = msgspec.convert(heard["backend"], BackendFacts)
            self.torch = heard["torch"]
        self.refused = heard.get("refused", self.refused)
        self.ended = self.ended or "end" in heard or "refused" in heard
        if "broken" in heard:
            self.add(_activation(**heard["broken"]), on_result)
        if "result" in heard:
            self.test = None
            self.add(msgspec.convert(heard["result"], Result), on_result)

    def add(self, result: Result, on_result: Callable[[Result], None]) -> None:
        self.results.append(result)
        if result.hung:
            self.avoid[result.hook] = result.name
        on_result(result)


def run_in_children(
    backend: str,
    *,
    raw: str | None = None,
    keyword: str = "",
    timeout_s: float = 30.0,
    on_result: Callable[[Result], None] = lambda result: None,
) -> Report:
    """Run the conformance tests on an installed backend and return what they found.

    Imports neither torch nor the plugin in this process.

    Parameters
    ----------
    backend : str
        The backend's name.
    raw : str, optional
        ``"module:object"`` of raw access in place of what the distribution declares.
    keyword, timeout_s
        As for :func:`hwcore.testing.conformance.run`.
    on_result : callable
        Told each result as it comes.
    """
    began = time.monotonic()
    state = _State(BackendFacts(name=backend))
    for _ in range(MOST_CHILDREN):
        options = {
            "backend": backend,
            "raw": raw,
            "keyword": keyword,
            "timeout_s": timeout_s,
            "leave_out": [result.name for result in state.results],
            "avoid": state.avoid,
        }
        died = _run_child(options, state, on_result)
        if state.ended:
            break
        if state.test is None:  # before the first test, or between two: no hook can be told
            state.add(_activation("setup", f"a new process {died}"), on_result)
            break
        state.add(_killed(state, died), on_result)
    if state.refused is not None:
        return refusal(backend, state.refused)
    found = build(
        state.backend,
        state.results,
        dict.fromkeys(result.group for result in state.results),
        torch=state.torch,
        duration_s=time.monotonic() - began,
    )
    if not state.ended:
        error = f"stopped after {MOST_CHILDREN} processes had to be ended; some tests did not run"
        return msgspec.structs.replace(found, error=error)
    return found


def _run_child(options: dict[str, Any], state: _State, on_result: Callable[[Result], None]) -> str:
    """Run one child, fold what it reports, and return in words how it died if it did."""
    command = [sys.executable, "-P", "-m", __package__ + ".child", json.dumps(options)]
    state.test, state.began, state.hook = None, time.monotonic(), "setup"
    with tempfile.TemporaryFile() as noise:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=noise,
            env=environment(),
            start_new_session=True,
        )
        try:
            return _listen(child, state, on_result, noise)
        finally:
            kill(child)
            if child.stdout:
                child.stdout.close()


def _listen(
    child: subprocess.Popen[bytes],
    state: _State,
    on_result: Callable[[Result], None],
    noise: IO[bytes],
) -> str:
    assert child.stdout is not None
    lines = Lines(child.stdout.fileno())
    while not state.ended:
        limit_s = START_S if state.test is None else state.limit_s
        try:
            line = lines.next(max(state.began + limit_s - time.monotonic(), 0))
        except TimeoutError:
            return f"gave no answer within {limit_s:g} s and was ended{last_words(noise)}"
        if line is None:
            try:
                status = status_text(child.wait(timeout=1))
            except subprocess.TimeoutExpired:
                status = "it runs on and reports no more"
            return f"ended: {status}.{last_words(noise)}"
        state.fold(json.loads(line), on_result)
        if state.test is None:
            state.began = time.monotonic()
    return ""


def _killed(state: _State, died: str) -> Result:
    message = (
        f"{state.hook}: the process {died.rstrip('.')} while this hook or the test ran; expected "
        f"the call to return. Run the test alone under a debugger: -k {state.test}."
    )
    return Result(
        id=f"{ABORTED}::{state.test}",
        group=ABORTED,
        name=state.test or "",
        hook=state.hook,
        outcome="failed",
        message=message,
        hung=True,
    )


ABORTED = "aborted"
"""The group of tests whose process had to be ended."""


def _activation(hook: str, message: str) -> Result:
    return Result(
        id=f"activation::{hook}",
        group="activation",
        name=hook,
        hook=hook,
        outcome="failed",
        message=f"{hook}: {message}",
    )
