"""Receive slots: memory that is granted to writers, then a job's, then free again."""

from __future__ import annotations

import dataclasses
import threading
from typing import TYPE_CHECKING, Any

from hwcore._checks import check_instance, check_size
from hwcore.diffusion.messages import Slot
from hwcore.diffusion.seal import unseal
from hwcore.errors import ArgumentTypeError, LeaseError, PeerError, describe

if TYPE_CHECKING:
    import torch

    from hwcore.backend import Backend
    from hwcore.diffusion.engines import Engine
    from hwcore.diffusion.leases import Lease
    from hwcore.diffusion.pool import Loaded, TransferTensorBuffer
    from hwcore.types import Stream

__all__ = ["ReceiveSlots", "check_slot"]


@dataclasses.dataclass
class _Held:
    slot: Slot
    lease: Lease
    consumed: bool = False


class ReceiveSlots:
    """What :class:`DiffusionTransferManager` is to a router: the slots that it has granted.

    All methods may be called from any thread.

    Parameters
    ----------
    pool : TransferTensorBuffer
        Over the engine's memory.
    engine : Engine
    backend : Backend
    is_checked : bool
        Whether what is loaded must have the checksum that its seal says.
    """

    def __init__(
        self, pool: TransferTensorBuffer, engine: Engine, backend: Backend, *, is_checked: bool
    ) -> None:
        self.pool = pool
        self._engine, self._backend, self._is_checked = engine, backend, is_checked
        self._lock = threading.Lock()
        self._held: dict[int, _Held] = {}
        self._writers: set[str] = set()  # for which slots are quarantined
        self._is_closed = False

    def grant(self, size_bytes: int) -> Slot | None:
        """Return a new slot, or None where there is no room now, or not without waiting.

        Raises
        ------
        ArgumentTypeError, ArgumentValueError
            If the pool could never hold as much.
        """
        check_size("grant", "size_bytes", size_bytes, 0, "Pass what size_of() said of the tree")
        lease = self.pool.allocate_now(size_bytes, "a receive slot")
        if lease is None:
            return None
        slot = Slot(int.from_bytes(bytes(lease), "little"), lease.offset, size_bytes)
        with self._lock:
            self._held[slot.lease] = _Held(slot, lease)
        return slot

    def granted(self) -> list[Slot]:
        """Return the slots that no job has taken over."""
        with self._lock:
            return [held.slot for held in self._held.values() if not held.consumed]

    def consume(self, slot: Slot) -> bool:
        """Take a slot over for a job; False where it was not granted, or not any more."""
        with self._lock:
            held = self._find("consume", slot)
            if held is None or held.consumed:
                return False
            held.consumed = True
            return True

    def free(self, slot: Slot, writer: str = "") -> None:
        """Give a granted slot back; nothing happens with any other.

        Parameters
        ----------
        writer : str
            Id of the engine of a worker that is dead or does not answer, and may still write here;
            empty if none may. The engine takes no connection of it any more, and the memory is
            reused when it can write no more (see :meth:`settle`).
        """
        with self._lock:
            held = self._find("free", slot)
            if held is None or held.consumed:
                return
            # First, for it raises where there is no such writer: nothing has changed then.
            if writer and self._engine.refuse(writer):
                self.pool.quarantine(held.lease, writer)
                self._writers.add(writer)
            del self._held[slot.lease]
            self.pool.free(held.lease)

    def finish(self, slot: Slot) -> None:
        """Give back a slot that a job had taken over.

        Its memory is reused when no tensor views it any more and streams have read what they had
        to.

        Raises
        ------
        LeaseError
            If no job has it.
        """
        with self._lock:
            if self._is_closed:
                return
            lease = self._consumed("finish", slot).lease
            del self._held[slot.lease]
            self.pool.free(lease)

    def load_tensors(
        self,
        slot: Slot,
        seal: bytes,
        device: torch.device | str | None = None,
        *,
        clone: bool = False,
    ) -> Any:
        """Return the tree that lies in a consumed slot; its tensors hold their values.

        Parameters
        ----------
        slot : Slot
        seal : bytes
            What the sender's push returned.
        device : torch.device or str, optional
            Where the tensors are to be, in memory of their own. None: in the slot itself.
        clone : bool
            True: memory of their own for device None too. False: views of the slot, whose memory
            is not reused as long as there are any, also after ``finish``.

        Raises
        ------
        PeerError
            If the bytes have another checksum than the seal says. The job may be tried again,
            from another slot.
        ArgumentTypeError, ArgumentValueError
            If it is no seal, describes what the slot cannot hold, or names enums that are not
            registered here.
        LeaseError
            If the slot was not consumed here.

        Notes
        -----
        Host sync: waits for the copies.
        """
        loaded = self._load("load_tensors", slot, seal, device, None, clone)
        self._backend.synchronize_event(loaded.event)
        return loaded.tree

    def load_tensors_async(
        self,
        slot: Slot,
        seal: bytes,
        device: torch.device | str | None = None,
        stream: Stream | None = None,
        *,
        clone: bool = False,
    ) -> Loaded:
        """As :meth:`load_tensors`, with copies on ``stream``, and not waited for.

        Returns
        -------
        Loaded
            (tree, event). Wait for the event before the tensors are used on another stream, or by
            the host. ``finish`` need not wait for it.
        """
        return self._load("load_tensors_async", slot, seal, device, stream, clone)

    def _load(
        self,
        where: str,
        slot: Slot,
        seal: bytes,
        device: torch.device | str | None,
        stream: Stream | None,
        clone: bool,
    ) -> Loaded:
        """Return what lies in a consumed slot; see :meth:`load_tensors`."""
        with self._lock:
            lease = self._consumed(where, slot).lease
        manifest, summed = unseal(seal, lease.size_bytes, where)
        if self._is_checked:
            self._check_sum(where, slot, lease, manifest.size_bytes, summed)
        return self.pool.read_received(where, lease, manifest, device, stream, clone)

    def _settle_slots(self) -> None:
        """Take back the quarantined slots of writers that can write no more."""
        with self._lock:
            for writer in list(self._writers):
                if not self._engine.refuse(writer):
                    self._writers.discard(writer)
                    self.pool.release_all(writer)

    def _close_slots(self) -> None:
        """Give everything back: nobody is connected to the engine any more."""
        with self._lock:
            self._is_closed = True
            held, self._held = self._held, {}
            writers, self._writers = self._writers, set()
        for one in held.values():
            self.pool.free(one.lease)
        for writer in writers:
            self.pool.release_all(writer)

    def _slot_counts(self) -> tuple[int, int, int]:
        """Return how many slots are granted and consumed, and how many writers quarantine some."""
        with self._lock:
            consumed = sum(held.consumed for held in self._held.values())
            return len(self._held) - consumed, consumed, len(self._writers)

    def _check_sum(
        self, where: str, slot: Slot, lease: Lease, size_bytes: int, summed: int | None
    ) -> None:
        if summed is None:
            expected = "a checksum, which this side is to check"
            fix = "Make both managers with checksum=True, or both without"
            raise PeerError(describe(where, "checksum of the seal", summed, expected, fix))
        found = self.pool.sum_of(lease, size_bytes)
        if found != summed:
            message = (
                f"{where}: {slot} holds {size_bytes} bytes with the checksum {found:#x}; expected "
                f"{summed:#x}, as its writer says. Send them again, to another slot."
            )
            raise PeerError(message)

    def _find(self, where: str, slot: Slot) -> _Held | None:
        check_slot(where, slot)
        held = self._held.get(slot.lease)
        return held if held is not None and held.slot == slot else None

    def _consumed(self, where: str, slot: Slot) -> _Held:
        held = self._find(where, slot)
        if held is None or not held.consumed:
            expected = "one that was granted here and consumed, and not finished"
            fix = "Call consume() first, and finish() after the last load"
            raise LeaseError(describe(where, "slot", slot, expected, fix))
        return held


def check_slot(where: str, slot: Slot) -> None:
    """Raise unless ``slot`` is one whose numbers can be."""
    check_instance(where, "slot", slot, Slot, "grant()")
    numbers = slot.lease, slot.offset, slot.size_bytes
    if not type(numbers[0]) is type(numbers[1]) is type(numbers[2]) is int or min(numbers) < 0:
        expected, fix = "whole numbers of at least 0", "Pass what grant() returned"
        raise ArgumentTypeError(describe(where, "slot", slot, expected, fix))
