"""A request that a client waits for."""

from __future__ import annotations

import concurrent.futures
import time
from typing import TYPE_CHECKING, Any

from hwcore._checks import check_callable, check_size, is_number
from hwcore.diffusion import messages
from hwcore.diffusion.codec import unpack_tensors
from hwcore.diffusion.messages import Submit
from hwcore.diffusion.roles import RoleType
from hwcore.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    PeerError,
    PeerTimeoutError,
    describe,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from hwcore.diffusion.enums import EnumRegistry

__all__ = ["Pending", "checked_submit"]


class Pending:
    """A request that was submitted.

    Attributes
    ----------
    request_id : str
    attempt : int
    """

    def __init__(
        self,
        submit: Submit,
        frames: tuple[bytes, ...],
        on_progress: Callable[[RoleType, int], None] | None,
        cancel: Callable[[Pending], None],
    ) -> None:
        self.request_id, self.attempt = submit.request_id, submit.attempt
        self.deadline = time.monotonic() + submit.deadline_s
        self.skip, self.on_progress = submit.skip, on_progress
        self.frames = frames
        self.cancelled = False
        self.future: concurrent.futures.Future[list[bytes]] = concurrent.futures.Future()
        self._cancel = cancel

    def __repr__(self) -> str:
        state = "done" if self.done else "not done"
        return f"<hwcore Pending {self.request_id!r}, attempt {self.attempt}, {state}>"

    @property
    def key(self) -> tuple[str, int]:
        """The request's id and attempt."""
        return self.request_id, self.attempt

    @property
    def done(self) -> bool:
        """Whether :meth:`result` returns or raises at once."""
        return self.future.done()

    def result(
        self,
        timeout_s: float | None = None,
        device: torch.device | str | None = None,
        *,
        enums: EnumRegistry | None = None,
    ) -> Any:
        """Return the result's tree.

        Parameters
        ----------
        timeout_s : float, optional
            How long to wait; the request goes on. None: until its deadline.
        device, enums
            See :func:`~hwcore.diffusion.codec.unpack_tensors`.

        Raises
        ------
        RequestTimeoutError
            If there was none by the request's deadline.
        RequestError
            If there will be none; ``reason`` and ``retryable`` say more.
        PeerTimeoutError
            If there was none in ``timeout_s``.
        ClosedError
            If the client was closed before.
        """
        try:
            error = self.future.exception(timeout_s)
        except TimeoutError:
            message = (
                f"Pending.result: request {self.request_id!r} got no answer in {timeout_s} s; "
                f"expected one. Wait longer, or cancel() it."
            )
            raise PeerTimeoutError(message) from None
        if error is not None:
            raise error
        return unpack_tensors(self.future.result(), device, enums=enums)

    def cancel(self) -> None:
        """Want no result any more: :meth:`result` raises, unless it has come already."""
        self.cancelled = True
        self._cancel(self)


def checked_submit(
    where: str,
    request_id: object,
    attempt: int,
    deadline_s: object,
    skip: Sequence[RoleType],
    on_progress: object,
) -> Submit:
    """Return the message, or raise an error that names what of it cannot be sent."""
    check_callable(where, "on_progress", on_progress, "Pass a function of role and round")
    check_size(where, "attempt", attempt, 0, "Pass a count")
    if not is_number(deadline_s):
        raise ArgumentTypeError(
            describe(where, "deadline_s", deadline_s, "a number", "Pass seconds")
        )
    if not isinstance(request_id, str):
        fix = "Pass a str of your own making"
        raise ArgumentTypeError(describe(where, "request_id", request_id, "a str", fix))
    if not all(isinstance(role, RoleType) for role in skip):
        raise ArgumentTypeError(describe(where, "skip", skip, "RoleTypes", "Pass RoleTypes"))
    message = Submit(request_id, attempt, float(deadline_s), list(skip))
    try:
        messages.decode(messages.encode(message), messages.FromClient)
    except (PeerError, UnicodeEncodeError) as error:
        got = (request_id, attempt, deadline_s)
        expected = f"an id of 1 to 256 characters and seconds above 0: {error.__cause__ or error}"
        fix = "Correct it"
        what = "request_id, attempt and deadline_s"
        raise ArgumentValueError(describe(where, what, got, expected, fix)) from error
    return message
