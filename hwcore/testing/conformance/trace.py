"""Which hooks run: what a test has called, and which hook a thread is in now."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from hwcore.hookspecs import HOOKS, hookimpl
from hwcore.testing.conformance.errors import ConformanceError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

__all__ = ["Trace", "hook_that_raised"]

_MARK = "_hwcore_conformance_hook"


class Trace:
    """Follows a backend's hooks through wrappers around each of them.

    Attributes
    ----------
    wrappers : object
        To be given to :meth:`hwcore.Backend.register`.
    called : set of str
        Hooks called since it was last emptied, by any thread.
    avoid : dict of str to str
        Hooks not to be called, and the test in which each hung or ended the process.
    """

    def __init__(self, on_enter: Callable[[str], None] | None = None) -> None:
        self.called: set[str] = set()
        self.avoid: dict[str, str] = {}
        self._on_enter = on_enter
        self._inside: dict[int, list[str]] = {}
        self.wrappers = SimpleNamespace(**{hook: self._wrapper(hook) for hook in HOOKS})

    def inside(self, thread: int | None) -> str | None:
        """Return the innermost hook that a thread is in, or None."""
        stack = self._inside.get(thread or 0)
        return stack[-1] if stack else None

    def _wrapper(self, hook: str) -> Callable[[], Generator[None, Any, Any]]:
        def follow() -> Generator[None, Any, Any]:
            if hook in self.avoid:
                message = (
                    f"{hook}: is not called again. It hung, or ended the process, in "
                    f"`{self.avoid[hook]}`."
                )
                raise ConformanceError(message, hook)
            thread = threading.get_ident()
            stack = self._inside.setdefault(thread, [])
            stack.append(hook)
            self.called.add(hook)
            if self._on_enter:
                self._on_enter(hook)
            try:
                return (yield)
            except BaseException as error:
                if not hasattr(error, _MARK):  # the innermost hook is the one that raised it
                    error.__dict__[_MARK] = hook
                raise
            finally:
                stack.pop()
                if not stack:
                    self._inside.pop(thread, None)

        return hookimpl(wrapper=True)(follow)


def hook_that_raised(error: BaseException) -> str | None:
    """Return the hook that an exception came out of, or None if it came out of none."""
    hook: str | None = getattr(error, _MARK, None)
    return hook
