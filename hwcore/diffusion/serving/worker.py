"""RoleWorker: one role's work for the router, inputs loaded ahead and outputs pushed behind.

The thread that computes takes a :class:`Job` from :meth:`RoleWorker.next` and gives its output to
:meth:`RoleWorker.finish`. Beside it, one thread loads the inputs of the jobs that follow, and some
push the outputs of those before.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import queue
import threading
import time
from typing import TYPE_CHECKING, Any

from hwcore.activation import current_backend
from hwcore.diffusion.codec import pack_tensors
from hwcore.diffusion.router.link import WorkerLink
from hwcore.diffusion.router.todo import Compute, Drop, Restart, Transfer
from hwcore.diffusion.serving.inputs import Arrival
from hwcore.diffusion.serving.jobs import BUSY, Job, Phase
from hwcore.diffusion.serving.memory import close_manager, open_manager
from hwcore.diffusion.serving.outputs import send_output
from hwcore.diffusion.serving.spans import Spans
from hwcore.errors import ClosedError, PeerError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType
    from typing import Self

    from hwcore.backend import Backend
    from hwcore.diffusion.engines import Token
    from hwcore.diffusion.enums import EnumRegistry
    from hwcore.diffusion.serving.config import WorkerConfig
    from hwcore.diffusion.serving.spans import Span

__all__ = ["RoleWorker"]

_log = logging.getLogger("hwcore")
_TURN_S = 0.2  # how soon a thread sees that it is to end


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
        self._is_host = self._hw.info.device_type == "cpu"
        self._spans = Spans(config.name, on_span)
        self._lock = threading.Lock()
        self._jobs: dict[int, Job] = {}
        self._ready: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._closing = self._has_computed = False
        self._why_closed = "it is closed"
        # Not the one that computes: what is computed next would be waited for.
        self._push_stream = None if self._is_host else self._hw.create_stream()
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
                why = self._why_closed
                message = f"RoleWorker.next: {why}; expected an open one. Make another."
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
        if not (self._is_host or job.is_last):
            job.computed = self._hw.create_event()
            self._hw.record_event(job.computed)
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
        try:
            self._dispatch_all()
        except Exception as error:  # noqa: BLE001 - its owner is told
            _log.exception("%s: it cannot go on", self.config.name)
            self._why_closed = f"it broke: {error}"
            self._ready.put(None)

    def _dispatch_all(self) -> None:
        while not self._closing:
            todo = self._link.next(_TURN_S)
            if todo is None:
                self._manager.settle()
            elif isinstance(todo, Compute):
                job = Job(todo.job, todo.request_id, todo.last)
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
        arrival = Arrival(todo, self._manager, self._hw, self._enums, self._spans)
        failure: Exception | None = None
        try:
            prepared = self._prepare(arrival)
        except Exception as error:  # noqa: BLE001 - whatever it is, the router is to know
            _log.warning("%s: request %s: %s", self.config.name, job.request_id, str(error))
            failure = error
        if todo.slot is not None:  # views keep it from reuse
            self._manager.finish(todo.slot)
            self._link.memory_freed()
        if failure is not None:
            self.fail(job, failure)
            return
        with self._lock:
            unwanted = job.is_unwanted
            if not unwanted:
                job.prepared, job.phase = prepared, Phase.READY
        if unwanted:
            self._let_go(job)
        else:
            self._ready.put(job)

    # --- Outputs, on the pushing threads ---

    def _push(self, todo: Transfer) -> None:
        with self._lock:
            job = self._jobs.get(todo.job)
            if job is None or job.phase is not Phase.HELD:
                return  # dropped meanwhile
            job.phase = Phase.PUSHING
        with self._after(job):
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

    @contextlib.contextmanager
    def _after(self, job: Job) -> Iterator[None]:
        """Copy on a stream of its own, after what the job computed and nothing that came later."""
        if self._push_stream is None or job.computed is None:
            yield
            return
        self._hw.wait_event(job.computed, self._push_stream)
        with self._hw.stream_context(self._push_stream):
            yield
