"""Trees into this process's pool, and from there, or straight from where they are, to others."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING

from hwcore._checks import check_instance
from hwcore.diffusion.checksum import Digest, sum_of
from hwcore.diffusion.copying import check_not_captured
from hwcore.diffusion.engines.deadline import Deadline
from hwcore.diffusion.host import tell_sanitizer
from hwcore.diffusion.manifest import describe_tree
from hwcore.diffusion.peers import Reached
from hwcore.diffusion.receiving import check_slot
from hwcore.diffusion.running import Running
from hwcore.diffusion.seal import seal
from hwcore.diffusion.ways import Way, write
from hwcore.errors import ArgumentValueError, LeaseError, PeerError, describe

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from hwcore.backend import Backend
    from hwcore.diffusion.engines import Peer
    from hwcore.diffusion.enums import EnumRegistry
    from hwcore.diffusion.gathering import Gathering
    from hwcore.diffusion.leases import Lease
    from hwcore.diffusion.manifest import Described, Manifest
    from hwcore.diffusion.messages import Slot
    from hwcore.diffusion.peers import Peers
    from hwcore.diffusion.pool import TransferTensorBuffer
    from hwcore.diffusion.ways import OnPart
    from hwcore.types import Event, Stream

__all__ = ["Sender", "Staged"]

_PIECE_BYTES = 64 << 20  # of a write: between two it is seen whether the request was aborted


class Staged:
    """A tree in this process's pool, which may be pushed several times.

    Attributes
    ----------
    request_id : str
    manifest : Manifest
    size_bytes : int
        That a slot for it must have at least.
    event : Event
        From it on the staged bytes are there, and the sources may be written to again.
    """

    def __init__(
        self, sender: Sender, lease: Lease, manifest: Manifest, encoded: bytes, event: Event
    ) -> None:
        self.request_id = lease.request_id
        self.manifest, self.event = manifest, event
        self.size_bytes = manifest.size_bytes
        self._sender, self._lease, self._encoded = sender, lease, encoded
        self._checksum: int | None = None
        self._pushes = 0
        self._is_freed = False

    def __repr__(self) -> str:
        state = ", freed" if self._is_freed else ""
        return f"<Staged {self.size_bytes} bytes of {self.request_id!r}{state}>"

    def free(self) -> None:
        """Give the memory back: now, or when the last push of it has ended. Twice is harmless."""
        self._sender.free(self)


class Sender:
    """Stages and pushes. All methods may be called from any thread.

    Parameters
    ----------
    pool : TransferTensorBuffer
        Over the memory of the engine whose peers these are.
    backend : Backend
    peers : Peers
    enums : EnumRegistry or None
    is_summed : bool
        Whether seals have a checksum.
    chunk_bytes : int
    """

    def __init__(
        self,
        pool: TransferTensorBuffer,
        backend: Backend,
        peers: Peers,
        enums: EnumRegistry | None,
        *,
        is_summed: bool,
        chunk_bytes: int,
    ) -> None:
        self._pool, self._backend, self._peers = pool, backend, peers
        self._enums, self._is_summed = enums, is_summed
        self._chunk_bytes = max(64, min(chunk_bytes, pool.size_bytes // 2 - 128))  # two at a time
        self._lock = threading.Lock()
        self._staged: set[Staged] = set()
        self._pushed_bytes = 0
        self.running = Running(pool)

    # --- Staging ---

    def stage(
        self, where: str, request_id: str, tree: object, stream: Stream | None, timeout_s: float
    ) -> Staged:
        """Copy a tree into the pool; where it raises nothing is held there."""
        manifest, encoded, tensors, _ = self._described(where, request_id, tree)
        with self.running.run(where, request_id) as run:
            lease = self._pool.allocate(manifest.size_bytes, request_id, timeout_s=timeout_s)
            try:
                written = self._pool.write_tensors(where, lease, manifest, tensors, stream)
                staged = Staged(self, lease, manifest, encoded, written.event)
                with self._lock:
                    run.check()  # who aborts it from now on finds it
                    self._staged.add(staged)
            except BaseException:
                self._pool.free(lease)
                raise
        return staged

    def free(self, staged: Staged) -> None:
        """Give a staged tree's memory back when no push of it runs."""
        with self._lock:
            self._check("free_staged", staged)
            self._free(staged)

    def counts(self) -> tuple[int, int]:
        """Return how many trees are staged, and the bytes that were pushed so far."""
        with self._lock:
            return len(self._staged), self._pushed_bytes

    # --- Pushing ---

    def push(self, where: str, staged: Staged, address: str, slot: Slot, timeout_s: float) -> bytes:
        """Write a staged tree into a slot of a peer, and return its seal."""
        deadline = Deadline(where, timeout_s)
        check_slot(where, slot)
        with (
            self._pushing(where, staged),
            self.running.run(where, staged.request_id) as run,
            self._peer(where, address, slot, staged.size_bytes, deadline) as peer,
        ):
            run.check()
            tell_sanitizer(where, [staged._lease.payload])  # for which the host has waited
            payload = self._pool.untracked(staged._lease, staged.size_bytes)
            if self._is_summed and staged._checksum is None:
                staged._checksum = sum_of(payload)
            for start in range(0, staged.size_bytes, _PIECE_BYTES):
                run.check()
                write(peer, payload[start : start + _PIECE_BYTES], slot.offset + start, deadline)
            run.check()
        return self._sealed(staged._encoded, staged.size_bytes, staged._checksum)

    def send(
        self,
        where: str,
        request_id: str,
        tree: object,
        address: str,
        slot: Slot,
        stream: Stream | None,
        timeout_s: float,
        on_part: OnPart | None,
    ) -> bytes:
        """Write a tree into a slot of a peer, and return its seal."""
        deadline = Deadline(where, timeout_s)
        check_slot(where, slot)
        described = self._described(where, request_id, tree)
        manifest, size_bytes = described.manifest, described.manifest.size_bytes
        with (
            self.running.run(where, request_id) as run,
            self._peer(where, address, slot, size_bytes, deadline) as peer,
        ):
            run.check()
            digest = Digest() if self._is_summed else None
            memory, tensors = peer.memory, described.tensors
            if memory is not None and described.gathering is not None and stream is None:
                target = memory[slot.offset : slot.offset + size_bytes]
                self._gather(where, described.gathering, target, tensors, digest, on_part)
            else:
                way = Way(self._backend, where, manifest.layout, tensors, stream, digest, on_part)
                if memory is None:
                    way.in_chunks(self._pool, self._chunk_bytes, run, peer, slot.offset, deadline)
                else:
                    way.straight(memory[slot.offset : slot.offset + size_bytes])
            if memory is not None:
                _check_alive(where, peer, address)
            run.check()
        return self._sealed(described.encoded, size_bytes, None if digest is None else digest.value)

    # --- Ends ---

    def abort(self, request_id: str, timeout_s: float) -> bool:
        """Make what runs for a request fail, free what is staged for it, and wait for both."""
        runs = self.running.abort(request_id)
        with self._lock:
            for staged in [one for one in self._staged if one.request_id == request_id]:
                self._free(staged)
        return self.running.wait(runs, timeout_s)

    def close(self, timeout_s: float) -> None:
        """Take no more, wait for what runs, then cut it short; free all that is staged."""
        left = self.running.close(timeout_s)
        self._peers.close()  # writes that run fail
        self.running.wait(left, timeout_s)
        with self._lock:
            for staged in list(self._staged):
                self._free(staged)

    # --- Parts ---

    def _gather(
        self,
        where: str,
        gathering: Gathering,
        target: torch.Tensor,
        tensors: list[torch.Tensor],
        digest: Digest | None,
        on_part: OnPart | None,
    ) -> None:
        """Write tensors of the host to memory of the host: no stream has a part in it."""
        check_not_captured(self._backend, where)
        started = time.monotonic() if on_part is not None else 0.0
        gathering.gather(target, tensors, digest)
        if on_part is not None:
            on_part("stage", started, time.monotonic())

    def _described(self, where: str, request_id: str, tree: object) -> Described:
        """Return what is sent of a tree; raise where it cannot be."""
        check_instance(where, "request_id", request_id, str, "the request's router")
        return describe_tree(tree, self._enums, where)

    def _sealed(self, encoded: bytes, size_bytes: int, checksum: int | None) -> bytes:
        with self._lock:
            self._pushed_bytes += size_bytes
        return seal(encoded, size_bytes, checksum)

    @contextlib.contextmanager
    def _pushing(self, where: str, staged: Staged) -> Iterator[None]:
        """Keep a staged tree's memory."""
        with self._lock:
            self._check(where, staged)
            if staged._is_freed:
                expected, fix = "one that was not freed or aborted", "Stage the tree again"
                raise LeaseError(describe(where, "staged", staged, expected, fix))
            staged._pushes += 1
        try:
            yield
        finally:
            with self._lock:
                staged._pushes -= 1
                if staged._is_freed:
                    self._free(staged)

    def _peer(
        self, where: str, address: str, slot: Slot, size_bytes: int, deadline: Deadline
    ) -> Reached:
        """Give the peer at an address, if the slot can be there and is large enough."""
        if size_bytes > slot.size_bytes:
            expected = f"at most {slot.size_bytes}, as {slot} has"
            fix = "Ask the receiver for what size_of() says of the tree"
            raise ArgumentValueError(describe(where, "bytes to send", size_bytes, expected, fix))
        using = self._peers.using(address, deadline)
        return Reached(using, self.running, where, address, slot)

    def _free(self, staged: Staged) -> None:
        """Free it, now or with its last push; the lock is held."""
        staged._is_freed = True
        if not staged._pushes and staged in self._staged:
            self._staged.discard(staged)
            self._pool.free(staged._lease)

    def _check(self, where: str, staged: Staged) -> None:
        check_instance(where, "staged", staged, Staged, "stage_tensors()")
        if staged._sender is not self:
            expected, fix = "one of this manager", "Pass it to the manager that staged it"
            raise LeaseError(describe(where, "staged", staged, expected, fix))


def _check_alive(where: str, peer: Peer, address: str) -> None:
    if not peer.alive:
        message = (
            f"{where}: {address} ended while it was written to; expected it to take what was "
            f"sent. Send to another peer."
        )
        raise PeerError(message)
