"""The sanitizer as it is switched on and off: one at a time in a process."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import sys
import threading
from typing import TYPE_CHECKING, Any, get_args

import hwcore
from hwcore.errors import ArgumentTypeError, ArgumentValueError, describe
from hwcore.testing.sanitizer.hooks import Hooks
from hwcore.testing.sanitizer.modes import Mode, Patches
from hwcore.testing.sanitizer.reports import RaceError, RaceWarning, SanitizerError, summary
from hwcore.testing.sanitizer.tracker import OnRace, Tracker

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from hwcore.backend import Backend
    from hwcore.testing.sanitizer.reports import Race

__all__ = ["Sanitizer", "attach_thread", "enable", "name"]

_log = logging.getLogger("hwcore")
_lock = threading.Lock()
_active: Sanitizer | None = None


class Sanitizer:
    """Finds unordered accesses to the same memory while it is entered.

    It sees the streams and events that go through the backend's hooks, and the torch calls of the
    thread that enters it, of threads started meanwhile, and of those that :meth:`attach_thread`.
    A race is found whether or not the order that the device happened to take was the right one.

    Parameters
    ----------
    backend : Backend, optional
        By default the process's own.
    on_race : {"raise", "warn", "collect"}
        What happens at the second access: :class:`RaceError`, :class:`RaceWarning`, or nothing.

    Attributes
    ----------
    races : list of Race
        What was found, each pair of lines once; whatever ``on_race`` is.

    Raises
    ------
    ArgumentValueError
        If ``on_race`` is none of the three.
    SanitizerError
        On entering, if a sanitizer is on already.

    Examples
    --------
    >>> with Sanitizer(on_race="collect") as sanitizer:
    ...     step()
    >>> for race in sanitizer.races:
    ...     print(race)
    """

    def __init__(self, backend: Backend | None = None, on_race: OnRace = "raise") -> None:
        if on_race not in get_args(OnRace):
            expected = '"raise", "warn" or "collect"'
            fix = "Pass one of them"
            raise ArgumentValueError(describe("Sanitizer", "`on_race`", on_race, expected, fix))
        self._backend = backend
        self._on_race = on_race
        self._tracker: Tracker | None = None
        self._exits = contextlib.ExitStack()
        self.races: list[Race] = []

    def __repr__(self) -> str:
        state = "on" if self._tracker and self._tracker.active else "off"
        return f"<hwcore Sanitizer {state}, {len(self.races)} races>"

    def __enter__(self) -> Sanitizer:
        backend = self._backend or hwcore.current_backend()
        tracker = Tracker(backend, self._on_race)
        tracker.races = self.races
        if backend.is_initialized():  # else at first use: a process may fork before it has a device
            tracker.lane()  # is called `current` in reports
        hooks, patches = Hooks(tracker), Patches(tracker)
        _claim(self)
        with contextlib.ExitStack() as exits:
            exits.callback(_release, self)
            backend.register(hooks, "race sanitizer")
            exits.callback(backend.unregister, hooks)
            patches.apply()
            exits.callback(patches.undo)
            exits.enter_context(Mode(tracker))
            self._exits = exits.pop_all()
        self._tracker = tracker
        tracker.active = True
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None = None,
        exc: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        assert self._tracker is not None
        tracker = self._tracker
        try:
            with tracker.changing():
                pass  # what was freed is looked at with the next change
        except Exception:
            if exc is None:  # the program's own error is the one to see
                raise
        finally:
            tracker.active = False
            self._exits.close()

    def take(self) -> list[Race]:
        """Return the races found so far and forget them: they were expected."""
        if self._tracker is not None and self._tracker.active:
            with contextlib.suppress(RaceError, RaceWarning), self._tracker.changing():
                pass
        races, self.races[:] = list(self.races), []
        return races

    def name(self, stream: Any, name: str) -> None:
        """Give a stream a name for reports.

        A stream made by ``plan = backend.create_stream()`` is ``plan`` already.

        Raises
        ------
        ArgumentTypeError
            If ``stream`` is no stream, or the name no text.
        """
        tracker = self._on()
        if not hasattr(stream, "device"):
            fix = "Pass what backend.create_stream() or current_stream() returned"
            raise ArgumentTypeError(describe("name", "`stream`", stream, "a stream", fix))
        if not isinstance(name, str):
            raise ArgumentTypeError(describe("name", "`name`", name, "a str", "Pass its name"))
        with tracker.lock:
            tracker.clocks.name(tracker.clocks.lane(stream), name)

    @contextlib.contextmanager
    def attach_thread(self) -> Iterator[None]:
        """Watch the calling thread, which was running before the sanitizer was switched on."""
        with Mode(self._on()):
            yield

    def _on(self) -> Tracker:
        if self._tracker is None or not self._tracker.active:
            message = (
                "Sanitizer: it was used while off; expected it to be entered. "
                "Use it as `with Sanitizer() as sanitizer:`."
            )
            raise SanitizerError(message)
        return self._tracker


def active_tracker() -> Tracker | None:
    """Return the tracker of the sanitizer that is on, or None."""
    sanitizer = _active
    if sanitizer is None or sanitizer._tracker is None or not sanitizer._tracker.active:
        return None
    return sanitizer._tracker


def name(stream: Any, name: str) -> None:
    """Give a stream a name for the reports of the sanitizer that is on; without one, nothing."""
    if _active is not None and active_tracker() is not None:
        _active.name(stream, name)


@contextlib.contextmanager
def attach_thread() -> Iterator[None]:
    """Watch the calling thread for the sanitizer that is on; without one, nothing."""
    if _active is None or active_tracker() is None:
        yield
        return
    with _active.attach_thread():
        yield


def enable(backend: Backend, on_race: OnRace = "raise") -> None:
    """Switch a sanitizer on for the rest of the process: what ``HWCORE_SANITIZE`` does.

    With ``"collect"`` a summary goes to standard error when the process ends.
    """
    with _lock:
        current = _active
    if current is not None:
        _log.warning("the race sanitizer watches one backend; %r is not watched", backend)
        return
    sanitizer = Sanitizer(backend, on_race)
    sanitizer.__enter__()
    atexit.register(_at_exit, sanitizer)


def _at_exit(sanitizer: Sanitizer) -> None:
    tracker = sanitizer._tracker
    if tracker is None or not tracker.active or os.getpid() != tracker.process:
        return
    collecting = tracker.on_race == "collect"
    told = 0 if collecting else len(sanitizer.races)
    tracker.on_race = "collect"
    with tracker.changing():
        pass
    tracker.active = False
    if collecting or len(sanitizer.races) > told:
        print(summary(sanitizer.races[told:]), file=sys.stderr)


def _after_fork() -> None:
    """Let go of locks whose holder is not in this process."""
    global _lock
    _lock = threading.Lock()
    if _active is not None and _active._tracker is not None:
        _active._tracker.lock = threading.RLock()


os.register_at_fork(after_in_child=_after_fork)


def _claim(sanitizer: Sanitizer) -> None:
    global _active
    with _lock:
        if _active is not None:
            message = (
                f"Sanitizer: entering found {_active!r}; expected none to be on, for one would "
                f"report the other's work. Leave that one first, or unset HWCORE_SANITIZE."
            )
            raise SanitizerError(message)
        _active = sanitizer


def _release(sanitizer: Sanitizer) -> None:
    global _active
    with _lock:
        _active = None
