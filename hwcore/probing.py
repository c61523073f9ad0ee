"""Asking plugins whether this machine can run them, in a child process without torch.

A plugin may hang, crash the interpreter or print; a child process can be killed, its exit status
read, and its output kept apart. One child serves all plugins; after a hang or a crash another
goes on with the rest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from typing import IO, TYPE_CHECKING, Any

import msgspec

from hwcore import errors
from hwcore.errors import PluginError, ProbeError
from hwcore.types import Availability, BackendInfo

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hwcore.discovery import Origin

__all__ = [
    "DEADLINES_S",
    "Lines",
    "ProbeResult",
    "child_environment",
    "kill",
    "last_words",
    "probe",
    "status_text",
]

DEADLINES_S = {"start": 30.0, "import": 10.0, "probe": 2.0}
"""Seconds that a child may take to start, a plugin to be imported, and its ``probe()`` to run."""


@dataclasses.dataclass(frozen=True)
class ProbeResult:
    """What became of one plugin in the child.

    Attributes
    ----------
    origin : Origin
    info : BackendInfo or None
    hooks : tuple of str
        Hooks that the plugin implements; empty where it could not be loaded.
    availability : Availability or None
        None where ``error`` is set, or the plugin was not probed.
    error : PluginError or None
        Why the plugin counts as broken.
    file : str or None
        The file that its module was loaded from.
    """

    origin: Origin
    info: BackendInfo | None = None
    hooks: tuple[str, ...] = ()
    availability: Availability | None = None
    error: PluginError | None = None
    file: str | None = None


class RemoteTraceback(Exception):
    """The child's traceback, as the cause of the error raised here."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def probe(origins: Sequence[Origin], *, only_automatic: bool = False) -> list[ProbeResult]:
    """Load and probe each plugin in a child process, in order.

    With ``only_automatic``, a plugin that is selected by name only is loaded and not probed.

    Never raises for what a plugin does: a plugin that raises, hangs, crashes or answers with
    something else comes back with its error.
    """
    results: list[ProbeResult] = []
    while len(results) < len(origins):
        results += _run_child(origins[len(results) :], only_automatic)
    return results


def _run_child(origins: Sequence[Origin], only_automatic: bool) -> list[ProbeResult]:
    """Probe until the first hang or crash, which is the last result returned."""
    if not sys.executable:
        message = (
            "hwcore: plugins are probed in a child process, and sys.executable is empty in this "
            "embedded Python. Set sys.executable, or name the backend cpu with HWCORE_BACKEND."
        )
        raise errors.SelectionError(message)
    job = {
        "path": [entry for entry in sys.path if isinstance(entry, str)],
        "only_automatic": only_automatic,
        "origins": [dataclasses.asdict(origin) for origin in origins],
    }
    read, write = os.pipe()
    job["reports"] = write
    # A file, not a pipe: a child that fills a pipe nobody reads would hang.
    with open(read, "rb", buffering=0) as reports, tempfile.TemporaryFile() as noise:
        try:
            child = subprocess.Popen(
                [sys.executable, "-P", "-m", "hwcore._probe_child"],
                stdin=subprocess.PIPE,
                stdout=noise,
                stderr=noise,
                pass_fds=(write,),
                env=child_environment(),
                start_new_session=True,
            )
        finally:
            os.close(write)
        try:
            return _collect(child, json.dumps(job).encode(), origins, reports, noise)
        finally:
            kill(child)


def _collect(
    child: subprocess.Popen[bytes],
    job: bytes,
    origins: Sequence[Origin],
    reports: IO[bytes],
    noise: IO[bytes],
) -> list[ProbeResult]:
    assert child.stdin is not None
    try:
        child.stdin.write(job)
        child.stdin.close()
    except BrokenPipeError:
        pass  # the child died at once; reading finds that out
    lines = Lines(reports.fileno())
    results: list[ProbeResult] = []
    phase, index = "start", 0
    while len(results) < len(origins):
        try:
            line = lines.next(DEADLINES_S[phase])
        except TimeoutError:
            what = f"hung: {phase} took longer than {DEADLINES_S[phase]:g} s"
            _check_started(phase, what, noise)
            results.append(_broken(origins[index], what, noise))
            break
        if line is None:
            what = f"crashed the process during {phase} ({_exit(child)})"
            _check_started(phase, what, noise)
            results.append(_broken(origins[index], what, noise))
            break
        report: dict[str, Any] = json.loads(line)
        index = report["index"]
        if report["kind"] == "phase":
            phase = report["phase"]
        else:
            results.append(_result(origins[index], report))
            phase, index = "import", min(index + 1, len(origins) - 1)
    return results


def _result(origin: Origin, report: dict[str, Any]) -> ProbeResult:
    error = None
    if report["error"]:
        kind = getattr(errors, report["error"]["type"])
        error = kind(report["error"]["message"], origin.name, report["error"]["hook"])
        error.__cause__ = RemoteTraceback(report["error"]["traceback"])
    info, availability = report["info"], report["availability"]
    return ProbeResult(
        origin=origin,
        info=info and msgspec.convert(info, BackendInfo),
        hooks=tuple(report["hooks"]),
        availability=availability and msgspec.convert(availability, Availability),
        error=error,
        file=report["file"],
    )


def _check_started(phase: str, what: str, noise: IO[bytes]) -> None:
    """Raise where the child failed before it had come to any plugin."""
    if phase == "start":
        message = (
            f"hwcore: the child process in which plugins are probed, {sys.executable}, {what}."
            f"{last_words(noise)} Set sys.executable to a Python that can import hwcore, or name "
            f"the backend cpu with HWCORE_BACKEND."
        )
        raise errors.SelectionError(message)


def _broken(origin: Origin, what: str, noise: IO[bytes]) -> ProbeResult:
    message = f"{origin}: probe() {what}.{last_words(noise)} {origin.way_past}."
    return ProbeResult(origin, error=ProbeError(message, origin.name, "probe"))


def _exit(child: subprocess.Popen[bytes]) -> str:
    try:
        status = child.wait(timeout=1)
    except subprocess.TimeoutExpired:  # a thread, or code that closed every file, goes on
        return "it runs on and reports no more"
    return status_text(status)


def child_environment() -> dict[str, str]:
    """Return the environment of a child process that imports what this one can import."""
    path = [entry for entry in sys.path if isinstance(entry, str) and entry]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}


def last_words(noise: IO[bytes]) -> str:
    """Return the end of what a child printed, as a sentence; empty where it printed nothing."""
    noise.seek(0)
    said = noise.read().decode(errors="replace").strip().splitlines()[-3:]
    return f" Its last output: {' | '.join(said)}." if said else ""


def status_text(status: int) -> str:
    """Return a child's exit status, or the signal that killed it, in words."""
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"


def kill(child: subprocess.Popen[bytes]) -> None:
    """End a child that leads a session of its own, and wait for it."""
    # The child leads a session of its own, so that what a plugin started goes with it.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


class Lines:
    """Lines from a file descriptor, each with a deadline."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._buffer = b""
        self._poll = select.poll()  # select.select fails in a server with 1024 files open
        self._poll.register(descriptor, select.POLLIN)

    def next(self, timeout_s: float) -> bytes | None:
        """Return the next line, or None at the end; raise TimeoutError past the deadline."""
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._buffer:
            left_s = max(deadline - time.monotonic(), 0)
            if not self._poll.poll(left_s * 1000):
                raise TimeoutError
            chunk = os.read(self._descriptor, 1 << 16)
            if not chunk:
                return None
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line
