"""The two ways of a tree into a peer's slot: straight where it is mapped, else in chunks."""

from __future__ import annotations

import concurrent.futures
import contextlib
import time
from typing import TYPE_CHECKING, Any, TypeAlias

from hwcore.diffusion.copying import common_device, working_on
from hwcore.diffusion.host import tell_sanitizer
from hwcore.diffusion.writing import parts_of, write_part, write_part_summed
from hwcore.errors import LateWriteError, PeerTimeoutError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch

    from hwcore.backend import Backend
    from hwcore.diffusion.checksum import Digest
    from hwcore.diffusion.engines import Peer
    from hwcore.diffusion.engines.deadline import Deadline
    from hwcore.diffusion.layout import Layout
    from hwcore.diffusion.pool import TransferTensorBuffer
    from hwcore.diffusion.running import Run
    from hwcore.diffusion.writing import Part
    from hwcore.types import Stream

__all__ = ["OnPart", "Way", "write"]

OnPart: TypeAlias = "Callable[[str, float, float], None]"

_ALIGNMENT = 64
_SLACK_BYTES = 2 * _ALIGNMENT  # a part begins where it would in the whole; padding may end it


class Way:
    """Tensors on their way to memory of the host.

    Parameters
    ----------
    backend : Backend
    where : str
        Who speaks in errors.
    layout : Layout
    tensors : sequence of Tensor
        Of its entries.
    stream : Stream or None
        On which copies run that a device takes part in; None: the current one.
    digest : Digest or None
        Gets the bytes of the layout, padding included.
    on_part : callable or None
        See ``DiffusionTransferManager.send_tensors``.

    Raises
    ------
    ArgumentValueError, CaptureError
        If there are tensors of several devices, or a graph is being captured.
    """

    def __init__(
        self,
        backend: Backend,
        where: str,
        layout: Layout,
        tensors: Sequence[torch.Tensor],
        stream: Stream | None,
        digest: Digest | None,
        on_part: OnPart | None,
    ) -> None:
        self._on_part = on_part
        self._backend, self._layout, self._tensors = backend, layout, tensors
        self._stream, self._digest = stream, digest
        self._device = common_device(backend, where, [tensor.device for tensor in tensors])

    def straight(self, target: torch.Tensor) -> None:
        """Write everything to memory that others may see; it is there when this returns.

        Parameters
        ----------
        target : Tensor, uint8, [layout.size_bytes], CPU
        """
        with self._working() as worker:
            try:
                for part in parts_of(self._layout, self._tensors):
                    self._write(target, part, worker)
            except BaseException:
                # The slot may be given to others when this has failed: nothing may come later.
                if worker is not None:
                    self._backend.synchronize_stream(worker)
                raise

    def in_chunks(
        self,
        pool: TransferTensorBuffer,
        chunk_bytes: int,
        run: Run,
        peer: Peer,
        offset: int,
        deadline: Deadline,
    ) -> None:
        """Write part i + 1 to a pool in this thread, while another one pushes part i.

        Parameters
        ----------
        chunk_bytes : int
            Of a part, at least 64.
        offset : int
            In the peer's pool.
        """
        size_bytes = self._layout.size_bytes
        is_one = size_bytes <= chunk_bytes
        stride = size_bytes if is_one else chunk_bytes + _SLACK_BYTES
        room = stride if is_one else 2 * stride
        with (
            pool.allocate(room, run.request_id, timeout_s=left_s(deadline)) as lease,
            self._working() as worker,
            _pusher(is_one) as submit,
        ):
            if worker is not None:
                lease.record_stream(worker)  # this may end with copies under way
            base, pushing = pool.untracked(lease), None
            try:
                for number, part in enumerate(parts_of(self._layout, self._tensors, chunk_bytes)):
                    run.check()
                    start = number % 2 * stride + part.start % _ALIGNMENT
                    chunk = base[start : start + part.size_bytes]
                    self._write(chunk, part, worker)
                    if pushing is not None:
                        pushing.result()
                    pushing = submit(self._push, peer, chunk, offset + part.start, deadline)
                if pushing is not None:
                    pushing.result()
            except BaseException as error:
                # That bytes may land later is what the caller must hear, whatever else ended this.
                late = None if pushing is None else pushing.exception()
                if isinstance(late, LateWriteError) and late is not error:
                    raise late from error
                raise

    def _working(self) -> contextlib.AbstractContextManager[Stream | None]:
        return working_on(self._backend, self._device, self._stream, self._tensors)

    def _push(self, peer: Peer, chunk: torch.Tensor, offset: int, deadline: Deadline) -> None:
        started = time.monotonic()
        write(peer, chunk, offset, deadline)
        if self._on_part is not None:
            self._on_part("push", started, time.monotonic())

    def _write(self, target: torch.Tensor, part: Part, worker: Stream | None) -> None:
        """Write a part, wait until it is there, and sum it."""
        started = time.monotonic() if self._on_part is not None else 0.0
        digest = self._digest
        if digest is not None and part.is_of_host:
            write_part_summed(target, part, digest)
            digest = None
        else:
            write_part(target, part)
        if worker is not None:
            event = self._backend.create_event(worker.device)
            self._backend.record_event(event, worker)
            self._backend.synchronize_event(event)
        tell_sanitizer("send_tensors", [target])
        if digest is not None:
            digest.add(target)
        if self._on_part is not None:
            self._on_part("stage", started, time.monotonic())


def write(peer: Peer, source: torch.Tensor, offset: int, deadline: Deadline) -> None:
    """Write into a peer's pool, within a deadline."""
    peer.write(source, offset, left_s(deadline))


def left_s(deadline: Deadline) -> float:
    """Return the seconds left, or raise PeerTimeoutError."""
    try:
        return deadline.left_s()
    except TimeoutError:
        message = (
            f"{deadline.where}: {deadline.timeout_s:g} s were over before all was sent; expected "
            f"it to be there by then. See whether the peer is overloaded, or wait longer."
        )
        raise PeerTimeoutError(message) from None


@contextlib.contextmanager
def _pusher(is_inline: bool) -> Iterator[Callable[..., Any]]:
    """Give what calls a function: here, or in a thread that is waited for in the end."""
    if is_inline:
        yield lambda call, *arguments: call(*arguments)
        return
    with concurrent.futures.ThreadPoolExecutor(1, "hwcore-push") as executor:
        yield executor.submit
