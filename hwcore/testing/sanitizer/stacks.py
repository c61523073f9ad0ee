"""Where the program was: the user's frames, taken in a microsecond and put into words later."""

from __future__ import annotations

import ast
import functools
import itertools
import linecache
import os
import re
import sys
import warnings
from typing import TYPE_CHECKING

import pluggy
import torch
from torch.autograd.graph import _engine_run_backward

import hwcore

if TYPE_CHECKING:
    from types import CodeType, FrameType

__all__ = ["Stack", "assigned_name", "capture", "lines", "site", "warn"]

Stack = tuple[tuple["CodeType", int], ...]
"""Code and the offset of the instruction that ran, innermost first."""

DEPTH = 8
"""Frames kept."""

_CORE = os.path.dirname(hwcore.__file__)
_FOLDERS = [os.path.dirname(file) for file in (torch.__file__, pluggy.__file__, __file__)]
_HIDDEN = (
    *(os.path.join(folder, "") for folder in _FOLDERS),
    *(os.path.join(_CORE, file) for file in ("backend.py", "binding.py", "defaults.py")),
    *(os.path.join(_CORE, "graphs", file) for file in ("host_reads.py", "recorder.py", "tape.py")),
    "<frozen",
)
_STANDARD_LIBRARY = os.path.join(os.path.dirname(os.__file__), "")
_TEST_RUNNER = re.compile(r"[/\\]_?pytest[/\\]")

_hidden: dict[str, bool] = {}


def capture() -> Stack:
    """Return the innermost frames that are neither torch's, hwcore's binding nor this package's.

    A thread of autograd's has none: then those of the thread that called backward.
    """
    return _users(sys._getframe(1)) or _callers_of_backward()


def warn(message: Warning, at: Stack = ()) -> None:
    """Warn at the innermost frame of the user's, so that filters know its line and module.

    Parameters
    ----------
    at : Stack
        Where to, if the calling thread has no such frame.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _is_ours(frame.f_code):
        frame = frame.f_back
    if frame is None:
        file, line = site(at or _callers_of_backward())
        warnings.warn_explicit(message, type(message), file or "<unknown>", line)
        return
    warnings.warn_explicit(
        message,
        type(message),
        frame.f_code.co_filename,
        frame.f_lineno,
        module=frame.f_globals.get("__name__") or "<string>",  # as warnings.warn() has it
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
    )


def site(stack: Stack) -> tuple[str, int]:
    """Return the file and line of the innermost frame."""
    if not stack:
        return "", 0
    code, offset = stack[0]
    return code.co_filename, _line_number(code, offset)


def lines(stack: Stack) -> tuple[str, ...]:
    """Return the frames as ``file:line in function``, innermost first."""
    return tuple(_line(code, offset) for code, offset in stack)


def assigned_name(stack: Stack) -> str | None:
    """Return the name that the line of a call assigns its result to: ``plan = create_stream()``."""
    if not stack:
        return None
    code, offset = stack[0]
    line, _, column, _ = next(itertools.islice(code.co_positions(), offset // 2, None))
    text = linecache.getline(code.co_filename, line or 0)
    try:
        (statement,) = ast.parse(text.strip()).body
    except (SyntaxError, ValueError):  # one line of several
        return None
    if not isinstance(statement, (ast.Assign, ast.AnnAssign)) or statement.value is None:
        return None
    target = statement.targets[0] if isinstance(statement, ast.Assign) else statement.target
    pairs: list[tuple[ast.expr, ast.expr]] = [(target, statement.value)]
    if isinstance(target, ast.Tuple) and isinstance(statement.value, ast.Tuple):
        pairs = list(zip(target.elts, statement.value.elts, strict=False))
    called = (column or 0) - (len(text) - len(text.lstrip()))
    for name, value in pairs:
        if value.col_offset <= called < (value.end_col_offset or 0):
            return getattr(name, "id", None) or getattr(name, "attr", None)
    return None


@functools.lru_cache(maxsize=1024)
def _line(code: CodeType, offset: int) -> str:
    file = code.co_filename
    below = os.path.join(os.getcwd(), "")
    shown = file.removeprefix(below)
    return f"{shown}:{_line_number(code, offset)} in {code.co_name}"


def _line_number(code: CodeType, offset: int) -> int:
    for start, end, line in code.co_lines():
        if start <= offset < end and line is not None:
            return line
    return code.co_firstlineno


def _users(frame: FrameType | None) -> Stack:
    found: list[tuple[CodeType, int]] = []
    while frame is not None:
        code = frame.f_code
        if not _is_ours(code):
            found.append((code, frame.f_lasti))
            if len(found) == DEPTH:
                break
        frame = frame.f_back
    return tuple(found)


def _callers_of_backward() -> Stack:
    """Return where the host waits for autograd; nothing if threads do so in several places."""
    waiting = {
        _users(frame)
        for frame in sys._current_frames().values()
        if frame.f_code is _engine_run_backward.__code__
    }
    return waiting.pop() if len(waiting) == 1 else ()


def _is_ours(code: CodeType) -> bool:
    """Say whether code is no place of the user's program."""
    file = code.co_filename
    hidden = _hidden.get(file)
    if hidden is None:
        hidden = _hidden[file] = _is_hidden(file)
    return hidden or (file == "<string>" and code.co_name == "<lambda>")


def _is_hidden(file: str) -> bool:
    if file.startswith(_HIDDEN) or _TEST_RUNNER.search(file):
        return True
    # Installed packages may lie below the standard library.
    return file.startswith(_STANDARD_LIBRARY) and "site-packages" not in file
