"""Tensors into a range of memory and out of it, on a stream, in as few copies as can be."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

import torch

from hwcore.diffusion.layout import LARGE_BYTES
from hwcore.diffusion.views import views, views_of_parts
from hwcore.diffusion.writing import parts_of, write_part
from hwcore.errors import ArgumentValueError, CaptureError, describe
from hwcore.fence import StreamFence
from hwcore.graphs.host_inputs import HostInputs

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from hwcore.backend import Backend
    from hwcore.diffusion.layout import Layout
    from hwcore.diffusion.leases import Lease
    from hwcore.types import Event, Stream

__all__ = ["LeaseIO", "check_not_captured", "common_device", "working_on"]


class LeaseIO:
    """Writes and reads of leases, ordered among each other. The caller has the lease's lock.

    Parameters
    ----------
    backend : Backend
    device : torch.device
        Where the pool's memory is.
    """

    def __init__(self, backend: Backend, device: torch.device) -> None:
        self._backend = backend
        self._sources = HostInputs(backend, device)
        self._sources_lock = threading.Lock()
        self._idle: Stream | None = None

    def write(
        self,
        where: str,
        lease: Lease,
        base: torch.Tensor,
        layout: Layout,
        tensors: Sequence[torch.Tensor],
        stream: Stream | None,
        start: int = 0,
    ) -> Event:
        """Write tensors to ``base[start:]`` and zeros before it; return the event of the end."""
        devices = [base.device, *(tensor.device for tensor in tensors)]
        device = common_device(self._backend, where, devices)
        if base.is_cpu:
            for user in lease._streams:  # its copies would come after what the host writes now
                self._backend.synchronize_stream(user)
        with self._work(lease, device, stream, tensors) as worker:
            if worker is None:
                base[:start].zero_()
                write_layout(base[start:], layout, tensors)
                return self._reached()
            event, fence = self._backend.create_event(device), self._fence(lease)
            fence.begin_write(worker)
            try:
                base[:start].zero_()
                write_layout(base[start:], layout, tensors)
            finally:
                fence.end_write(worker)
            self._backend.record_event(event, worker)
            lease._written = event
            self._keep_sources(base, tensors, worker)
        return event

    def read(
        self,
        where: str,
        lease: Lease,
        base: torch.Tensor,
        layout: Layout,
        device: torch.device | str | None,
        stream: Stream | None,
        clone: bool,
        is_received: bool = False,
    ) -> tuple[list[torch.Tensor], Event]:
        """Return the tensors at the start of ``base``, and the event from which they are there.

        ``is_received``: a peer has written there, and no stream of this process ever does.
        """
        if device is None and not clone:
            if is_received and base.device.type == self._backend.info.device_type == "cpu":
                lease._streams[self._backend.current_stream()] = None
            else:
                self.wait_for_writes(lease, base)
            if base.device.type == self._backend.info.device_type:
                event = self._backend.create_event(base.device)
                self._backend.record_event(event, self._backend.current_stream(base.device))
            else:
                event = self._reached()
            return views(layout, lambda entry: (base, entry.offset), base.device), event
        # An index that is left out is the current device's, which torch fills in.
        target = torch.empty(0, device=base.device if device is None else device).device
        worked_on = common_device(self._backend, where, [base.device, target])
        with self._work(lease, worked_on, stream, ()) as worker:
            if worker is None:
                self.wait_for_writes(lease, base)
                parts, event = read_parts(base, layout, target), self._reached()
            else:
                event, fence = self._backend.create_event(worked_on), self._fence(lease)
                fence.begin_read(worker)
                try:
                    parts = read_parts(base, layout, target)
                finally:
                    fence.end_read(worker)
                self._backend.record_event(event, worker)
        if worker is not None and target == worked_on:
            current = self._backend.current_stream(target)
            if current != worker:  # who waits for the event frees them there
                for part in parts:
                    self._backend.record_stream(part, current)
        return views_of_parts(layout, parts, target), event

    def wait_for_writes(self, lease: Lease, base: torch.Tensor) -> None:
        """Let the host wait for what streams wrote, or the current stream for memory of theirs."""
        if base.is_cpu and self._backend.info.device_type != "cpu":
            if lease._written is not None:
                self._backend.synchronize_event(lease._written)
            return
        stream = self._backend.current_stream(base.device)
        lease._streams[stream] = None
        self._fence(lease).begin_read(stream)
        self._fence(lease).end_read(stream)

    def current_stream(self, lease: Lease, device: torch.device) -> Stream | None:
        """Return the stream that may use a lease through views, where there can be one."""
        if lease._base is None:
            return None
        if device.type == self._backend.info.device_type:
            return self._backend.current_stream(device)
        return self._backend.current_stream() if self._backend.is_initialized() else None

    def _keep_sources(
        self, base: torch.Tensor, tensors: Sequence[torch.Tensor], worker: Stream
    ) -> None:
        """Keep tensors of the host whose page-locked memory copies still read."""
        if base.device.type != self._backend.info.device_type:
            return
        hosts = [tensor for tensor in tensors if tensor.is_cpu and tensor.nbytes >= LARGE_BYTES]
        if hosts:
            with self._sources_lock:
                self._sources.keep(hosts, worker)

    def _reached(self) -> Event:
        """Return an event that nobody has to wait for: the host has done the work itself."""
        backend = self._backend
        event = backend.create_event()
        if backend.is_initialized() or backend.info.device_type == "cpu":
            # On a stream without work; elsewhere there is no device yet, nor anything to wait for.
            self._idle = self._idle or backend.create_stream()
            backend.record_event(event, self._idle)
        return event

    def _fence(self, lease: Lease) -> StreamFence:
        if lease._fence is None:
            lease._fence = StreamFence(self._backend)
        return lease._fence

    @contextlib.contextmanager
    def _work(
        self,
        lease: Lease,
        device: torch.device | None,
        stream: Stream | None,
        tensors: Sequence[torch.Tensor],
    ) -> Iterator[Stream | None]:
        """As :func:`working_on`; the lease is not reused before the stream has done it."""
        with working_on(self._backend, device, stream, tensors) as worker:
            if worker is not None:
                lease._streams[worker] = None
            yield worker


@contextlib.contextmanager
def working_on(
    backend: Backend,
    device: torch.device | None,
    stream: Stream | None,
    tensors: Sequence[torch.Tensor] = (),
) -> Iterator[Stream | None]:
    """Work on a stream, after what the current one has; None where no device takes part.

    ``tensors`` are what it reads: their memory is not reused before it has.
    """
    if device is None:
        yield None
        return
    current = backend.current_stream(device)
    worker = current if stream is None else stream
    if worker == current:
        yield worker
        return
    backend.wait_stream(worker, current)
    with backend.stream_context(worker):
        try:
            yield worker
        finally:  # also where it raised: what was submitted before that will run
            for tensor in tensors:
                if tensor.device == device:
                    backend.record_stream(_stored(tensor), worker)


def common_device(
    backend: Backend, where: str, devices: Iterable[torch.device]
) -> torch.device | None:
    """Return the backend's device among some; None where all are the host's.

    Raises
    ------
    ArgumentValueError
        If there are two, or one of another backend: one stream orders work on one device.
    CaptureError
        If a graph is being captured.
    """
    found = {torch.device(d) for d in devices if d.type == backend.info.device_type}
    foreign = {d for d in devices if d.type not in ("cpu", backend.info.device_type)}
    if len(found) > 1 or foreign:
        expected = f"tensors of the host and of one device of `{backend.info.name}`"
        got = ", ".join(sorted(map(str, {*devices})))
        fix = "Write the tensors of each device into a lease of their own, from its own process"
        raise ArgumentValueError(describe(where, "devices", got, expected, fix))
    check_not_captured(backend, where)
    return found.pop() if found else None


def check_not_captured(backend: Backend, where: str) -> None:
    """Raise CaptureError if a graph is being captured."""
    if backend.is_capturing():
        message = (
            f"{where} was called while a graph is captured; expected it outside, for a pool's "
            f"memory changes hands. Copy what a replay leaves, after it."
        )
        raise CaptureError(message)


def _stored(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor over the same memory, of which torch makes no copy before it is recorded."""
    tensor = tensor.detach()
    tensor = tensor.conj() if tensor.is_conj() else tensor
    return torch._neg_view(tensor) if tensor.is_neg() else tensor


def write_layout(base: torch.Tensor, layout: Layout, tensors: Sequence[torch.Tensor]) -> None:
    """Write tensors at their places, and zeros between them, on the current stream.

    Parameters
    ----------
    base : Tensor, uint8, [at least layout.size_bytes]
    """
    for part in parts_of(layout, tensors):
        write_part(base[: part.end], part)


def read_parts(base: torch.Tensor, layout: Layout, device: torch.device) -> list[torch.Tensor]:
    """Return the parts of a layout in memory of their own, copied on the current stream."""
    parts = layout.parts()
    return [
        torch.empty(end - start, dtype=torch.uint8, device=device).copy_(
            base[start:end], non_blocking=True
        )
        for start, end in parts
    ]
