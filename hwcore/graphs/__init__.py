"""Graphs: capture a step once, replay it without the host.

:class:`GraphRunner` captures a step for each bucket of batch sizes and replays it on padded
batches; :class:`GraphBuffers` are its static inputs, made of :class:`Slot`. The graphs themselves
are the backend's, or :mod:`hwcore.graphs.tape` where the device has none. The names below are
imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hwcore.graphs.buffers import GraphBuffers
    from hwcore.graphs.prepared import Prepared, Verdict
    from hwcore.graphs.runner import GraphRunner
    from hwcore.graphs.slots import BATCH, TOKENS, TOKENS_PER_REQUEST, Slot

__all__ = [
    "BATCH",
    "TOKENS",
    "TOKENS_PER_REQUEST",
    "GraphBuffers",
    "GraphRunner",
    "Prepared",
    "Slot",
    "Verdict",
]

_HOMES = {
    "BATCH": "slots",
    "TOKENS": "slots",
    "TOKENS_PER_REQUEST": "slots",
    "GraphBuffers": "buffers",
    "GraphRunner": "runner",
    "Prepared": "prepared",
    "Slot": "slots",
    "Verdict": "prepared",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        message = f"module 'hwcore.graphs' has no attribute {name!r}"
        raise AttributeError(message)
    value = getattr(importlib.import_module(f"hwcore.graphs.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
