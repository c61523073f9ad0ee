"""How many graphs this process may hold: devices run out of what a graph needs, and say so late."""

from __future__ import annotations

import collections
import threading
import weakref
from typing import TYPE_CHECKING

from hwcore import _env
from hwcore.errors import ArgumentValueError, CaptureError, describe

if TYPE_CHECKING:
    from hwcore.backend import Backend

__all__ = ["DEFAULT_BUDGET", "Reservation", "reserve"]

DEFAULT_BUDGET = 1800
"""Graphs where the backend has the quirk ``capture_stream_limit``. Such devices were seen to have
about 2,000 capture streams for all graphs and for the program's own streams."""

_lock = threading.RLock()  # a finaliser may run while its own thread holds it
_held: collections.Counter[str] = collections.Counter()
"""Graphs that runners hold, by device type."""


class Reservation:
    """Graphs that one owner holds, until released or the owner is gone."""

    def __init__(self, device_type: str, count: int, owner: object) -> None:
        self._release = weakref.finalize(owner, _give_back, device_type, count)

    def release(self) -> None:
        """Give them back; once is enough."""
        self._release()


def reserve(backend: Backend, count: int, budget: int | None, owner: object) -> Reservation:
    """Take part of this process's budget for ``count`` graphs, before the first is captured.

    Parameters
    ----------
    backend : Backend
    count : int
    budget : int or None
        Graphs that the process may hold on this device type, those of other runners included.
        None: ``HWCORE_CAPTURE_BUDGET``; unset: ``DEFAULT_BUDGET`` where the backend has the quirk
        ``capture_stream_limit``, else no limit.
    owner : object
        Whose graphs they are: when it is gone, so is the reservation.

    Raises
    ------
    CaptureError
        If the budget does not suffice. Nothing was reserved.
    ArgumentValueError
        If a budget is no number ≥ 0.
    """
    if budget is None:
        budget = _env.capture_budget()
    elif type(budget) is not int or budget < 0:
        expected, fix = "an int ≥ 0, or None", "Pass how many graphs the process may hold"
        raise ArgumentValueError(describe("GraphRunner", "`capture_budget`", budget, expected, fix))
    if budget is None and "capture_stream_limit" in backend.info.quirks:
        budget = DEFAULT_BUDGET
    device_type = backend.info.device_type
    with _lock:
        held = _held[device_type]
        if budget is not None and held + count > budget:
            message = (
                f"GraphRunner.capture: `buckets` got {count} to capture while this process holds "
                f"{held} graphs on `{device_type}`; expected at most {budget} in all, for a device "
                f"that runs out of capture streams fails in the middle. Name fewer batch sizes "
                f"(larger steps between them), close runners that are not used, or raise "
                f"`capture_budget` or HWCORE_CAPTURE_BUDGET."
            )
            raise CaptureError(message)
        _held[device_type] += count
    return Reservation(device_type, count, owner)


def _give_back(device_type: str, count: int) -> None:
    with _lock:
        _held[device_type] -= count
