"""Take operators away from the device, to see what happens where a vendor has no kernel."""

from __future__ import annotations

import contextlib
import difflib
import threading
from typing import TYPE_CHECKING

import torch

from hwcore.errors import ArgumentTypeError, ArgumentValueError, describe
from hwcore_sim.device.registration import native

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["allow", "denied", "denied_ops", "deny", "is_denied"]

_lock = threading.Lock()
_counts: dict[str, int] = {}
"""How often each operator is denied: by ``deny`` and by contexts that are open."""


def deny(*ops: str) -> None:
    """Make operators raise NotImplementedError on the device, naming themselves.

    Parameters
    ----------
    ops : str
        ``"topk"`` for all overloads of ``aten::topk``, ``"topk.values"`` for one; also
        ``"aten::topk"``, ``"aten.topk.values"`` and operators of other namespaces.

    Raises
    ------
    ArgumentValueError
        If torch has no such operator; the message holds near matches.
    """
    names = [_full_name("deny", op) for op in ops]
    with _lock:
        for name in names:
            _counts[name] = max(_counts.get(name, 0), 1)
            native().deny(name, _overloads(name))


def allow(*ops: str) -> None:
    """Undo :func:`deny`; without arguments, for all operators."""
    names = [_full_name("allow", op) for op in ops]
    with _lock:
        for name in names or list(_counts):
            _counts.pop(name, None)
            native().allow(name)


@contextlib.contextmanager
def denied(*ops: str) -> Iterator[None]:
    """Deny operators for a while, for all threads; what was denied before stays so."""
    names = [_full_name("denied", op) for op in ops]
    with _lock:
        for name in names:
            _counts[name] = _counts.get(name, 0) + 1
            native().deny(name, _overloads(name))
    try:
        yield
    finally:
        with _lock:
            for name in names:
                left = _counts.get(name, 0) - 1
                if left > 0:
                    _counts[name] = left
                else:
                    _counts.pop(name, None)
                    native().allow(name)


def denied_ops() -> tuple[str, ...]:
    """Return the full names of the operators that are denied."""
    return tuple(native().denied_ops())


def is_denied(op: str) -> bool:
    """Say whether an operator, or any of its overloads, is denied; False if there is none such."""
    name = _colons(op)
    return any(it == name or it.partition(".")[0] == name for it in denied_ops())


def _colons(op: str) -> str:
    """Return ``op`` as ``namespace::name`` or ``namespace::name.overload``."""
    if "::" in op:
        return op
    head, dot, rest = op.partition(".")
    known = {"aten", *(name.partition("::")[0] for name in _names())}
    return f"{head}::{rest}" if dot and head in known else f"aten::{op}"


def _names() -> list[str]:
    return torch._C._dispatch_get_all_op_names()


def _overloads(name: str) -> list[str]:
    return [it for it in _names() if it == name or it.partition(".")[0] == name]


def _full_name(where: str, op: str) -> str:
    if not isinstance(op, str):
        fix = 'Pass one such as "topk"'
        raise ArgumentTypeError(describe(where, "`op`", op, "an operator's name", fix))
    name = _colons(op)
    overloads = set(_names())
    operators = {it.partition(".")[0] for it in overloads}
    if name in operators or name in overloads:
        return name
    if name.removesuffix(".default") in overloads:
        return name.removesuffix(".default")
    near = difflib.get_close_matches(name, operators | overloads, n=3)
    shown = [it.removeprefix("aten::") for it in near]
    fix = f"Did you mean {' or '.join(shown)}" if near else 'Pass one such as "topk"'
    raise ArgumentValueError(describe(where, "`op`", op, "an operator that torch has", fix))
