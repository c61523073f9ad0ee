"""A client of a router: requests in, results out, from any thread."""

from __future__ import annotations

import logging
import math
import secrets
import threading
import time
from typing import TYPE_CHECKING, Any, Self

from hwcore.diffusion import messages
from hwcore.diffusion.codec import pack_tensors
from hwcore.diffusion.messages import (
    Alive,
    Cancel,
    Progress,
    Refused,
    Result,
    Submit,
    ToClient,
    Unknown,
    Welcome,
)
from hwcore.diffusion.router.connection import Connection
from hwcore.diffusion.router.pending import Pending, checked_submit
from hwcore.errors import (
    ArgumentValueError,
    ClosedError,
    PeerTimeoutError,
    RequestError,
    RequestTimeoutError,
    describe,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from hwcore.diffusion.engines.token import Token
    from hwcore.diffusion.enums import EnumRegistry
    from hwcore.diffusion.roles import RoleType

__all__ = ["Pending", "RouterClient"]

_log = logging.getLogger("hwcore")
_HEARTBEAT_S = 0.2  # until the router says how often
_GRACE_S = 0.5  # beyond a deadline, for the router's own word
_LISTED = 1000  # requests in one message


class RouterClient:
    """Sends requests to a router and waits for what comes of them.

    What gets lost on the way is said again, also to a router that was started anew, until there is
    an answer or the request's deadline is over. All methods may be called from any thread.

    Parameters
    ----------
    address : str
        The router's ``client_address``.
    token : Token
        The launch's.
    client_id : str, optional
        Another client of the same id, later, gets what this one asked for. By default random.
    connect_timeout_s : float
        How long to wait for the router's first word.

    Raises
    ------
    PeerTimeoutError
        If no router answered.
    ArgumentTypeError, ArgumentValueError, CapabilityError
    """

    def __init__(
        self,
        address: str,
        token: Token,
        *,
        client_id: str | None = None,
        connect_timeout_s: float = 10.0,
    ) -> None:
        self.client_id = secrets.token_hex(8) if client_id is None else client_id
        self.address = address
        self._lock = threading.Lock()
        self._pending: dict[str, Pending] = {}
        self._closed = False
        self._welcomed = threading.Event()
        self._input_bytes, self._heartbeat_s = 0, _HEARTBEAT_S
        self._beat_at, self._end_at = 0.0, math.inf
        self._connection = Connection(
            "RouterClient",
            address,
            token,
            "client",
            self.client_id,
            ToClient,
            self._hear,
            self._turn,
            self._end,
        )
        self._loop = self._connection.loop
        self._loop.start()
        if not self._welcomed.wait(connect_timeout_s):
            self.close()
            message = (
                f"RouterClient: the router at {address} did not answer in {connect_timeout_s} s; "
                f"expected it to. See that it runs, that this is its client_address, and that both "
                f"have the same token."
            )
            raise PeerTimeoutError(message)

    def __repr__(self) -> str:
        state = ", closed" if self._closed else ""
        return f"<hwcore RouterClient {self.client_id} of {self.address}{state}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        self.close()

    @property
    def drops(self) -> dict[str, int]:
        """How many frames were dropped, by reason."""
        return self._connection.drops.counts

    def submit(
        self,
        request_id: str,
        tree: object,
        *,
        deadline_s: float,
        skip: Sequence[RoleType] = (),
        on_progress: Callable[[RoleType, int], None] | None = None,
        attempt: int = 0,
        enums: EnumRegistry | None = None,
    ) -> Pending:
        """Ask for a request to be served.

        Parameters
        ----------
        request_id : str
            1 to 256 characters. The same id and attempt again is the same request: it is computed
            once, and both get its result as long as the router keeps it.
        tree : object
            The input, for :func:`~hwcore.diffusion.codec.pack_tensors`; copied.
        deadline_s : float
            When an answer is of no use any more.
        skip : sequence of RoleType
            Of the pipeline's roles.
        on_progress : callable, optional
            Called in the client's thread with the role that begins, and the round: 1, higher where
            the request was begun anew.
        attempt : int
            Higher than before, to have a request that was refused done after all.

        Raises
        ------
        ArgumentTypeError, ArgumentValueError
            If the input cannot be sent or is too large, or the client waits for this id already.
        ClosedError
        """
        where = "RouterClient.submit"
        message = checked_submit(where, request_id, attempt, deadline_s, skip, on_progress)
        frames = tuple(bytes(frame) for frame in pack_tensors(tree, enums=enums))
        size_bytes = sum(map(len, frames))
        if size_bytes > self._input_bytes or len(frames) > messages.MOST_FRAMES:
            expected = f"at most {self._input_bytes} bytes in {messages.MOST_FRAMES} frames"
            got, fix = f"{size_bytes} bytes in {len(frames)}", "Send less, or raise max_input_bytes"
            raise ArgumentValueError(describe(where, "tree", got, expected, fix))
        pending = Pending(message, frames, on_progress, self._cancel)
        with self._lock:
            self._check("submit")
            if request_id in self._pending:
                expected, fix = "one that is not waited for", "Wait for it, or take another"
                raise ArgumentValueError(describe(where, "request_id", request_id, expected, fix))
            self._pending[request_id] = pending
        if not self._loop.call(lambda: self._submit(pending)):
            self._fail_closed(pending)
        return pending

    def close(self) -> None:
        """Cancel what is not done, and end. Once is enough."""
        with self._lock:
            self._closed = True
        self._loop.stop()

    def _check(self, what: str) -> None:
        if self._closed:
            message = f"RouterClient: {what}: it is closed; expected an open one. Open another."
            raise ClosedError(message)

    def _cancel(self, pending: Pending) -> None:
        self._loop.call(lambda: self._say_cancel(pending))

    # --- In the loop's thread ---

    def _hear(self, message: Any, frames: list[bytes], _now: float) -> None:
        if isinstance(message, Welcome):
            self._heartbeat_s, self._input_bytes = message.heartbeat_s, message.input_bytes
            self._connection.expect(self._heartbeat_s)
            self._welcomed.set()
            return
        pending = self._pending.get(message.request_id)
        if pending is None or pending.attempt != message.attempt:
            return  # answered before
        if isinstance(message, Result):
            if self._take(pending):
                pending.future.set_result(frames)
        elif isinstance(message, Refused):
            self._fail(pending, message.reason, message.text, message.retryable)
        elif isinstance(message, Unknown):
            if pending.cancelled:
                self._fail(pending, "cancelled", "its client cancelled it", False)
            else:
                self._submit(pending)
        elif isinstance(message, Progress) and pending.on_progress is not None:
            try:
                pending.on_progress(message.role, message.round)
            except Exception:  # noqa: BLE001 - the caller's, who is not here
                _log.exception("RouterClient: on_progress of %r failed", pending.request_id)

    def _turn(self, now: float) -> float:
        if now >= min(self._beat_at, self._end_at):
            pendings = list(self._pending.values())  # other threads add to it
            for pending in pendings:
                if now >= pending.deadline + _GRACE_S:
                    self._connection.send(Cancel(*pending.key))
                    text = f"no answer by its deadline, nor {_GRACE_S} s later"
                    self._fail(pending, "deadline", text, True)
            pendings = [pending for pending in pendings if not pending.done]
            ends = (pending.deadline + _GRACE_S for pending in pendings)
            self._end_at = min(ends, default=math.inf)
            if now >= self._beat_at:
                self._beat_at = now + self._heartbeat_s
                self._beat(pendings)
        return min(self._beat_at, self._end_at)

    def _beat(self, pendings: list[Pending]) -> None:
        """Say what is waited for, and what is not any more."""
        keys = [pending.key for pending in pendings]
        for start in range(0, max(1, len(keys)), _LISTED):
            self._connection.send(Alive(keys[start : start + _LISTED]))
        for pending in pendings:
            if pending.cancelled:
                self._say_cancel(pending)

    def _submit(self, pending: Pending) -> None:
        left_s = pending.deadline - time.monotonic()
        self._end_at = min(self._end_at, pending.deadline + _GRACE_S)
        if left_s > 0 and not pending.done:
            progress = pending.on_progress is not None
            said = Submit(*pending.key, left_s, pending.skip, progress)
            self._connection.send(said, pending.frames)

    def _say_cancel(self, pending: Pending) -> None:
        if not pending.done:
            self._connection.send(Cancel(*pending.key))

    def _take(self, pending: Pending) -> bool:
        """Wait for a request no more; say whether it was waited for."""
        with self._lock:
            return self._pending.pop(pending.request_id, None) is pending

    def _fail(self, pending: Pending, reason: str, text: str, retryable: bool) -> None:
        if self._take(pending):
            kind = RequestTimeoutError if reason == "deadline" else RequestError
            fix = "Ask again as another attempt" if retryable else "Change the request"
            message = (
                f"RouterClient: request {pending.request_id!r} got `{reason}` ({text}); expected a "
                f"result. {fix}."
            )
            pending.future.set_exception(kind(message, pending.request_id, reason, retryable))

    def _fail_closed(self, pending: Pending) -> None:
        if self._take(pending):
            message = (
                f"RouterClient: it was closed before request {pending.request_id!r} was done; "
                f"expected it to stay open. Wait for the result before you close it."
            )
            pending.future.set_exception(ClosedError(message))

    def _end(self) -> None:
        for pending in list(self._pending.values()):
            self._say_cancel(pending)
            self._fail_closed(pending)
