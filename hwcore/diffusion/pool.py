"""TransferTensorBuffer: memory that a transfer engine made, for tensors of many requests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from hwcore._checks import check_size
from hwcore.diffusion.layout import layout_by
from hwcore.diffusion.leases import Lease, lets_go, too_small
from hwcore.diffusion.lending import LeasedMemory
from hwcore.diffusion.manifest import Manifest, check_manifest, manifest_of
from hwcore.diffusion.specs import TensorSpec, spec_by, spec_of
from hwcore.diffusion.tree import unflatten
from hwcore.errors import ArgumentValueError, describe

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from hwcore.backend import Backend
    from hwcore.diffusion.enums import EnumRegistry
    from hwcore.types import Event, Stream

__all__ = ["Loaded", "TransferTensorBuffer", "Written"]


class Written(NamedTuple):
    """What a write returns: how to read it, and the event that it is reached at."""

    manifest: Manifest
    event: Event


class Loaded(NamedTuple):
    """What a read returns: the tree, and the event from which its tensors hold their values."""

    tree: Any
    event: Event


class TransferTensorBuffer(LeasedMemory):
    """A pool over memory of the host or of a device. All methods may be called from any thread.

    Parameters
    ----------
    memory : Tensor, uint8, [size_bytes], contiguous, its address a multiple of 64
        Of the host (best page-locked, or registered with the device) or of the backend's device.
        Stays the caller's; it may go when ``close`` has returned.
    backend : Backend, optional
        By default the process's own.
    enums : EnumRegistry, optional
        The enums that trees may hold.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        If the memory is none that can be given out.

    Notes
    -----
    A freed range is reused when nobody can touch it any more: every holder named by ``quarantine``
    was released, no tensor views it, those of running calls included, and every stream that worked
    on it has done what it had by then. So a view may outlive its lease; it keeps the range out of
    the pool. Streams are those of the calls, the one that is current at ``free``, and what
    ``Lease.record_stream`` names.
    """

    def __init__(
        self,
        memory: torch.Tensor,
        backend: Backend | None = None,
        *,
        enums: EnumRegistry | None = None,
    ) -> None:
        super().__init__(memory, backend)
        self._enums = enums

    def write_tensors_from_device(
        self, lease: Lease, tree: object, stream: Stream | None = None
    ) -> Written:
        """Write all tensors of a tree, on any of host and device, into a lease, from its start.

        The copies run on ``stream`` after what the current stream has now, one for each tensor;
        small ones of the host go together. Padding is written too: nothing that an earlier tenant
        left is within ``Lease.written_bytes``.

        Parameters
        ----------
        lease : Lease
            Of at least the ``size_bytes`` that ``manifest_of(tree)`` says.
        tree : object
            See :func:`hwcore.diffusion.tree.flatten`; a list of tensors is one.
        stream : Stream, optional
            By default the current one. Without effect where all is in the host's memory.

        Returns
        -------
        Written
            The tensors must not be written to before its event is reached.

        Raises
        ------
        ArgumentTypeError, ArgumentValueError, LeaseError
            Before anything was written: if the tree cannot be sent, or the lease is too small or
            not of this pool.

        Notes
        -----
        Tensors of the host are read by the host during the call, page-locked ones perhaps later.
        Host sync: only where host memory is written again that a stream works on.
        """
        where = "write_tensors_from_device"
        manifest, tensors = manifest_of(tree, self._enums, where)
        return self.write_tensors(where, lease, manifest, tensors, stream)

    @lets_go
    def write_tensors(
        self,
        where: str,
        lease: Lease,
        manifest: Manifest,
        tensors: Sequence[torch.Tensor],
        stream: Stream | None,
    ) -> Written:
        """Write what ``manifest_of`` returned; ``where`` speaks in errors."""
        with self._using(where, lease) as base:
            if manifest.size_bytes > lease.size_bytes:
                raise too_small(where, "manifest.size_bytes", manifest.size_bytes, lease)
            event = self._io.write(where, lease, base, manifest.layout, tensors, stream)
            lease.written_bytes = manifest.size_bytes
        return Written(manifest, event)

    @lets_go
    def write_tensor(
        self,
        lease: Lease,
        tensor: torch.Tensor,
        byte_offset: int = 0,
        stream: Stream | None = None,
    ) -> Event:
        """Write one tensor, row-major, at an offset that its element size divides.

        As :meth:`write_tensors_from_device`. Bytes before it that were not written are zeroed.
        """
        where = "write_tensor"
        spec = spec_of(where, 0, tensor)
        layout = layout_by([TensorSpec(spec.dtype, spec.shape)], [0])
        with self._using(where, lease) as base:
            end = _check_range(where, lease, byte_offset, tensor.dtype, layout.size_bytes)
            start = min(byte_offset, lease.written_bytes)
            event = self._io.write(
                where, lease, base[start:end], layout, [tensor], stream, byte_offset - start
            )
            lease.written_bytes = max(lease.written_bytes, end)
        return event

    @lets_go
    def read_tensors_from_manifest(
        self,
        lease: Lease,
        manifest: Manifest,
        device: torch.device | str | None = None,
        stream: Stream | None = None,
        *,
        clone: bool = False,
    ) -> Loaded:
        """Return the tree that a lease holds.

        Parameters
        ----------
        manifest : Manifest
            What the write returned, or ``decode_manifest`` made of a peer's bytes.
        device : torch.device or str, optional
            Where the tensors are to be: always memory of their own, copied on ``stream``. None:
            where the pool is.
        stream : Stream, optional
            By default the current one. Without effect where all is in the host's memory.
        clone : bool
            True: memory of their own also where the pool is. False: views, which keep the range
            out of the pool for as long as there are any.

        Returns
        -------
        Loaded
            Wait for its event before the tensors are used on another stream, or by the host.
            Small tensors share their memory.

        Raises
        ------
        ArgumentTypeError, ArgumentValueError, LeaseError
            If the manifest does not fit what was written (see ``Lease.mark_received``), or the
            lease is not of this pool.

        Notes
        -----
        Host sync: only for views of host memory that a stream has written.
        """
        where = "read_tensors_from_manifest"
        with self._using(where, lease) as base:
            check_manifest(manifest, lease.written_bytes, where)
            tensors, event = self._io.read(
                where, lease, base, manifest.layout, device, stream, clone
            )
        return Loaded(unflatten(manifest.structure, tensors, self._enums, where), event)

    @lets_go
    def read_received(
        self,
        where: str,
        lease: Lease,
        manifest: Manifest,
        device: torch.device | str | None,
        stream: Stream | None,
        clone: bool,
    ) -> Loaded:
        """Read what a peer has written; the caller has checked that the manifest fits."""
        with self._using(where, lease) as base:
            lease.written_bytes = manifest.size_bytes
            tensors, event = self._io.read(
                where, lease, base, manifest.layout, device, stream, clone, is_received=True
            )
        return Loaded(unflatten(manifest.structure, tensors, self._enums, where), event)

    @lets_go
    def read_tensor(
        self,
        lease: Lease,
        shape: Sequence[int],
        dtype: torch.dtype,
        byte_offset: int = 0,
        device: torch.device | str | None = None,
        stream: Stream | None = None,
        *,
        clone: bool = False,
    ) -> Loaded:
        """Return one tensor that ``write_tensor`` wrote; as :meth:`read_tensors_from_manifest`."""
        where = "read_tensor"
        layout = layout_by([spec_by(where, shape, dtype)], [0])
        with self._using(where, lease) as base:
            end = _check_range(where, lease, byte_offset, dtype, layout.size_bytes)
            if end > lease.written_bytes:
                raise too_small(where, "its end", end, lease, lease.written_bytes)
            part = base[byte_offset:end]
            tensors, event = self._io.read(where, lease, part, layout, device, stream, clone)
        return Loaded(tensors[0], event)


def _check_range(
    where: str, lease: Lease, byte_offset: int, dtype: torch.dtype, size_bytes: int
) -> int:
    fix = "Pass an offset within the lease, a multiple of the element size"
    check_size(where, "byte_offset", byte_offset, 0, fix)
    if byte_offset % dtype.itemsize:
        expected = f"a multiple of {dtype.itemsize}, the size of an element"
        raise ArgumentValueError(describe(where, "byte_offset", byte_offset, expected, fix))
    if byte_offset + size_bytes > lease.size_bytes:
        raise too_small(where, "byte_offset + bytes", byte_offset + size_bytes, lease)
    return byte_offset + size_bytes
