"""Slow work that a test can see is not done yet, and checks of whether the host waited for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from hwcore.testing.conformance.kit import Kit
    from hwcore.types import Stream

__all__ = ["LateWrite", "has_happened", "host_goes_on"]

_WRITTEN = 7.0
_ATTEMPTS = 3


class LateWrite:
    """A write behind slow work in a stream, and whether it has happened.

    On a device whose streams are asynchronous it has not for about a tenth of a second, or until
    the stream is waited for.
    """

    def __init__(self, kit: Kit, stream: Stream) -> None:
        self.stream = stream
        self._kit = kit
        self._source = kit.tensor([_WRITTEN] * 4, device=stream.device)
        self._target = kit.raw.observable(self._source)
        kit.raw.settle()
        with kit.raw.on(stream):
            kit.raw.stall(stream)
            self._target.copy_(self._source, non_blocking=True)

    @property
    def happened(self) -> bool:
        """Whether the write is in memory now."""
        return bool((self._kit.raw.peek(self._target) == _WRITTEN).all())


def has_happened(kit: Kit, happened: bool, what: str) -> None:
    """Fail unless the host waited for the work that ``what`` names."""
    expected = "every write of it in memory by the time that the call returned"
    kit.that(happened, what, "still running", expected, "Block the host until it has finished")


def host_goes_on(
    kit: Kit,
    call: Callable[[LateWrite], None],
    what: str = "the host",
    fix: str = "Return at once",
) -> None:
    """Fail if slow work is always over when a call returns.

    Once is enough: between the call and the look the machine may have paused.
    """
    for _ in range(_ATTEMPTS):
        late = kit.late_write(kit.stream())
        call(late)
        if not late.happened:
            return
    got = "work that was over each time the host looked"
    kit.fail(what, got, "work that runs later than the call which enqueues it", fix)
