"""GraphRunner: a step captured once for each bucket, and replayed on whatever fits into one."""

from __future__ import annotations

import collections
import dataclasses
import logging
import threading
from typing import TYPE_CHECKING, Any

import torch

import hwcore
from hwcore.errors import ArgumentTypeError, ClosedError, describe
from hwcore.fence import StreamFence
from hwcore.graphs.buffers import GraphBuffers
from hwcore.graphs.graph_set import GraphSet
from hwcore.graphs.host_inputs import HostInputs
from hwcore.graphs.prepared import Place, Prepared, Verdict
from hwcore.graphs.refusals import (
    as_tuple,
    at_least,
    misuse,
    refuse_batch,
    refuse_prepared,
    refuse_recomputed,
)
from hwcore.types import ReplayBatch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from types import TracebackType

    from hwcore.backend import Backend
    from hwcore.graphs.slots import Bucket, Slot
    from hwcore.types import Stream

__all__ = ["GraphRunner"]

_log = logging.getLogger("hwcore")
_NOTHING: frozenset[str] = frozenset()


class GraphRunner:
    """Captures a function once for each bucket and replays it on padded batches.

    A step has two calls, so that planning can overlap with the step before::

        with hw.stream_context(plan_stream):
            prepared = runner.prepare(inputs, seq_lens)      # pads, copies in
        outputs = runner.replay(prepared, recomputed={...})  # on the current stream

    ``fn(**inputs)`` gets every slot by name, in a bucket's shape, and returns tensors whose first
    dimension is the bucket's requests or tokens, and plain values, in dicts, lists and tuples, or
    what else is registered with ``torch.utils._pytree``. It runs ``warm_ups`` times and
    is captured once for each bucket, without autograd, on inputs that hold their ``fill``
    throughout: it must bear that, and what it writes (a KV cache) is written for padding too.

    **Inputs.** All buckets share one set of static buffers, so one batch at a time is prepared:
    preparing the next takes the place of one that was not replayed. Whatever streams the calls run
    on, each waits on the device, and not on the host, for the call before: an input is not
    overwritten while a replay reads it, a replay does not start before its inputs are there. Who
    writes an input in place, into ``buffers.real(...)``, waits for the last replay himself.
    A copy of host inputs blocks the host where ``host_memory_policy()`` does not say
    ``copies_ordered_with_kernels``.

    **Outputs** are views of the graphs' memory without the padded rows. They hold until the next
    replay of *any* bucket: where graphs share a pool, one's outputs may lie where another computes.
    Clone what must live longer, and return no more than is used: the outputs of all buckets stay
    allocated. A consumer on another stream waits for the replaying stream, and is itself waited for
    before the next replay; the race sanitizer sees either wait missing.

    **Padding.** The requests behind the real ones hold each slot's ``fill`` and never what an
    earlier batch left; what the function computes for them is not returned. A function may write
    into its inputs, if it does so in its warm-ups as well or by calls that torch counts
    (``add_``, ``out=``): what is seen then is made good before the next batch.

    **Devices.** Calls are made with the runner's device as the current one.

    **Threads.** One call at a time runs, the others wait for it; any thread may make it. Preparing
    in one thread and replaying in another is fine, as long as they agree whose turn it is.

    Parameters
    ----------
    fn : callable
    slots : Mapping of str to Slot
    buckets : iterable of (int, int)
        Batch size and tokens per request. A batch is padded in its size alone.
    backend : Backend, optional
        By default the process's own.
    device : torch.device, optional
        By default the backend's current one.
    warm_ups : int
        Runs before each capture, in which libraries set themselves up.
    capture_budget : int, optional
        Graphs that this process may hold, other runners' included. Default:
        ``HWCORE_CAPTURE_BUDGET``, else :data:`hwcore.graphs.budget.DEFAULT_BUDGET` on a device
        with the quirk ``capture_stream_limit``.
    static : Mapping of str to Tensor, Module, or nested list or dict of those
        What the function uses beside its inputs, weights and pools for two: each replay makes sure
        that it has not moved, at some 0.1 µs a tensor. Where weights move together or not at all,
        those of one layer are enough. See :class:`hwcore.graphs.addresses.Addresses`.
    pad_seq_len : int
        The host's length of a padded request; as the ``fill`` of the slot that holds lengths.
    progress : bool, optional
        Show a progress bar while capturing. Default: on a terminal.

    Attributes
    ----------
    buffers : GraphBuffers
    refusals : Counter of str
        How often :meth:`can_run` said no, by :attr:`Verdict.kind`.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        If an argument is not as described.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        slots: Mapping[str, Slot],
        buckets: Iterable[Bucket],
        *,
        backend: Backend | None = None,
        device: torch.device | None = None,
        warm_ups: int = 2,
        capture_budget: int | None = None,
        static: Mapping[str, Any] | None = None,
        pad_seq_len: int = 1,
        progress: bool | None = None,
    ) -> None:
        if not callable(fn):
            fix = "Pass what takes the slots by name"
            raise ArgumentTypeError(describe("GraphRunner", "`fn`", fn, "a callable", fix))
        at_least("GraphRunner", 0, warm_ups=warm_ups, pad_seq_len=pad_seq_len)
        self._hw = hw = backend or hwcore.current_backend()
        self._fn = fn
        self._pad_seq_len = pad_seq_len
        self.buffers = GraphBuffers(slots, buckets, hw, device)
        self.refusals: collections.Counter[str] = collections.Counter()
        self._set = GraphSet(hw, fn, self.buffers, warm_ups, capture_budget, static or {}, progress)
        self._fence = StreamFence(hw, self.buffers.device, [self.buffers.memory])
        self._fence.end_write(hw.current_stream(self.buffers.device))  # that filled them
        self._recompute = hw.plan_stream_policy().recompute_after_join & slots.keys()
        self._host_inputs = HostInputs(hw, self.buffers.device)
        self._places: dict[tuple[int, int], Place] = {}
        self._prepared: Prepared | None = None
        self._lock = threading.RLock()
        self._capturing = self._closed = False

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self._set.graphs)} graphs"
        return f"<hwcore GraphRunner on {self.buffers.device}, {state}>"

    def __enter__(self) -> GraphRunner:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # --- Capture --------------------------------------------------------------------------------

    def capture(self) -> None:
        """Capture a graph for every bucket, largest first, in one memory pool.

        The host waits for the device before and after.

        Raises
        ------
        CaptureError
            If a graph could not be captured: the message names the bucket, the cause is chained.
            All graphs were released then, and ``capture`` may be called again. If the budget does
            not suffice, before anything runs; if the graphs are there already; within a capture.
        StaleGraphError
            If a static tensor moved meanwhile.
        """
        with self._lock:
            self._refuse_state("capture")
            if self._set.graphs:
                got = "a runner whose graphs are there"
                misuse("capture", got, "one without", "Call recapture() to replace them")
            self._capturing = True
            try:
                self._set.capture()
            finally:
                self._capturing = False

    def recapture(self) -> None:
        """Release the graphs and capture them again, for static tensors that have moved.

        Raises
        ------
        CaptureError
            As :meth:`capture`; the graphs of before are gone then.
        """
        with self._lock:
            self._refuse_state("recapture")
            self._release()
            self.capture()

    # --- Steps ----------------------------------------------------------------------------------

    def can_run(self, batch_size: int, tokens_per_request: int = 1) -> Verdict:
        """Say whether a graph takes such a batch, and if not, why.

        A no is counted in ``refusals``, and logged the first time for each kind.

        Raises
        ------
        ArgumentValueError
            If ``batch_size`` is no int ≥ 0, or ``tokens_per_request`` none ≥ 1.
        ClosedError
        CaptureError
            Within a capture.
        """
        at_least("GraphRunner.can_run", 0, batch_size=batch_size)
        at_least("GraphRunner.can_run", 1, tokens_per_request=tokens_per_request)
        with self._lock:
            self._refuse_state("can_run")
            verdict = self._set.find(batch_size, tokens_per_request)
            if not verdict:
                self.refusals[verdict.kind] += 1
                if self.refusals[verdict.kind] == 1:
                    _log.warning("no graph replay: %s (said once)", verdict.reason)
            return verdict

    def prepare(
        self,
        inputs: Mapping[str, torch.Tensor],
        seq_lens: Sequence[int],
        tokens_per_request: int = 1,
        *,
        attention: str = "",
        plan_stream_active: bool = False,
    ) -> Prepared:
        """Copy a batch's inputs into the static buffers, padded to its bucket.

        Runs on the current stream, which may be a plan stream; the host does not wait. Nothing is
        written before every check has passed, so that after an error the batch prepared before
        can still be replayed.

        Parameters
        ----------
        inputs : Mapping of str to Tensor
            One for each slot, unpadded, of the slot's dtype; on the device or on the host, with any
            strides. See :meth:`GraphBuffers.check`. What :meth:`replay` gets as ``recomputed`` may
            be left out. Device inputs that were made on another stream are the caller's to keep
            until this one has copied them, as :meth:`PlanStream.block
            <hwcore.overlap.PlanStream.block>` does with what it is given.
        seq_lens : tuple or list of int, [batch size]
            The requests' lengths in tokens before the step's own, as the host knows them. Empty for
            a batch of padding alone, such as an idle data-parallel rank replays.
        tokens_per_request : int
            The bucket's own number.
        attention : str
            The attention kind, handed to the backend.
        plan_stream_active : bool
            The inputs were made on a side stream. Needs no saying where this call runs on
            another stream than :meth:`replay`.

        Raises
        ------
        ArgumentTypeError, ArgumentValueError
            If no bucket takes the batch; if inputs have drifted, or alias the static buffers.
        ClosedError
        CaptureError
            If nothing was captured, or within a capture.
        """
        with self._lock:
            if self._closed or self._capturing or self._hw.is_capturing():
                self._refuse_state("prepare")
            lens = seq_lens if type(seq_lens) is tuple else as_tuple("prepare", seq_lens)
            place = self._places.get((len(lens), tokens_per_request))
            if place is None:
                place = self._find_place(len(lens), tokens_per_request)
            rows = place.rows
            copies = self.buffers.check(rows, inputs)
            missing = _NOTHING
            if lens and len(inputs) < len(rows.targets):
                missing = frozenset(rows.real.keys() - inputs.keys())
            self._prepared = None  # from here on its inputs are overwritten
            stream = self._begin()
            try:
                unfinished = self.buffers.write(rows, copies)
            finally:
                self._fence.end_write(stream)
            if unfinished:
                self._host_inputs.keep(unfinished, stream)
            padded_lens = lens + place.padding_lens
            batch = ReplayBatch(rows.bucket, lens, padded_lens, attention, plan_stream_active)
            self._prepared = prepared = Prepared(batch, place, stream, missing)
            return prepared

    def replay(
        self, prepared: Prepared, recomputed: Mapping[str, torch.Tensor] | None = None
    ) -> Any:
        """Run the graph of a prepared batch on the current stream; the host does not wait.

        Parameters
        ----------
        prepared : Prepared
            The latest of :meth:`prepare`.
        recomputed : Mapping of str to Tensor, optional
            Inputs made again after the join with the plan stream, as for :meth:`prepare`. They are
            copied into their slots here, on the current stream, so that they count on every
            device; the backend gets the slots, padded, as ``batch.recomputed``, and a
            hook that copies them into ``buffers`` copies a slot onto itself.

        Returns
        -------
        outputs
            What ``fn`` returned, in containers of the same form, the tensors cut to the real
            requests or tokens. See the class on how long they hold.

        Raises
        ------
        StaleGraphError
            If a static tensor has moved since the capture. The batch is still prepared.
        ArgumentTypeError, ArgumentValueError
            If ``prepared`` is not the latest batch or was replayed; if ``recomputed`` lacks what
            was not given to ``prepare``, or what this backend does not trust after a plan stream.
        ClosedError
        CaptureError
            Within a capture.
        """
        with self._lock:
            if self._closed or self._capturing or self._hw.is_capturing():
                self._refuse_state("replay")
            if prepared is not self._prepared or prepared is None:
                refuse_prepared(prepared)
            if self._set.static is not None:
                fix = "Call recapture(), or move the tensor in place with copy_"
                self._set.static.check("GraphRunner.replay", fix)
            place, batch = prepared.place, prepared.batch
            captured = place.captured
            stream = self._begin()
            try:
                on_side = stream is not prepared.stream and stream != prepared.stream
                if on_side or recomputed or prepared.missing or batch.plan_stream_active:
                    batch = self._joined(prepared, on_side, recomputed or {}, stream)
                if captured.writes_inputs:
                    self.buffers.spoil()
                    self._prepared = None
                self._hw.graph_replay(captured.graph, captured.inputs, batch)
            finally:
                self._fence.end_write(stream)
            self._prepared = None
            return place.outputs.get()

    def run(
        self,
        inputs: Mapping[str, torch.Tensor],
        seq_lens: Sequence[int],
        tokens_per_request: int = 1,
        *,
        attention: str = "",
        or_eager: bool = False,
    ) -> Any:
        """Prepare and replay a batch; with ``or_eager``, call ``fn`` where no graph takes it.

        Arguments and outputs are those of :meth:`prepare` and :meth:`replay`. Eagerly ``fn`` gets
        copies of the unpadded inputs, on the device, and its outputs are returned as they are.

        Raises
        ------
        ArgumentValueError
            If no graph takes the batch and ``or_eager`` was not asked for. Otherwise as
            :meth:`prepare` and :meth:`replay`; inputs are checked alike in both.
        """
        lens = as_tuple("run", seq_lens)
        with self._lock:
            verdict = self.can_run(len(lens), tokens_per_request)
            if verdict:
                return self.replay(
                    self.prepare(inputs, lens, tokens_per_request, attention=attention)
                )
        if not or_eager:
            refuse_batch("run", verdict)
        with self._lock:
            given, unfinished = self.buffers.for_eager(len(lens), tokens_per_request, inputs)
            if unfinished:
                stream = self._hw.current_stream(self.buffers.device)
                self._host_inputs.keep(unfinished, stream)
        with torch.no_grad():
            return self._fn(**given)

    def close(self) -> None:
        """Wait for the device and release graphs and buffers. Once is enough.

        Raises
        ------
        CaptureError
            Within a capture.
        """
        with self._lock:
            if not self._closed:
                self._refuse_state("close")
                self._release()
                self.buffers.release()
                del self._fence
                self._closed = True

    # --- Parts ---

    def _begin(self) -> Stream:
        """Let the current stream wait for the last use of the buffers, and return it."""
        stream = self._hw.current_stream(self.buffers.device)
        self._fence.begin_write(stream)
        return stream

    def _find_place(self, batch_size: int, tokens_per_request: int) -> Place:
        """Look for a batch's bucket, once for each size."""
        verdict = self._set.find(batch_size, tokens_per_request)
        if verdict.bucket is None:
            refuse_batch("prepare", verdict)
        rows = self.buffers.rows(verdict.bucket, batch_size)
        place = Place(self._set.graphs[verdict.bucket], rows, self._pad_seq_len)
        self._places[batch_size, tokens_per_request] = place
        return place

    def _joined(
        self,
        prepared: Prepared,
        on_side: bool,
        recomputed: Mapping[str, torch.Tensor],
        stream: Stream,
    ) -> ReplayBatch:
        """Write what was recomputed into its slots, and return what the backend is told of it."""
        on_side = on_side or prepared.batch.plan_stream_active
        untrusted = self._recompute if on_side and prepared.batch.seq_lens else _NOTHING
        lacking = (prepared.missing | untrusted) - recomputed.keys()
        if lacking:
            refuse_recomputed(list(recomputed), lacking)
        rows = prepared.place.rows
        unfinished = self.buffers.write(rows, self.buffers.check(rows, recomputed))
        if unfinished:
            self._host_inputs.keep(unfinished, stream)
        given = {name: prepared.inputs[name] for name in recomputed}
        return dataclasses.replace(prepared.batch, plan_stream_active=on_side, recomputed=given)

    def _release(self) -> None:
        # Not for the replays alone: consumers of their outputs may be queued behind them.
        self._hw.synchronize(self.buffers.device)
        self._host_inputs.clear()
        self._places.clear()
        self._prepared = None
        self._set.release()

    # --- Refusals ---

    def _refuse_state(self, method: str) -> None:
        """Raise if the runner is closed, or something is being captured."""
        if self._closed:
            misuse(method, "a closed runner", "an open one", "Make a new GraphRunner", ClosedError)
        if self._capturing or self._hw.is_capturing():
            fix = "Call it before or after the capture"
            misuse(method, "a call within a capture", "one outside", fix)
