"""RoleWorker: one role's work for the router, inputs loaded ahead and outputs pushed behind.

The thread that computes takes a :class:`Job` from :meth:`RoleWorker.next` and gives its output to
:meth:`RoleWorker.finish`. Beside it, one thread loads the inputs of the jobs that follow, and some
push the outputs of those before.
"""

from __future__ import annotations

import concurrent.futures
import logging
import queue
import threading
import time
from typing import TYPE_CHECKING, Any

from hwcore.activation import current_backend
from hwcore.diffusion.codec import pack_tensors, unpack_tensors
from hwcore.diffusion.router.link import WorkerLink
from hwcore.diffusion.router.todo import Compute, Drop, Restart, Transfer
from hwcore.diffusion.serving.jobs import BUSY, Job, Phase
from hwcore.diffusion.serving.memory import close_manager, open_manager
from hwcore.diffusion.serving.outputs import send_output
from hwcore.diffusion.serving.spans import Spans
from hwcore.errors import ClosedError, PeerError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Self

    from hwcore.backend import Backend
    from hwcore.diffusion.engines import Token
    from hwcore.diffusion.enums import EnumRegistry
    from hwcore.diffusion.serving.config import WorkerConfig
    from hwcore.diffusion.serving.spans import Span
    from hwcore.types import Event, Stream

__all__ = ["Arrival", "Job", "RoleWorker"]

_log = logging.getLogger("hwcore")
_TURN_S = 0.2  # how soon a thread sees that it is to end


class Arrival:
    """An input that has come and is not loaded yet."""

    def __init__(self, worker: RoleWorker, todo: Compute) -> None:
        self._worker, self._todo = worker, todo
        self.request_id = todo.request_id

    def load(self, stream: Stream | None = None) -> tuple[Any, Event | None]:
        """Return its tree on this worker's device, and the event from which it is there.

        None: it is there. Of the host, tensors are views of this worker's pool.

        Raises
        ------
        PeerError
            If it is damaged or none.
        """
        return self._worker._load(self._todo, stream)


class RoleWorker:
    """A worker of one role.

    Parameters
    ----------
    config : WorkerConfig
    token : Token
    prepare : callable
        ``prepare(arrival) -> object``, called on the thread that loads; see :class:`Arrival`.
    backend : Backend, optional
        By default the process's own.
    enums : EnumRegistry, optional
        The enums that requests may hold.
    on_span : callable, optional
        Called with each :class:`Span`, on the thread that did it.

    Raises
    ------
    CapabilityError
        If no transfer engine works here.
    """

    def __init__(
        self,
        config: WorkerConfig,
        token: Token,
        prepare: Callable[[Arrival], Any],
        *,
        backend: Backend | None = None,
        enums: EnumRegistry | None = None,
        on_span: Callable[[Span], None] | None = None,
    ) -> None:
        self.config = config
        self._token, self._prepare, self._enums = token, prepare, enums
        self._hw = backend or current_backend()
        self._spans = Spans(config.name, on_span)
        self._lock = threading.Lock()
        self._jobs: dict[int, Job] = {}
        self._ready: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._closing = self._has_computed = False
        self._manager = open_manager(self.config, token, self._hw, enums)
        self._link = WorkerLink(
            config.router,
            token,
            name=config.name,
            role=config.role,
            memory=self._manager,
            capacity=config.capacity,
            sizes=config.slot_bytes,
        )
        threads = concurrent.futures.ThreadPoolExecutor
        self._loads = threads(1, f"{config.name}-load")
        self._pushes = threads(config.pushes, f"{config.name}-push")
        self._dispatcher = threading.Thread(
            target=self._dispatch, name=f"{config.name}-dispatch", daemon=True
        )
        self._dispatcher.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        self.close()

    # --- For the thread that computes ---

    def wait_registered(self, timeout_s: float) -> bool:
        """Wait until the router knows this worker; say whether it does."""
        return self._link.wait_registered(timeout_s)

    @property
    def is_drained(self) -> bool:
        """Whether the router gives it nothing any more, and nothing is left."""
        with self._lock:
            return self._link.draining and not self._jobs

    def next(self, timeout_s: float) -> Job | None:
        """Return the job whose turn it is, or None if none came in time.

        Raises
        ------
        ClosedError
            If the worker was closed.
        """
        if self._has_computed:  # the caller has let go of that input by now
            self._has_computed = False
            self._link.memory_freed()
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                job = self._ready.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                return None
            if job is None:
                self._ready.put(None)  # for whoever asks again
                message = "RoleWorker.next: it is closed; expected an open one. Make another."
                raise ClosedError(message)
            with self._lock:
                if job.phase is not Phase.READY:
                    continue  # dropped meanwhile
                job.phase, job.since = Phase.COMPUTING, time.monotonic()
            self._has_computed = True
            return job

    def finish(self, job: Job, output: object) -> None:
        """Give a job's output away: to the worker of the next role, or to the client.

        The tensors must not be written to afterwards.

        Raises
        ------
        ArgumentTypeError, ArgumentValueError
            If it cannot be sent. Whatever is raised, the router was told that the job failed.
        """
        self._spans.add(job.request_id, "compute", job.since)
        try:
            if job.is_last:
                frames = tuple(bytes(frame) for frame in pack_tensors(output, enums=self._enums))
            else:
                size_bytes = self._manager.size_of(output)
        except Exception as error:
            self.fail(job, error)
            raise
        job.prepared = None
        with self._lock:
            unwanted = job.is_unwanted
            if not unwanted and job.is_last:
                job.phase = Phase.SAID
            elif not unwanted:
                job.phase, job.output = Phase.HELD, output
        if unwanted:
            self._let_go(job)
        elif job.is_last:
            self._link.finished(job.number, frames)
        else:
            self._link.computed(job.number, size_bytes)

    def fail(self, job: Job, error: BaseException) -> None:
        """Report that a job failed.

        Another worker is asked, unless the input is at fault: a TypeError or a ValueError.
        """
        job.prepared = None
        with self._lock:
            job.phase, unwanted = Phase.SAID, job.is_unwanted
        if unwanted:
            self._let_go(job)
            return
        retryable = isinstance(error, PeerError) or not isinstance(error, (TypeError, ValueError))
        self._link.failed(job.number, f"{type(error).__name__}: {error}", retryable)

    def close(self) -> None:
        """End: pushes that run are waited for, what was not begun is not. Once is enough.

        The router gives what is left to other workers. To leave without that, have the router
        drain this worker first.
        """
        with self._lock:
            if self._closing:
                return
            self._closing = True
        self._ready.put(None)
        self._dispatcher.join()
        self._loads.shutdown(cancel_futures=True)
        self._pushes.shutdown(cancel_futures=True)
        self._link.close()
        with self._lock:
            for job in self._jobs.values():  # what is left lies in the pool, or views it
                job.phase, job.prepared, job.output = Phase.SAID, None, None
            self._jobs.clear()
        close_manager(self.config, self._manager)

    # --- What the router wants, on the dispatching thread ---

    def _dispatch(self) -> None:
        while not self._closing:
            todo = self._link.next(_TURN_S)
            if todo is None:
                self._manager.settle()
            elif isinstance(todo, Compute):
                deadline = time.monotonic() + todo.remaining_s
                job = Job(todo.job, todo.request_id, todo.last, deadline)
                with self._lock:
                    self._jobs[todo.job] = job
                self._loads.submit(self._take, job, todo)
            elif isinstance(todo, Transfer):
                self._pushes.submit(self._push, todo)
            elif isinstance(todo, Drop):
                self._drop(todo.job)
            elif isinstance(todo, Restart):
                self._restart()

    def _drop(self, number: int) -> None:
        with self._lock:
            job = self._jobs.get(number)
            phase = job.phase if job is not None else None
            if job is not None and phase in BUSY:
                job.is_unwanted = True  # whoever is at it lets go
            elif job is not None:
                job.phase = Phase.SAID
        if job is None:
            self._link.dropped(number)
        elif phase not in BUSY:
            self._let_go(job)
        elif phase is Phase.PUSHING:
            self._manager.abort(job.transfer_id, timeout_s=0.0)

    def _let_go(self, job: Job) -> None:
        with self._lock:
            job.phase, job.output, job.prepared = Phase.SAID, None, None
            self._jobs.pop(job.number, None)
        self._link.dropped(job.number)
        self._link.memory_freed()

    def _restart(self) -> None:
        """Begin again with memory that nobody else knows."""
        _log.warning("%s: it begins again, with another pool", self.config.name)
        close_manager(self.config, self._manager)
        self._manager = open_manager(self.config, self._token, self._hw, self._enums)
        self._link.restarted(self._manager)

    # --- Inputs, on the loading thread ---

    def _take(self, job: Job, todo: Compute) -> None:
        try:
            prepared = self._prepare(Arrival(self, todo))
        except Exception as error:  # noqa: BLE001 - whatever it is, the router is to know
            _log.warning("%s: request %s: %s", self.config.name, job.request_id, str(error))
            self.fail(job, error)
            return
        finally:
            if todo.slot is not None:  # views keep it from reuse
                self._manager.finish(todo.slot)
                self._link.memory_freed()
        with self._lock:
            unwanted = job.is_unwanted
            if not unwanted:
                job.prepared, job.phase = prepared, Phase.READY
        if unwanted:
            self._let_go(job)
        else:
            self._ready.put(job)

    def _load(self, todo: Compute, stream: Stream | None) -> tuple[Any, Event | None]:
        started = time.monotonic()
        device = None if self._hw.info.device_type == "cpu" else self._hw.device()
        event: Event | None
        if todo.slot is None:
            tree, event = unpack_tensors(todo.frames, device, enums=self._enums), None
        else:
            (seal,) = todo.frames
            tree, event = self._manager.load_tensors_async(todo.slot, seal, device, stream)
        self._spans.add(todo.request_id, "load", started)
        return tree, event

    # --- Outputs, on the pushing threads ---

    def _push(self, todo: Transfer) -> None:
        with self._lock:
            job = self._jobs.get(todo.job)
            if job is None or job.phase is not Phase.HELD:
                return  # dropped meanwhile
            job.phase = Phase.PUSHING
        sent = send_output(self._manager, self.config, job, todo, self._spans)
        with self._lock:
            unwanted, job.phase = job.is_unwanted, Phase.HELD
        if sent.is_late:  # the slot is not to be given out again before this engine is closed
            self._link.begin_again()
        if unwanted:
            self._let_go(job)
        elif sent.failure:
            self._link.push_failed(todo.job, todo.turn, sent.failure)
        else:
            self._link.pushed(todo.job, todo.turn, (sent.seal,))
