"""Trees of tensors as the frames of a message, for a socket that sends several in one.

===== ================================================================
frame holds
===== ================================================================
0     the manifest, by msgpack
1     all tensors below ``LARGE_BYTES``, one after the other; if any
rest  one larger tensor each, by rising offset in the layout
===== ================================================================
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from hwcore.activation import current_backend
from hwcore.diffusion.host import (
    TensorWrapper,
    copy_to_host,
    host_alias,
    in_memory_order,
    tensor_over,
)
from hwcore.diffusion.layout import LARGE_BYTES, by_place
from hwcore.diffusion.manifest import decode_manifest, encode_manifest, manifest_of
from hwcore.diffusion.specs import is_dense
from hwcore.diffusion.tree import unflatten
from hwcore.diffusion.views import is_stored_as, plain, view_of, views_of_parts
from hwcore.errors import ArgumentTypeError, ArgumentValueError, describe

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hwcore.backend import Backend
    from hwcore.diffusion.enums import EnumRegistry
    from hwcore.diffusion.layout import Layout, TensorEntry

__all__ = ["pack_tensors", "unpack_tensors"]


def pack_tensors(
    tree: object, *, enums: EnumRegistry | None = None, backend: Backend | None = None
) -> list[bytes | TensorWrapper]:
    """Return a tree as frames, to be sent in order as one message.

    Parameters
    ----------
    tree : object
        See :func:`hwcore.diffusion.tree.flatten`. Tensors may be on any device.
    enums : EnumRegistry, optional
        The enums that the tree may hold.
    backend : Backend, optional
        By default the process's own; asked only where a tensor is not on the CPU.

    Returns
    -------
    list of bytes or TensorWrapper
        A large, dense tensor of the CPU is its own frame: do not write to it before it was sent.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        If the tree cannot be sent.

    Notes
    -----
    Host sync: waits for the current stream where a tensor is on a device.
    """
    where = "pack_tensors"
    manifest, tensors = manifest_of(tree, enums, where)
    first = encode_manifest(manifest, where)
    layout = manifest.layout
    sources = by_place(layout, tensors)
    spans = layout.parts()
    start, end = spans[0] if spans else (0, 0)
    has_small = any(0 < entry.size_bytes < LARGE_BYTES for entry in layout.entries)
    small = torch.empty(end - start if has_small else 0, dtype=torch.uint8)
    frames = [small] if has_small else []
    to_move: list[tuple[int, torch.Tensor]] = []
    to_copy: list[tuple[torch.Tensor, int, TensorEntry, torch.Tensor]] = []
    reader = _HostReader(backend)
    for entry in layout.places():
        tensor = reader.on_host(sources[entry.offset])
        in_place = tensor.is_cpu and is_stored_as(tensor, entry)
        if entry.size_bytes < LARGE_BYTES:
            if in_place:
                to_move.append((entry.offset - start, tensor))
            else:
                to_copy.append((small, entry.offset - start, entry, tensor))
        elif in_place:
            frames.append(in_memory_order(tensor))
        else:
            frames.append(reader.buffer(entry.size_bytes, tensor))
            to_copy.append((frames[-1], 0, entry, tensor))
    reader.wait()  # before the host reads in place
    copy_to_host(small, to_move)
    for base, offset, entry, tensor in to_copy:
        view_of(base, offset, entry).copy_(plain(tensor), non_blocking=True)
    reader.wait()
    return [first, *map(TensorWrapper, frames)]


def unpack_tensors(
    frames: Sequence[Any],
    device: torch.device | str | None = None,
    *,
    enums: EnumRegistry | None = None,
) -> Any:
    """Return the tree that the frames of a message hold.

    Parameters
    ----------
    frames : sequence of bytes-like
        From anywhere: nothing in them is believed.
    device : torch.device or str, optional
        Where the tensors are to be, in memory of their own. None: on the CPU, as views of the
        frames' memory, which they hold; one copy of a frame that is read-only or not aligned to
        16 bytes.
    enums : EnumRegistry, optional
        The enums that the tree may hold.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        If they are not what ``pack_tensors`` returns.

    Notes
    -----
    Small tensors share their memory. Host sync: as a blocking copy to ``device``.
    """
    where, fix = "unpack_tensors", "Pass all frames of one message, in the order of pack_tensors()"
    if isinstance(frames, (bytes, bytearray, memoryview)) or not len(frames):
        expected = "a list of at least one frame"
        raise ArgumentTypeError(describe(where, "frames", frames, expected, fix))
    buffers = [tensor_over(it, where, f"frame {n}") for n, it in enumerate(frames) if n]
    limit = sum(buffer.numel() for buffer in buffers)
    # What is between large tensors is not sent, and is below 64 bytes each.
    manifest = decode_manifest(frames[0], limit + 64 * len(buffers), where)
    _check_sizes(where, manifest.layout, buffers, fix)
    if device is not None:
        buffers = [_own(buffer, torch.device(device)) for buffer in buffers]
    at = torch.device("cpu" if device is None else device)
    tensors = views_of_parts(manifest.layout, buffers, at)
    return unflatten(manifest.structure, tensors, enums, where)


class _HostReader:
    """What has to be copied to the host before its bytes are read, and the wait for it."""

    def __init__(self, backend: Backend | None) -> None:
        self._given = backend
        self._devices: set[torch.device] = set()

    @property
    def _backend(self) -> Backend:
        self._given = self._given or current_backend()
        return self._given

    def on_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor of a device that shares memory with the host as one of the CPU."""
        if tensor.is_cpu:
            return tensor
        self._devices.add(tensor.device)
        if self._backend.needs_cpu_fallback(tensor, "serialize"):
            return tensor
        tensor = plain(tensor)
        return host_alias(tensor if is_dense(tensor) else tensor.contiguous())

    def buffer(self, size_bytes: int, tensor: torch.Tensor) -> torch.Tensor:
        """Return memory of the host for a tensor's bytes."""
        made = torch.empty(size_bytes, dtype=torch.uint8)
        return made if tensor.is_cpu else self._backend.pin_memory(made)

    def wait(self) -> None:
        """Wait for the current streams of the devices whose tensors are read."""
        for device in self._devices:
            self._backend.synchronize_stream(self._backend.current_stream(device))


def _check_sizes(where: str, layout: Layout, buffers: list[torch.Tensor], fix: str) -> None:
    sizes = [end - start for start, end in layout.parts()]
    got = [buffer.numel() for buffer in buffers]
    if got != sizes:
        expected = f"{sizes}, by the manifest"
        raise ArgumentValueError(describe(where, "sizes of the frames", got, expected, fix))


def _own(buffer: torch.Tensor, device: torch.device) -> torch.Tensor:
    return torch.empty_like(buffer, device=device).copy_(buffer)
