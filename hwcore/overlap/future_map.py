"""FutureMap: one step hands values to the next on the device, by rows of the request pool."""

from __future__ import annotations

import contextlib
import logging
import threading
from typing import TYPE_CHECKING

import torch

from hwcore._checks import check_instance, check_tensor, may_read
from hwcore._env import debug_enabled
from hwcore.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    CapabilityError,
    CaptureError,
    ClosedError,
    describe,
)
from hwcore.kernels import gather_rows, kernel
from hwcore.overlap.consume_once import ConsumeOnce
from hwcore.overlap.fence import StreamFence
from hwcore.overlap.relay import Output, RelayPayload, RelaySpec, Rows, as_bits, fields_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import TracebackType

    from torch import Tensor

    from hwcore.backend import Backend
    from hwcore.overlap.relay import Batch, Field
    from hwcore.types import Stream

__all__ = ["FutureMap"]

_log = logging.getLogger("hwcore")
_INDEX_DTYPES = (torch.int64, torch.int32)


class FutureMap:
    """Device buffers through which a step hands values to the next without the host.

    With overlap scheduling, step n+1 is scheduled and submitted before the host has seen the
    tokens of step n. So they stay on the device: step n writes them to the rows of its requests
    (:meth:`publish` the lengths, :meth:`stash` the rest), and step n+1 reads them there
    (:meth:`resolve_seq_lens`, :meth:`resolve`). A row is written once and read once, in turn.

    Every method orders the calling thread's current stream after the calls of before, on whatever
    stream those were: by events, at the cost of one record and, between two streams, one wait. So
    write-after-read and write-after-write hazards between a schedule and a forward stream cannot
    arise in the map, on any backend. The host waits in ``resolve_seq_lens(to_cpu=True)`` and
    :meth:`check` alone.

    Parameters
    ----------
    spec : RelaySpec
        Which values, and how large.
    backend : Backend, optional
        By default the process's own.
    device : torch.device, optional
        By default the backend's current one.
    debug : bool, optional
        Check that rows are written once and read once, in turn; by default ``HWCORE_DEBUG``.

    Attributes
    ----------
    nbytes : int
        Memory of the map: its rows, the lengths, and twice the longest batch for what ``resolve``
        returns; one row more than the pool's, to which padding is written.

    Raises
    ------
    ArgumentTypeError
        If ``spec`` is none.

    Notes
    -----
    Row 0 is the padding row of graph-padded batches. It may occur any number of times in
    ``indices``, reads as zeros, and what is written to it is dropped.

    Debugging finds on the device, without the host, a row that is read before it was written or
    read twice, written twice, in one stash twice, or out of range. The first failure is raised as
    :class:`~hwcore.errors.ConsumeOnceError` by the next ``resolve_seq_lens(to_cpu=True)`` after
    the next publish, :meth:`check` or :meth:`close`; the map goes on working. A consumed row's
    token reads -1.

    Threads may share a map; their calls come one after the other. Graph-safe: no, for the memory
    that ``resolve`` returns alternates; capture what uses it instead.

    Source: SGLang's FutureMap and its relay buffers; see ``docs/migration.md`` for its names.
    """

    def __init__(
        self,
        spec: RelaySpec,
        *,
        backend: Backend | None = None,
        device: torch.device | None = None,
        debug: bool | None = None,
    ) -> None:
        from hwcore.activation import current_backend

        check_instance("FutureMap", "spec", spec, RelaySpec, "RelaySpec(pool_size=...)")
        self.spec = spec
        self._backend = backend or current_backend()
        self._debug = debug_enabled() if debug is None else debug
        self._layout, words = fields_of(spec, guarded=self._debug)
        self._fields = {field.name: field for field in self._layout if field.name != "guard"}
        memory = torch.zeros(
            spec.pool_size + 1, words, dtype=torch.int64, device=device or self._backend.device()
        )
        self.device = memory.device
        self._rows = Rows(memory, self._layout)
        self._outputs = [
            Output(memory.new_empty(spec.batch_limit, words), self._layout) for _ in range(2)
        ]
        self._limit = spec.batch_limit
        self._seq_lens = memory.new_zeros(spec.pool_size + 1)
        held = [memory, self._seq_lens, *(output.words for output in self._outputs)]
        self.nbytes = sum(tensor.nbytes for tensor in held)
        self._gather = kernel(self._backend, gather_rows)
        self._watch = None
        if self._debug:
            self._watch = ConsumeOnce(self._backend, self._rows, spec.pool_size)
        # Of the lengths and, while debugging, of the failures up to their publish.
        self._published = memory.new_zeros(spec.batch_limit + 4)
        self._staging = self._backend.pin_memory(
            torch.zeros(spec.batch_limit + 4, dtype=torch.int64)
        )
        self._copy_stream = self._backend.create_stream(self.device)
        self._copied = self._backend.create_event(self.device)
        self._rows_fence = StreamFence(self._backend, self.device)
        self._lens_fence = StreamFence(self._backend, self.device)
        self._lock = threading.RLock()
        self._iteration = 0
        self._told_of_held = False
        self._closed = False
        # Whoever comes first, on whatever stream, comes after the buffers were filled.
        self._home = self._backend.current_stream(self.device)
        self._rows_fence.end_write(self._home)
        self._lens_fence.end_write(self._home)

    def __repr__(self) -> str:
        state = ", closed" if self._closed else ", debug" if self._debug else ""
        return f"<hwcore FutureMap of {self.spec.pool_size} rows on {self.device}{state}>"

    def __enter__(self) -> FutureMap:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None = None,
        exc: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        if exc is None:
            self.close()
        else:
            self._release()  # the program's own error is the one to see

    def publish(self, indices: Tensor, new_seq_lens: Tensor) -> None:
        """Write the sequence lengths after a step.

        Called once a step as soon as they are known, on the stream of the forward:
        :meth:`resolve_seq_lens` waits for this call and for nothing that comes after it.

        Parameters
        ----------
        indices : Tensor, int64 or int32, [bs], device
            Rows of the batch, in [0, pool_size); none twice but the padding row 0.
        new_seq_lens : Tensor, int64 or int32, [bs], device
            At least 0.

        Raises
        ------
        ArgumentTypeError, ArgumentValueError
            If a dtype, shape or device is wrong, or an index is out of range or repeated (content:
            CPU tensors; on other devices debugging finds it, and raises it later).
        ClosedError, CaptureError
        """
        where = "FutureMap.publish"
        with self._lock:
            count = self._check_indices(where, indices, unique=True)
            form = [("bs", count)]
            check_tensor(where, "new_seq_lens", new_seq_lens, _INDEX_DTYPES, form, self.device)
            with self._turn(self._lens_fence):
                if self._watch is not None:
                    with self._turn(self._rows_fence):
                        indices = self._noted(indices, writes=True)
                        self._watch.fold()
                        self._published[-4:].copy_(self._watch.record)
                if count:
                    targets = self._targets(indices)
                    self._seq_lens.index_copy_(0, targets, new_seq_lens.to(torch.int64))

    def stash(self, indices: Tensor, payload: RelayPayload) -> None:
        """Write what the next step of a batch starts from.

        Called once a step, on the stream of the forward.

        Parameters
        ----------
        indices : Tensor, int64 or int32, [bs], device
            As for :meth:`publish`.
        payload : RelayPayload
            With exactly the values that the spec has. They are copied; strides do not matter.

        Raises
        ------
        ArgumentTypeError, ArgumentValueError
            If a value is missing or the map has no place for it, or a dtype, shape or device is
            wrong; and as for :meth:`publish`. Nothing has been written then.
        ClosedError, CaptureError
        """
        where = "FutureMap.stash"
        with self._lock:
            count = self._check_indices(where, indices, unique=True)
            self._check_payload(where, payload, count)
            if not count:
                return
            with self._turn(self._rows_fence):
                targets = self._targets(self._noted(indices, writes=True))
                if self._watch is not None:
                    self._watch.write(targets, self._iteration)
                for name in self._fields:
                    value = getattr(payload, name)
                    self._rows.bits[name].index_copy_(0, targets, as_bits(value))
                if self._watch is not None:
                    self._watch.written(targets)

    def resolve(self, indices: Tensor, *, needs: Sequence[str] = ()) -> RelayPayload:
        """Read what the last step of a batch stashed: one gather, however many values there are.

        Called once a step, at its start, on the stream that needs the values first.

        Parameters
        ----------
        indices : Tensor, int64 or int32, [bs], device
            Rows of the batch, in [0, pool_size); 0 is padding, and reads as zeros.
        needs : sequence of str
            Values that the caller cannot do without.

        Returns
        -------
        RelayPayload
            Views of rows that lie side by side, so that not all are contiguous; ``hidden_states``
            and ``draft_probs`` are within a row. They alternate between two pieces of memory: a
            payload is overwritten by the second ``resolve`` after it, unless somebody still holds
            a tensor of it. Then it stays as it is, and the map takes new memory, which it logs
            once.

        Raises
        ------
        ArgumentTypeError, ArgumentValueError
            If ``indices`` are not as above (content: CPU tensors; on other devices debugging finds
            it, and raises it later), or the spec lacks a value that ``needs`` names.
        ClosedError, CaptureError

        Notes
        -----
        Another stream may read the payload after it was made to wait (:meth:`PlanStream.join
        <hwcore.overlap.PlanStream.join>` does it), if it stashes or publishes afterwards: that is
        what the next ``resolve`` waits for. A stream that never calls the map wants a copy.
        """
        where = "FutureMap.resolve"
        with self._lock:
            count = self._check_indices(where, indices, unique=False)
            for name in needs:
                self._check_held(where, name)
            self._iteration += 1
            stream = self._backend.current_stream(self.device)
            fence = self._rows_fence
            fence.begin_write(stream)  # not a read: the memory that it returns is shared as well
            try:
                batch = self._next_batch(count, stream)
                if count:
                    self._fill(where, batch, indices)
            finally:
                fence.end_write(stream)
            return batch.payload

    def resolve_seq_lens(self, indices: Tensor, *, to_cpu: bool = False) -> Tensor:
        """Read the sequence lengths that were published last.

        Called when the next step is scheduled, on the schedule stream.

        Parameters
        ----------
        indices : Tensor, int64 or int32, [bs], device
            As for :meth:`resolve`.
        to_cpu : bool
            True: the host waits, for the last publish and for what the current stream holds now;
            the copy has a stream of its own.

        Returns
        -------
        Tensor, int64, [bs]
            New memory: of the device, ordered in the current stream; or of the host, complete.

        Raises
        ------
        ConsumeOnceError
            With ``to_cpu``, while debugging, if the map was misused up to the last publish.
        ArgumentTypeError, ArgumentValueError, ClosedError, CaptureError
            As for :meth:`resolve`.
        """
        where = "FutureMap.resolve_seq_lens"
        with self._lock:
            count = self._check_indices(where, indices, unique=False)
            if _is_on_host(indices):
                self._check_range(where, indices)
            elif self._watch is not None:
                with self._turn(self._rows_fence):
                    indices = self._noted(indices, writes=False)
            if to_cpu:
                return self._copied_to_host(indices, count)
            stream = self._backend.current_stream(self.device)
            self._lens_fence.begin_read(stream)
            lens = self._seq_lens.index_select(0, indices)
            self._lens_fence.end_read(stream)
            return lens

    def discard(self, indices: Tensor) -> None:
        """Empty the rows of finished or retracted requests, whatever they hold.

        Called before a row is given to another request. Without debugging there is nothing to do:
        the next stash overwrites the row.

        Parameters
        ----------
        indices : Tensor, int64 or int32, [bs], device
            As for :meth:`publish`.

        Raises
        ------
        ArgumentTypeError, ArgumentValueError, ClosedError, CaptureError
            As for :meth:`publish`.
        """
        with self._lock:
            count = self._check_indices("FutureMap.discard", indices, unique=True)
            if count and self._watch is not None:
                with self._turn(self._rows_fence):
                    self._watch.discard(self._targets(self._noted(indices, writes=True)))

    def check(self) -> None:
        """Wait for the map's work and raise the first misuse that debugging found.

        Raises
        ------
        ConsumeOnceError
        CapabilityError
            If the map was made without debugging: there would never be anything to raise.
        ClosedError, CaptureError
        """
        with self._lock:
            self._check_usable("FutureMap.check")
            if self._watch is None:
                message = (
                    "FutureMap.check: the map was made without debugging and has noted nothing; "
                    "expected one with it. Make it with debug=True, or set HWCORE_DEBUG=1."
                )
                raise CapabilityError(message)
            self._raise_failure()

    def close(self) -> None:
        """Release the memory; while debugging, first raise as :meth:`check` does.

        A second call does nothing.
        """
        with self._lock:
            if self._closed:
                return
            try:
                if self._watch is not None:
                    self._raise_failure()
            finally:
                self._release()

    # --- Parts ---

    @contextlib.contextmanager
    def _turn(self, fence: StreamFence) -> Iterator[None]:
        """Order the current stream after all calls of before, and those to come after this."""
        stream = self._backend.current_stream(self.device)
        fence.begin_write(stream)
        try:
            yield
        finally:
            fence.end_write(stream)

    def _noted(self, indices: Tensor, *, writes: bool) -> Tensor:
        """Return the indices, those out of range replaced and noted where that is watched."""
        if self._watch is None or _is_on_host(indices):
            return indices
        return self._watch.valid(indices, self._iteration, writes)

    def _targets(self, indices: Tensor) -> Tensor:
        """Return where to write: what is meant for row 0 goes where nobody reads."""
        return indices.to(torch.int64).masked_fill(indices == 0, self.spec.pool_size)

    def _next_batch(self, count: int, stream: Stream) -> Batch:
        """Return rows of the older of the two outputs, or of a new one in its place."""
        output, newer = self._outputs
        if output.is_held():
            if not self._told_of_held:
                self._told_of_held = True
                _log.warning(
                    "FutureMap: a payload is still held when the second resolve() after it would "
                    "overwrite it; new memory is taken. Drop payloads after their step, or copy."
                )
            self._backend.record_stream(output.words, stream)
            output = Output(torch.empty_like(output.words), self._layout)
        self._outputs = [newer, output]
        return output.batch(count)

    def _fill(self, where: str, batch: Batch, indices: Tensor) -> None:
        if self._watch is not None:
            indices = self._noted(indices, writes=False)
        try:
            self._gather(self._rows.words, indices, batch.words)
        except IndexError:
            self._check_range(where, indices)
            raise
        if self._watch is not None:
            self._watch.read(batch.guards, indices, self._iteration)

    def _copied_to_host(self, indices: Tensor, count: int) -> Tensor:
        backend, copy = self._backend, self._copy_stream
        # The indices are work of the current stream.
        backend.wait_stream(copy, backend.current_stream(self.device))
        with backend.stream_context(copy):
            self._lens_fence.begin_read(copy)
            torch.index_select(self._seq_lens, 0, indices, out=self._published[:count])
            self._staging.copy_(self._published, non_blocking=True)
            self._lens_fence.end_read(copy)
            backend.record_event(self._copied, copy)
        backend.synchronize_event(self._copied)
        lens = self._staging[:count].clone()
        if self._watch is not None and int(self._staging[-4]) < 0:
            self._take(self._staging[-4:].tolist())
        return lens

    def _raise_failure(self) -> None:
        if self._watch is not None:
            with self._turn(self._rows_fence):
                self._watch.fold()
                record = self._watch.record.tolist()
            self._take(record)

    def _take(self, record: list[int]) -> None:
        """Raise a failure and forget it, here and where publish had put it."""
        if self._watch is not None and record[0] < 0:
            with self._turn(self._lens_fence), self._turn(self._rows_fence):
                self._published[-4:].zero_()
                self._watch.take(record)

    def _release(self) -> None:
        self._closed = True
        for fence in (self._rows_fence, self._lens_fence):
            fence.begin_write(self._home)  # where the memory goes back to
        self._outputs, self._watch = [], None
        del self._rows, self._seq_lens, self._published, self._staging

    # --- Checks ---

    def _check_usable(self, where: str) -> None:
        if self._closed:
            message = f"{where}: the map is closed; expected an open one. Make a new FutureMap."
            raise ClosedError(message)
        if self._backend.is_capturing():
            message = (
                f"{where}: was called inside a graph capture; expected it outside, for it orders "
                f"streams and alternates memory at each call. Capture what uses its results."
            )
            raise CaptureError(message)

    def _check_indices(self, where: str, indices: Tensor, *, unique: bool) -> int:
        """Return the batch size."""
        if self._closed or self._backend.is_capturing():
            self._check_usable(where)
        if (
            not isinstance(indices, torch.Tensor)
            or indices.dim() != 1
            or (indices.dtype is not torch.int64 and indices.dtype is not torch.int32)
            or indices.device != self.device
        ):
            check_tensor(where, "indices", indices, _INDEX_DTYPES, [("bs", None)], self.device)
        count = indices.numel()
        if count > self._limit:
            expected = f"at most {self._limit}, the spec's longest batch"
            fix = "Split the batch, or make the map with a larger max_batch_size"
            raise ArgumentValueError(describe(where, "len(indices)", count, expected, fix))
        if unique and _is_on_host(indices) and count:
            self._check_range(where, indices)
            rows = [row for row in indices.tolist() if row]
            if len(set(rows)) != len(rows):
                row = next(row for row in rows if rows.count(row) > 1)
                expected, fix = "each row once (the padding row 0 aside)", "Drop the repeats"
                raise ArgumentValueError(describe(where, "indices", row, expected, fix))
        return count

    def _check_range(self, where: str, indices: Tensor) -> None:
        rows = indices.tolist() if may_read(indices) else []
        for place, row in enumerate(rows):
            if not 0 <= row < self.spec.pool_size:
                expected = f"a row of the pool, in [0, {self.spec.pool_size})"
                what, fix = f"indices[{place}]", "Pass rows of the request pool"
                raise ArgumentValueError(describe(where, what, row, expected, fix))

    def _check_held(self, where: str, name: str) -> Field:
        if name not in self._fields:
            expected = f"one of {', '.join(sorted(self._fields))}, which the spec has"
            fix = "Make the map with a RelaySpec that sizes it"
            raise ArgumentValueError(describe(where, "value", name, expected, fix))
        return self._fields[name]

    def _check_payload(self, where: str, payload: RelayPayload, count: int) -> None:
        check_instance(where, "payload", payload, RelayPayload, "RelayPayload(next_token=...)")
        for name in RelayPayload.__slots__:
            value = getattr(payload, name)
            if value is None:
                if name in self._fields:
                    expected = "a tensor, for the spec has it"
                    fix = "Pass it with each stash, or leave it out of the spec"
                    raise ArgumentTypeError(describe(where, name, None, expected, fix))
                continue
            field = self._check_held(where, name)
            sizes = [("bs", count), *((name, size) for size in field.shape)]
            check_tensor(where, name, value, (field.dtype,), sizes, self.device)


def _is_on_host(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"
