"""A worker's way to its router: its mind on a socket, with a clock, in a thread of its own."""

from __future__ import annotations

import queue
import threading
import time
from typing import TYPE_CHECKING, Any, Self

from hwcore._checks import check_size
from hwcore.diffusion import messages
from hwcore.diffusion.messages import FromRouter, Registered
from hwcore.diffusion.roles import RoleType
from hwcore.diffusion.router.config import MOST_BYTES
from hwcore.diffusion.router.connection import Connection
from hwcore.diffusion.router.worker_core import WorkerCore
from hwcore.errors import ArgumentTypeError, ArgumentValueError, ClosedError, describe

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from hwcore.diffusion.engines.token import Token
    from hwcore.diffusion.router.todo import Todo, WorkerMemory

__all__ = ["WorkerLink"]

_MOST = 4096  # what one message names


class WorkerLink:
    """Takes work from a router, and reports what became of it.

    The owner takes what is to be done from :meth:`next`, in order, and reports by the other
    methods, from any thread. Heartbeats go on whatever the owner does; one that hangs is found out
    by the time its jobs take.

    Parameters
    ----------
    router_address : str
        The router's ``worker_address``.
    token : Token
        The launch's.
    name : str
        The worker's own. Of two that have the same the first stays, as long as it is connected.
    role : RoleType
    memory : WorkerMemory
    capacity : int
        Jobs that it takes at a time, computing and waiting to be pushed.
    sizes : sequence of int
        Slots that it grants from the beginning, in bytes.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError, CapabilityError
    """

    def __init__(
        self,
        router_address: str,
        token: Token,
        *,
        name: str,
        role: RoleType,
        memory: WorkerMemory,
        capacity: int,
        sizes: Sequence[int] = (),
    ) -> None:
        where = "WorkerLink"
        if not isinstance(role, RoleType):
            raise ArgumentTypeError(describe(where, "role", role, "a RoleType", "Pass one"))
        check_size(where, "capacity", capacity, 1, "Pass how many jobs it takes at a time")
        if max(capacity, len(sizes)) > _MOST:
            got, fix = (capacity, len(sizes)), "Pass less"
            what, expected = "(capacity, len(sizes))", f"at most {_MOST} of each"
            raise ArgumentValueError(describe(where, what, got, expected, fix))
        for size_bytes in sizes:
            check_size(where, "sizes", size_bytes, 0, "Pass bytes")
        self.name, self.role = name, role
        # Above any epoch before under the name, of other processes too; the router helps where a
        # clock was set back.
        self._core = WorkerCore(
            role,
            time.time_ns(),
            memory.address,
            memory.engine_id,
            capacity,
            memory.size_bytes,
            memory,
            sizes,
        )
        self._todo: queue.SimpleQueue[Todo | None] = queue.SimpleQueue()
        self._registered = threading.Event()
        self._closed = False
        self._result_bytes = MOST_BYTES
        self._connection = Connection(
            where,
            router_address,
            token,
            "worker",
            name,
            FromRouter,
            self._hear,
            self._turn,
            lambda: None,
        )
        self._loop = self._connection.loop
        self._loop.start()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "registered" if self.registered else "not registered"
        return f"<hwcore WorkerLink {self.name} ({self.role}), {state}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        self.close()

    # --- For its owner: from any thread ---

    @property
    def registered(self) -> bool:
        """Whether the router knows it."""
        return self._registered.is_set()

    @property
    def draining(self) -> bool:
        """Whether it gets no new work."""
        return self._core.draining

    @property
    def drops(self) -> dict[str, int]:
        """How many frames were dropped, by reason."""
        return self._connection.drops.counts

    def wait_registered(self, timeout_s: float) -> bool:
        """Wait until the router knows it; say whether it does."""
        return self._registered.wait(timeout_s)

    def next(self, timeout_s: float | None) -> Todo | None:
        """Return what is to be done next, or None if there was nothing in time.

        Raises
        ------
        ClosedError
        """
        if self._closed:
            self._raise_closed("next")
        try:
            todo = self._todo.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if todo is None:
            self._todo.put(None)  # for other threads that wait
            self._raise_closed("next")
        return todo

    def computed(self, job: int, size_bytes: int) -> None:
        """Report that a job's output is ready to be pushed."""
        check_size("WorkerLink.computed", "size_bytes", size_bytes, 0, "Pass the layout's size")
        self._report(lambda: self._core.computed(job, size_bytes))

    def finished(self, job: int, frames: Sequence[Any]) -> None:
        """Report the result of a job that was the last of its request; it is copied.

        One that the router does not take fails the request, with both sizes named.
        """
        taken = tuple(bytes(frame) for frame in frames)
        self._report(lambda: self._finished(job, taken))

    def failed(self, job: int, text: str, retryable: bool) -> None:
        """Report that a job failed; ``retryable`` if another worker might do better."""
        said = _sayable(text)
        self._report(lambda: self._core.failed(job, said, retryable))

    def pushed(self, job: int, turn: int, frames: Sequence[Any]) -> None:
        """Report that an output is in its slot; ``frames`` is its manifest, one of 1 MiB at most.

        Otherwise the push counts as failed.
        """
        taken = tuple(bytes(frame) for frame in frames)
        self._report(lambda: self._pushed(job, turn, taken))

    def push_failed(self, job: int, turn: int, text: str) -> None:
        """Report that an output is not there, and that nothing of it is being written any more."""
        said = _sayable(text)
        self._report(lambda: self._core.push_failed(job, turn, said))

    def dropped(self, job: int) -> None:
        """Report that nothing is left of a job, and nothing of it will be written."""
        self._report(lambda: self._core.dropped(job))

    def restarted(self, memory: WorkerMemory) -> None:
        """Report the new memory after a ``Restart``."""
        self._report(lambda: self._core.restarted(memory.address, memory.engine_id, memory))

    def begin_again(self) -> None:
        """Give everything up and begin again under a new epoch, with a ``Restart`` to be done.

        For an owner that cannot say what its engine still writes: to the router it is as if this
        worker had died.
        """
        self._report(self._core.reset)

    def memory_freed(self) -> None:
        """Report that memory has become free: slots that are wanted may be granted."""
        self._report(self._core.grant)

    def close(self) -> None:
        """End. The router takes the worker for dead after a while. Once is enough."""
        self._closed = True
        self._loop.stop()
        self._todo.put(None)

    def _report(self, call: Callable[[], None]) -> None:
        if self._closed or not self._loop.call(call):
            self._raise_closed("a report")

    def _raise_closed(self, what: str) -> None:
        message = (
            f"WorkerLink {self.name}: {what}: it is closed; expected an open one. Open another."
        )
        raise ClosedError(message)

    # --- In the loop's thread ---

    def _finished(self, job: int, frames: tuple[bytes, ...]) -> None:
        size_bytes = sum(map(len, frames))
        if not frames or len(frames) > messages.MOST_FRAMES or size_bytes > self._result_bytes:
            text = f"the result takes {size_bytes} bytes in {len(frames)} frames, and the router "
            text += f"takes {self._result_bytes} in 1 to {messages.MOST_FRAMES}; raise its "
            self._core.failed(job, text + "max_result_bytes", retryable=False)
        else:
            self._core.finished(job, frames)

    def _pushed(self, job: int, turn: int, frames: tuple[bytes, ...]) -> None:
        size_bytes = sum(map(len, frames))
        if len(frames) == 1 and size_bytes <= messages.LARGEST:
            self._core.pushed(job, turn, frames)
        else:
            text = f"the manifest takes {size_bytes} bytes in {len(frames)} frames, and the router "
            text += f"takes {messages.LARGEST} in 1; send fewer tensors"
            self._core.push_failed(job, turn, text)

    def _hear(self, message: Any, frames: list[bytes], now: float) -> None:
        if isinstance(message, Registered):
            self._result_bytes = message.result_bytes
            self._connection.expect(message.heartbeat_s)
        self._core.from_router(message, frames, now)
        self._flush()

    def _turn(self, now: float) -> float:
        if now >= self._core.due:
            self._core.tick(now)
        self._flush()
        return self._core.due

    def _flush(self) -> None:
        core = self._core
        for todo in core.todo():  # first what somebody waits for
            self._todo.put(todo)
        for message, frames in core.take():
            self._connection.send(message, frames)
        if core.is_registered != self._registered.is_set():
            (self._registered.set if core.is_registered else self._registered.clear)()


def _sayable(text: object) -> str:
    """Return a text without what UTF-8 has no form for, such as bytes of a file's name."""
    return str(text).encode(errors="replace").decode()
