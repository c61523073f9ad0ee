"""FutureMap: one step hands values to the next on the device, by rows of the request pool."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

import torch

from hwcore._checks import check_instance, check_tensor
from hwcore._env import debug_enabled
from hwcore.errors import CapabilityError, CaptureError, ClosedError
from hwcore.fence import StreamFence
from hwcore.kernels import explain_missing, gather_rows, kernel, torch_ops
from hwcore.overlap.checks import (
    INDEX_DTYPES,
    check_batch,
    check_needs,
    check_payload,
    check_range,
    check_rows_once,
    check_switch,
    is_on_host,
)
from hwcore.overlap.consume_once import ConsumeOnce
from hwcore.overlap.outputs import Outputs
from hwcore.overlap.relay import RelayPayload, RelaySpec, Rows, as_bits, fields_of
from hwcore.overlap.seq_lens import SeqLens

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import TracebackType

    from torch import Tensor

    from hwcore.backend import Backend
    from hwcore.overlap.outputs import Batch

__all__ = ["FutureMap"]


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
        Device memory of the map: its rows and one more, to which padding is written; twice the
        longest batch for what ``resolve`` returns; the lengths; what debugging notes.

    Raises
    ------
    ArgumentTypeError
        If ``spec`` is none.

    Notes
    -----
    Row 0 is the padding row of graph-padded batches. It may occur any number of times in
    ``indices``, reads as zeros, and what is written to it is dropped.

    Debugging finds on the device, without the host, a row that is read before it was written, read
    twice by two calls, written twice, in one stash twice, or out of range. The first failure is
    raised as :class:`~hwcore.errors.ConsumeOnceError` by the next ``resolve_seq_lens(to_cpu=True)``
    after the next publish, :meth:`check` or :meth:`close`; the map goes on working. A consumed
    row's token reads -1. An iteration is a ``resolve`` and what follows it.

    Threads may share a map; their calls come one after the other. Graph-safe: no, for the memory
    that ``resolve`` returns alternates; capture what uses it instead. Not inside
    ``torch.compile(fullgraph=True)``.

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
        check_switch("FutureMap", "debug", debug)
        self.spec = spec
        self._limit = spec.batch_limit
        self._backend = backend or current_backend()
        self._debug = debug_enabled() if debug is None else debug
        fields, words = fields_of(spec, guarded=self._debug)
        self._fields = {field.name: field for field in fields if field.name != "guard"}
        device = device or self._backend.device()
        # Outside of inference mode, whose tensors take no writes after it.
        with torch.inference_mode(False), torch.no_grad():
            # One row more than the pool's: what is written for padding goes there.
            memory = torch.zeros(spec.pool_size + 1, words, dtype=torch.int64, device=device)
            self.device = memory.device
            self._rows = Rows(memory, fields)
            self._pool = memory[: spec.pool_size]
            self._watch = ConsumeOnce(self._backend, self._rows, spec) if self._debug else None
            self._seq_lens = SeqLens(
                self._backend,
                spec.pool_size + 1,
                spec.batch_limit,
                ConsumeOnce.NUMBERS,
                self.device,
            )
        self._outputs = Outputs(self._backend, memory, spec.batch_limit, fields)
        held = (memory, *(self._watch.memory if self._watch is not None else ()))
        self.nbytes = self._outputs.nbytes + self._seq_lens.nbytes + sum(t.nbytes for t in held)
        self._gather = kernel(self._backend, gather_rows)
        self._ops = torch_ops(self._backend)
        self._fence = StreamFence(self._backend, self.device, held)
        self._lock = threading.RLock()
        self._iteration = 0
        self._closed = False
        # Whoever comes first, on whatever stream, comes after the buffers were filled.
        stream = self._backend.current_stream(self.device)
        self._fence.end_write(stream)
        self._seq_lens.fence.end_write(stream)

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
            with self._lock:
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
            Not looked at.

        Raises
        ------
        ArgumentTypeError, ArgumentValueError
            If a dtype, shape or device is wrong, or an index is out of range or repeated (content:
            CPU tensors; on other devices debugging finds what is out of range, and what a stash
            repeats, and raises it later).
        ClosedError, CaptureError
        """
        where = "FutureMap.publish"
        with self._lock:
            count = self._check_batch(where, indices)
            check_rows_once(where, indices, self.spec.pool_size)
            form = [("bs", count)]
            check_tensor(where, "new_seq_lens", new_seq_lens, INDEX_DTYPES, form, self.device)
            with self._turn(self._seq_lens.fence):
                if self._watch is not None:
                    with self._turn(self._fence):
                        indices = self._noted(indices)
                        self._watch.fold()
                        self._seq_lens.note.copy_(self._watch.record)
                if count:
                    targets = self._targets(indices)
                    self._seq_lens.write(targets, new_seq_lens.to(torch.int64))

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
            If a value is missing or the map has no place for it, or a dtype, layout, shape or
            device is wrong; and as for :meth:`publish`. Nothing has been written then.
        ClosedError, CaptureError
        """
        where = "FutureMap.stash"
        with self._lock:
            count = self._check_batch(where, indices)
            check_rows_once(where, indices, self.spec.pool_size)
            check_payload(where, payload, self._fields, count, self.device)
            if not count:
                return
            bits = {name: as_bits(getattr(payload, name)) for name in self._fields}
            with self._turn(self._fence):
                targets = self._targets(self._noted(indices))
                if self._watch is not None:
                    self._watch.write(targets, self._iteration)
                for name, value in bits.items():
                    self._ops.index_copy_(self._rows.bits[name], 0, targets, value)
                if self._watch is not None:
                    self._watch.written(targets)
                    self._watch.fold()

    def resolve(self, indices: Tensor, *, needs: Sequence[str] = ()) -> RelayPayload:
        """Read what the last step of a batch stashed: one gather, however many values there are.

        Called once a step, at its start, on the stream that needs the values first.

        Parameters
        ----------
        indices : Tensor, int64 or int32, [bs], device
            Rows of the batch, in [0, pool_size); 0 is padding, and reads as zeros. A row that is
            there twice is read for both; it is the stash of such a batch that finds it.
        needs : sequence of str
            Values that the caller cannot do without.

        Returns
        -------
        RelayPayload
            Views of rows that lie side by side, so that not all are contiguous; ``hidden_states``
            and ``draft_probs`` are within a row. They alternate between two pieces of memory: a
            payload is overwritten by the second ``resolve`` after it, unless somebody still holds
            a tensor of it. Then it stays as it is, and the map takes new memory, which it logs
            once. The tensors are the map's own objects: change what they hold if you like, but
            not their shape or memory (``unsqueeze_``, ``resize_``, ``set_``).

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
            count = self._check_batch(where, indices)
            if needs:
                check_needs(where, needs, self._fields)
            self._iteration += 1
            stream, fence = self._backend.current_stream(self.device), self._fence
            fence.begin_write(stream)  # not a read: the memory that it returns is shared as well
            try:
                batch = self._outputs.next(count, stream)
                if count:
                    self._fill(where, batch, indices)
            except NotImplementedError as error:
                explain_missing(self._backend, error)
                raise
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
            self._check_batch(where, indices)
            if is_on_host(indices):
                check_range(where, indices, self.spec.pool_size)
            elif self._watch is not None:
                with self._turn(self._fence):
                    indices = self._noted(indices)
                    self._watch.fold()
            try:
                if not to_cpu:
                    return self._seq_lens.read(indices)
                lens, note = self._seq_lens.to_host(indices)
            except NotImplementedError as error:
                explain_missing(self._backend, error)
                raise
            self._take(note.tolist())
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
            count = self._check_batch("FutureMap.discard", indices)
            check_rows_once("FutureMap.discard", indices, self.spec.pool_size)
            if count and self._watch is not None:
                with self._turn(self._fence):
                    self._watch.discard(self._targets(self._noted(indices)))
                    self._watch.fold()

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

        A second call does nothing. Payloads that were handed out stay whole.

        Raises
        ------
        ConsumeOnceError
        CaptureError
            Within a capture; the map is not closed then.
        """
        with self._lock:
            if self._closed:
                return
            self._check_usable("FutureMap.close")
            try:
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
        except NotImplementedError as error:
            explain_missing(self._backend, error)
            raise
        finally:
            fence.end_write(stream)

    def _noted(self, indices: Tensor) -> Tensor:
        """Return the indices, those out of range replaced and noted where that is watched."""
        if self._watch is None or is_on_host(indices) or not indices.numel():
            return indices
        return self._watch.valid(indices, self._iteration)

    def _targets(self, indices: Tensor) -> Tensor:
        """Return where to write: what is meant for row 0 goes where nobody reads."""
        return indices.to(torch.int64).masked_fill(indices == 0, self.spec.pool_size)

    def _fill(self, where: str, batch: Batch, indices: Tensor) -> None:
        indices = self._noted(indices)
        try:
            self._gather(self._pool, indices, batch.words)
        except IndexError:
            check_range(where, indices, self.spec.pool_size)
            raise
        if self._watch is not None and batch.guards is not None:
            self._watch.read(batch.guards, indices, self._iteration)

    def _raise_failure(self) -> None:
        if self._watch is not None:
            with self._turn(self._fence):
                self._watch.fold()
                record = self._watch.record.tolist()
            self._take(record)

    def _take(self, record: list[int]) -> None:
        """Raise a failure and forget it, here and where publish had put it."""
        if self._watch is not None and record[0] < 0:
            with self._turn(self._seq_lens.fence), self._turn(self._fence):
                self._seq_lens.note.zero_()
                self._watch.take(record)

    def _release(self) -> None:
        if not self._closed:
            self._closed = True
            self._watch = None
            del self._rows, self._pool, self._outputs, self._seq_lens, self._fence

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

    def _check_batch(self, where: str, indices: Tensor) -> int:
        if self._closed or self._backend.is_capturing():
            self._check_usable(where)
        return check_batch(where, indices, self._limit, self.device)
