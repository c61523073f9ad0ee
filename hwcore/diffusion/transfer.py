"""DiffusionTransferManager: trees of tensors from the memory of one process into another's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from hwcore._checks import check_callable, check_instance, check_size
from hwcore.activation import current_backend
from hwcore.diffusion.engines.deadline import Deadline
from hwcore.diffusion.manifest import manifest_of
from hwcore.diffusion.peers import Peers
from hwcore.diffusion.pool import TransferTensorBuffer
from hwcore.diffusion.receiving import ReceiveSlots
from hwcore.diffusion.sending import Sender, Staged
from hwcore.diffusion.stats import TransferStats
from hwcore.diffusion.waiting import check_timeout
from hwcore.errors import ArgumentTypeError, describe

if TYPE_CHECKING:
    from hwcore.backend import Backend
    from hwcore.diffusion.engines import Engine
    from hwcore.diffusion.enums import EnumRegistry
    from hwcore.diffusion.messages import Slot
    from hwcore.diffusion.ways import OnPart
    from hwcore.types import Stream

__all__ = ["DiffusionTransferManager"]


class DiffusionTransferManager(ReceiveSlots):
    """Stages, pushes and loads trees of tensors. All methods may be called from any thread.

    The sender writes a tree into a slot that the receiver has granted, and gets a *seal*: bytes
    that say what is there. Whoever brings slots and seals from one side to the other is not its
    affair.

    Parameters
    ----------
    engine : Engine
        Becomes the manager's: closed with it, its memory given out by it alone.
    backend : Backend, optional
        By default the process's own.
    enums : EnumRegistry, optional
        The enums that trees may hold; the same on both sides.
    checksum : bool
        Whether seals have a checksum of the bytes, and what is loaded must have it.
    chunk_bytes : int
        Into how large parts ``send_tensors`` splits a tree for a peer that is not mapped, at least
        64; at most half of the pool is used.
    connect_timeout_s : float
        How long a connection may take to be made, at most.

    Attributes
    ----------
    address, engine_id : str
        The engine's.
    size_bytes : int
        Of the pool: no tree is larger.
    pool : TransferTensorBuffer
        Over the engine's memory: what is staged and what is received share it.

    Examples
    --------
    >>> slot = receiver.grant(sender.size_of(tree))
    >>> seal = sender.send_tensors("a request", tree, receiver.address, slot, timeout_s=10)
    >>> receiver.consume(slot)
    >>> tree = receiver.load_tensors(slot, seal)
    >>> receiver.finish(slot)
    """

    def __init__(
        self,
        engine: Engine,
        backend: Backend | None = None,
        *,
        enums: EnumRegistry | None = None,
        checksum: bool = True,
        chunk_bytes: int = 4 << 20,
        connect_timeout_s: float = 5.0,
    ) -> None:
        where = "DiffusionTransferManager"
        if not isinstance(checksum, bool):
            fix = "Pass True to have what lands checked"
            raise ArgumentTypeError(describe(where, "checksum", checksum, "a bool", fix))
        check_size(where, "chunk_bytes", chunk_bytes, 64, "Pass some MiB")
        Deadline(where, connect_timeout_s)
        self._enums, self._backend = enums, backend or current_backend()
        pool = TransferTensorBuffer(engine.memory, self._backend, enums=enums)
        super().__init__(pool, engine, self._backend, is_checked=checksum)
        self.address, self.engine_id = engine.address, engine.id
        self.size_bytes = pool.size_bytes
        self._peers = Peers(engine, connect_timeout_s)
        self._sender = Sender(
            pool, self._backend, self._peers, enums, is_summed=checksum, chunk_bytes=chunk_bytes
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # --- Sending ---

    def size_of(self, tree: object) -> int:
        """Return the bytes that a slot for a tree needs.

        Raises
        ------
        ArgumentTypeError, ArgumentValueError
            If the tree cannot be sent; see :func:`hwcore.diffusion.tree.flatten`.
        """
        return manifest_of(tree, self._enums, "size_of")[0].size_bytes

    def stage_tensors(
        self, request_id: str, tree: object, *, stream: Stream | None = None, timeout_s: float = 30
    ) -> Staged:
        """Copy a tree into this process's pool; its tensors may be written to at once.

        Parameters
        ----------
        request_id : str
            Whom it is for. A request may have several.
        tree : object
            See :func:`hwcore.diffusion.tree.flatten`. Tensors of the host and of one device.
        stream : Stream, optional
            Copies that a device takes part in run on it, after what the current stream has; by
            default on the current one.
        timeout_s : float
            How long to wait for room in the pool.

        Raises
        ------
        ArgumentTypeError, ArgumentValueError
            If the tree cannot be sent, or the pool could never hold it.
        AllocationTimeoutError
            If there was no room in time; it says who has it.
        TransferAbortedError, AllocationCancelledError, ClosedError
            If ``abort`` or ``close`` was called meanwhile.
        CaptureError
            If a graph is being captured.

        Notes
        -----
        Whatever it raises, nothing is held. Host sync: waits for the copies.
        """
        staged = self._sender.stage("stage_tensors", request_id, tree, stream, timeout_s)
        self._backend.synchronize_event(staged.event)
        return staged

    def stage_tensors_async(
        self, request_id: str, tree: object, *, stream: Stream | None = None, timeout_s: float = 30
    ) -> Staged:
        """As :meth:`stage_tensors`, without waiting for the copies.

        Its tensors must not be written to before ``event`` of what it returns is reached: let the
        stream that writes wait for it. They may be dropped.
        """
        return self._sender.stage("stage_tensors_async", request_id, tree, stream, timeout_s)

    def push_to_peer(self, staged: Staged, address: str, slot: Slot, timeout_s: float) -> bytes:
        """Write a staged tree into a slot of a peer.

        Parameters
        ----------
        staged : Staged
            Stays staged, whatever happens, until it is freed: it may be pushed again.
        address : str
            Of the engine that granted the slot.
        slot : Slot
            Of at least ``staged.size_bytes``; nothing beyond these is written.
        timeout_s : float
            More than 0. The wait for the connection and for the staging is part of it.

        Returns
        -------
        bytes
            The seal, for ``load_tensors`` on the other side. The bytes have landed.

        Raises
        ------
        LateWriteError
            If they had not landed in time and still may, until this manager is closed.
        PeerTimeoutError
            If they had not landed in time, and will not.
        PeerError
            If the peer is gone, or refused the connection or the bytes. Push to another.
        TransferAbortedError, ClosedError
            If ``abort`` or ``close`` was called meanwhile.
        LeaseError
            If it was freed.
        ArgumentTypeError, ArgumentValueError
            If an argument is wrong; nothing was written.

        Notes
        -----
        Host sync: waits for the staging.
        """
        return self._sender.push("push_to_peer", staged, address, slot, timeout_s)

    def send_tensors(
        self,
        request_id: str,
        tree: object,
        address: str,
        slot: Slot,
        *,
        stream: Stream | None = None,
        timeout_s: float = 30.0,
        on_part: OnPart | None = None,
    ) -> bytes:
        """Write a tree into a slot of a peer and return the seal: stage and push in one.

        A peer whose pool is mapped here gets it straight from the tensors, in one copy. Any other
        gets it in chunks: while one is pushed, the next is staged, and this process's pool holds
        two. Arguments and errors as for :meth:`stage_tensors` and :meth:`push_to_peer`; nothing
        stays staged.

        Parameters
        ----------
        on_part : callable, optional
            ``on_part(kind, started, ended)``, with seconds of ``time.monotonic``: called with
            ``"stage"`` for each part that was copied, and with ``"push"`` for each that a peer has
            got which is not mapped, in the thread that did it.

        Notes
        -----
        Host sync: waits for the copies; the tensors may be written to when it returns.
        """
        check_callable("send_tensors", "on_part", on_part, "Pass a function of three arguments")
        return self._sender.send(
            "send_tensors", request_id, tree, address, slot, stream, timeout_s, on_part
        )

    def free_staged(self, staged: Staged) -> None:
        """Give a staged tree's memory back: now, or when the last push of it has ended.

        Raises
        ------
        ArgumentTypeError, LeaseError
            If it is not this manager's. Twice is harmless.
        """
        self._sender.free(staged)

    def abort(self, request_id: str, timeout_s: float = 30.0) -> bool:
        """Give a request up: what runs for it fails, what is staged for it is freed.

        Returns
        -------
        bool
            True: nothing of it is being written any more, and nothing lands but what a
            ``LateWriteError`` has told of. False: something still was after
            ``timeout_s`` (a push to a peer that hangs ends at its own deadline); call again.

        Notes
        -----
        What is staged under the same name after this call is not concerned, but may be cancelled
        if it waits for room while this waits.
        """
        check_instance("abort", "request_id", request_id, str, "the request's router")
        check_timeout("abort", timeout_s)
        return self._sender.abort(request_id, timeout_s)

    # --- Ends ---

    def settle(self) -> None:
        """Take back what became free by itself; its owner calls it now and then.

        That is slots whose writers can write no more, and connections to peers that are gone,
        whose memory would else stay mapped here.
        """
        self._settle_slots()
        self._peers.drop_dead()

    def stats(self) -> TransferStats:
        """Return what there is, and what has been done."""
        staged, pushed_bytes = self._sender.counts()
        counts = len(self._sender.running), *self._slot_counts(), len(self._peers)
        return TransferStats(self.pool.stats(), staged, *counts, pushed_bytes)

    def close(self, timeout_s: float = 10.0) -> None:
        """Wait for what runs, then end everything: engine, peers, pool.

        Parameters
        ----------
        timeout_s : float
            How long to wait for what runs, and again for what still uses the pool.

        Raises
        ------
        ClosedError
            If tensors still view the pool, or streams work on it, after that; it says which. All
            else is closed, and the memory stays until the last view is gone; call it again.
        """
        check_timeout("DiffusionTransferManager.close", timeout_s)
        self._sender.close(timeout_s)
        self._engine.close()
        self._close_slots()
        self.pool.close(timeout_s)
