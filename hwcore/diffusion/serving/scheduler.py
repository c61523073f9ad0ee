"""SchedulerDisaggMixin: what makes a role of a diffusion scheduler."""

from __future__ import annotations

import logging
import threading
import traceback
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree

from hwcore._checks import check_instance
from hwcore.activation import current_backend
from hwcore.diffusion.serving.config import WorkerConfig
from hwcore.diffusion.serving.ranks import Command, RankGroup
from hwcore.diffusion.serving.request import DiffusionRequest, schedule_for
from hwcore.diffusion.serving.worker import RoleWorker
from hwcore.errors import ClosedError, PeerError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from hwcore.backend import Backend
    from hwcore.diffusion.engines import Token
    from hwcore.diffusion.enums import EnumRegistry
    from hwcore.diffusion.serving.inputs import Arrival
    from hwcore.diffusion.serving.jobs import Job
    from hwcore.diffusion.serving.spans import Span
    from hwcore.types import Event, Stream

__all__ = ["SchedulerDisaggMixin"]

_log = logging.getLogger("hwcore")
_TURN_S = 0.5  # how soon the loop sees that it is to end, and says a word to the other ranks


class SchedulerDisaggMixin:
    """A scheduler that mixes this in serves one role of a disaggregated pipeline.

    It overrides :meth:`disagg_compute`, calls :meth:`_init_disagg_state` once, and then runs
    :meth:`_disagg_prefetch_event_loop` on the thread that computes. On a role of several ranks all
    of them do so; rank 0 alone has a pool and talks to the router.

    Attributes
    ----------
    disagg_schedule : object or None
        The pipeline's noise schedule; every request gets a copy. None: the role needs none.
    disagg_enums : EnumRegistry or None
        The enums that requests may hold; the same on all roles and clients.

    Notes
    -----
    The names are those of SGLang's mixin of the same name; what differs: a job that fails is told
    to the router, and the loop goes on; the next input is loaded while this one is computed on any
    role; all ranks learn that one of them failed.
    """

    disagg_schedule: Any = None
    disagg_enums: EnumRegistry | None = None

    # --- What a scheduler overrides ---

    def disagg_compute(self, request: DiffusionRequest) -> DiffusionRequest:
        """Do the role's part of a request; return what is handed on.

        Tensors of ``request`` are on the device; the current stream has waited for them. On the
        host they are views of the pool: what is kept beyond the request keeps its memory.
        """
        message = f"{type(self).__name__} has to override disagg_compute"
        raise NotImplementedError(message)

    def disagg_span(self, span: Span) -> None:
        """Take note of what was done for a request, and when; on the thread that did it."""

    def _disagg_tree(self, request: DiffusionRequest, is_last: bool) -> Any:
        """Return what is sent of a request; the last role sends the client its fields."""
        return request.fields if is_last else request.to_tree()

    def _build_disagg_req(self, request_id: str, tree: object) -> DiffusionRequest:
        """Return the request that :meth:`_disagg_tree` made; its tensors may not have come yet."""
        return DiffusionRequest.from_tree(request_id, tree)

    # --- Beginning and end ---

    def _init_disagg_state(
        self,
        config: WorkerConfig,
        token: Token,
        *,
        backend: Backend | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        """Become a role; on rank 0, or the only one, open the pool and register with the router.

        Parameters
        ----------
        config : WorkerConfig
        token : Token
            The launch's.
        backend : Backend, optional
            By default the process's own.
        group : ProcessGroup, optional
            The ranks that compute this role together.
        """
        check_instance("_init_disagg_state", "config", config, WorkerConfig, "WorkerConfig()")
        self._disagg_config, self._disagg_token = config, token
        self._disagg_hw: Backend = backend or current_backend()
        self._disagg_stopping = threading.Event()
        self._disagg_ranks = (
            RankGroup(group, self._disagg_hw, enums=self.disagg_enums)
            if group is not None
            else None
        )
        self._transfer_stream: Stream | None = None
        self._disagg_worker: RoleWorker | None = None
        if self._disagg_ranks is None or self._disagg_ranks.is_source:
            self._init_disagg_transfer_manager()

    def _init_disagg_transfer_manager(self) -> None:
        """Open the pool, its engine and the stream that inputs are loaded on, and register."""
        if self._disagg_hw.info.device_type != "cpu":
            self._transfer_stream = self._disagg_hw.create_stream()
        self._disagg_worker = RoleWorker(
            self._disagg_config,
            self._disagg_token,
            self._prefetch_transfer_ready,
            backend=self._disagg_hw,
            enums=self.disagg_enums,
            on_span=self.disagg_span,
        )

    def wait_registered(self, timeout_s: float) -> bool:
        """Wait until the router knows this role; say whether it does. On rank 0."""
        assert self._disagg_worker is not None
        return self._disagg_worker.wait_registered(timeout_s)

    def stop_disagg(self) -> None:
        """Have the loop end after the request that it is at. From any thread, or a signal."""
        self._disagg_stopping.set()

    def _cleanup_disagg(self) -> None:
        """Tell the other ranks that nothing comes any more, then close the worker."""
        try:
            if self._disagg_ranks is not None and self._disagg_ranks.is_source:
                self._disagg_ranks.send(Command.STOP)
        finally:
            if self._disagg_worker is not None:
                self._disagg_worker.close()

    # --- Requests ---

    def _prefetch_transfer_ready(self, arrival: Arrival) -> tuple[DiffusionRequest, Event | None]:
        """Load an input and build its request, on the loading thread, while another is computed.

        The noise schedule is left to the thread that computes: it is made from a template that the
        request before may still be using.
        """
        tree, event = arrival.load(self._transfer_stream)
        return self._build_disagg_req(arrival.request_id, tree), event

    def _init_disagg_request_scheduler(self, request: DiffusionRequest) -> None:
        """Give a request its generators, and a noise schedule as its steps or sigmas say.

        On the thread that computes, when the input is there.
        """
        request.restore_generators(self._disagg_hw)
        if self.disagg_schedule is not None:
            device = self._disagg_hw.device()
            request.scheduler = schedule_for(self.disagg_schedule, request, device)

    def _broadcast_req_to_all_ranks(self, request: DiffusionRequest) -> DiffusionRequest:
        """Give every other rank of the role the request that rank 0 has; return it."""
        if self._disagg_ranks is not None:
            tree = {"id": request.request_id, "tree": self._disagg_tree(request, is_last=False)}
            self._disagg_ranks.send(Command.COMPUTE, tree)
        return request

    # --- The loop ---

    def _disagg_prefetch_event_loop(self) -> None:
        """Compute what comes until :meth:`stop_disagg`, or until the router has drained this role.

        Raises
        ------
        PeerError
            If a rank of the role is gone: the others cannot compute without it.
        """
        try:
            if self._disagg_worker is None:
                self._disagg_follow()
            else:
                self._disagg_lead(self._disagg_worker)
        except PeerError:
            self._disagg_ranks = None  # there is nobody to say goodbye to
            raise
        finally:
            self._cleanup_disagg()

    def _disagg_lead(self, worker: RoleWorker) -> None:
        while not self._disagg_stopping.is_set() and not worker.is_drained:
            try:
                job = worker.next(_TURN_S)
            except ClosedError:
                return
            if job is not None:
                try:
                    self._disagg_do(worker, job)
                except PeerError as error:
                    worker.fail(job, error)
                    raise
            elif self._disagg_ranks is not None:
                self._disagg_ranks.send(Command.WAIT)

    def _disagg_do(self, worker: RoleWorker, job: Job) -> None:
        """Compute one job on all ranks, and say how it went."""
        request, event = job.prepared
        self._disagg_take_over(request, event)
        self._broadcast_req_to_all_ranks(request)
        output, failure = self._disagg_compute_guarded(request, job.is_last)
        if self._disagg_ranks is not None and self._disagg_ranks.any_failed(failure is not None):
            failure = failure or RuntimeError("another rank of the role failed; see its log")
        if failure is not None:
            worker.fail(job, failure)
            return
        try:
            worker.finish(job, output)
        except Exception as error:  # noqa: BLE001 - the router knows; the role goes on
            name = self._disagg_config.name
            _log.warning("%s: request %s: %s", name, job.request_id, str(error))

    def _disagg_follow(self) -> None:
        """Compute what rank 0 says."""
        assert self._disagg_ranks is not None
        while True:
            command, tree = self._disagg_ranks.receive()
            if command is Command.STOP:
                return
            if command is Command.COMPUTE:
                request = self._build_disagg_req(tree["id"], tree["tree"])
                _, failure = self._disagg_compute_guarded(request, is_last=False)
                self._disagg_ranks.any_failed(failure is not None)

    def _disagg_compute_guarded(
        self, request: DiffusionRequest, is_last: bool
    ) -> tuple[Any, Exception | None]:
        """Compute; return what is to be sent, or what went wrong."""
        try:
            self._init_disagg_request_scheduler(request)
            return self._disagg_tree(self.disagg_compute(request), is_last), None
        except Exception as error:  # noqa: BLE001 - told to the router; the role goes on
            name = self._disagg_config.name
            # As text: whoever keeps the record does not keep the frames, and so the input's memory.
            text = traceback.format_exc()
            _log.warning("%s: request %s failed:\n%s", name, request.request_id, text)
            return None, _without_frames(error)

    def _disagg_take_over(self, request: DiffusionRequest, event: Event | None) -> None:
        """Order the current stream after the load, and let it free what was loaded."""
        if event is None:
            return
        stream = self._disagg_hw.current_stream()
        self._disagg_hw.wait_event(event, stream)
        for leaf in _pytree.tree_leaves(self._disagg_tree(request, is_last=False)):
            if isinstance(leaf, torch.Tensor) and not leaf.is_cpu:
                self._disagg_hw.record_stream(leaf, stream)


def _without_frames(error: Exception) -> Exception:
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)
