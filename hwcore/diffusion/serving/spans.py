"""What was done for a request, and when: told to who wants to know."""

from __future__ import annotations

import dataclasses
import logging
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Span", "Spans"]

_log = logging.getLogger("hwcore")


@dataclasses.dataclass(frozen=True)
class Span:
    """What was done for a request, and when.

    Attributes
    ----------
    request_id, worker : str
    kind : str
        ``load``, ``compute``, ``stage`` or ``push``. To a peer whose pool is mapped here the copy
        is the stage, and the push what follows: checks and the seal.
    started, ended : float
        Seconds of ``time.monotonic``, one clock for all processes of a machine.
    """

    request_id: str
    worker: str
    kind: str
    started: float
    ended: float


class Spans:
    """Tells the spans of one worker to a function. All methods may be called from any thread.

    Parameters
    ----------
    worker : str
    on_span : callable or None
        What it raises is logged, and harms nothing.
    """

    def __init__(self, worker: str, on_span: Callable[[Span], None] | None) -> None:
        self._worker, self._on_span = worker, on_span
        self.are_wanted = on_span is not None

    def add(self, request_id: str, kind: str, started: float, ended: float | None = None) -> None:
        """Tell of what was done from ``started`` to ``ended``, or until now."""
        if self._on_span is None:
            return
        ended = time.monotonic() if ended is None else ended
        try:
            self._on_span(Span(request_id, self._worker, kind, started, ended))
        except Exception:  # noqa: BLE001 - it is not part of the work
            _log.warning("%s: a span was not taken", self._worker, exc_info=True)
