"""Tensors and bytes of the host, seen as each other: without a copy, and alive while seen."""

from __future__ import annotations

import ctypes
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hwcore.errors import ArgumentTypeError, ArgumentValueError, describe

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "TensorWrapper",
    "copy_to_host",
    "host_alias",
    "in_memory_order",
    "is_sanitized",
    "tell_sanitizer",
    "tensor_over",
]


class TensorWrapper(np.ndarray):
    """The bytes of a tensor for whatever takes a buffer, such as a socket; nothing is copied.

    ``memoryview(TensorWrapper(tensor))`` is writable memory of the tensor itself, and holds it.

    Parameters
    ----------
    tensor : Tensor, any dtype and shape, row-major, CPU

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        If its bytes are not in the host's memory, one after the other.

    Notes
    -----
    A subclass of numpy's array, because up to Python 3.11 no class written in Python can offer a
    buffer, and because the array holds the tensor and keeps its storage from being resized.
    """

    def __new__(cls, tensor: torch.Tensor) -> TensorWrapper:
        """Return the bytes."""
        if not isinstance(tensor, torch.Tensor):
            fix = "Pass a torch.Tensor"
            raise ArgumentTypeError(describe("TensorWrapper", "tensor", tensor, "a tensor", fix))
        lazy = tensor.is_conj() or tensor.is_neg() or tensor._is_zerotensor()
        if not tensor.is_cpu or tensor.layout is not torch.strided or lazy:
            got = f"{tensor.layout} on {tensor.device}, lazy: {lazy}"
            expected = "a tensor with its elements in the host's memory"
            fix = "Call .cpu().to_dense().resolve_conj().resolve_neg(), or pack_tensors()"
            raise ArgumentValueError(describe("TensorWrapper", "tensor", got, expected, fix))
        if not tensor.is_contiguous():
            got = f"shape {list(tensor.shape)} with strides {list(tensor.stride())}"
            expected, fix = "a row-major tensor", "Call .contiguous(), or pack_tensors()"
            raise ArgumentValueError(describe("TensorWrapper", "tensor", got, expected, fix))
        flat = tensor.detach().reshape(-1).view(torch.uint8)
        array: TensorWrapper = flat.numpy().view(cls)
        return array


def copy_to_host(into: torch.Tensor, parts: Sequence[tuple[int, torch.Tensor]]) -> None:
    """Copy small tensors of the host into one range of its memory.

    Parameters
    ----------
    into : Tensor, uint8, [any], CPU
    parts : sequence of (int, Tensor)
        Offset in bytes, and a tensor of the CPU for which ``is_plain`` holds. The caller has seen
        that they fit.

    Notes
    -----
    Not by torch, whose copy of 64 bytes takes several times as long as moving them.
    """
    start, move = into.data_ptr(), ctypes.memmove
    for offset, tensor in parts:
        move(start + offset, tensor.data_ptr(), tensor.nbytes)
    if parts and _sanitizer() is not None:
        targets = [into[offset : offset + tensor.nbytes] for offset, tensor in parts]
        tell_sanitizer("copy_to_host", [tensor for _, tensor in parts], targets)


def tell_sanitizer(
    name: str, reads: Sequence[torch.Tensor] = (), writes: Sequence[torch.Tensor] = ()
) -> None:
    """Name memory of the host that is touched beside torch, while a sanitizer is on."""
    tracker = _sanitizer()
    if tracker is not None:
        from hwcore.testing.sanitizer import kernel

        # Where the device is the host, its streams order this like any torch call.
        kernel(name, reads=reads, writes=writes, host=not tracker.is_host_backend)


def is_sanitized() -> bool:
    """Say whether :func:`tell_sanitizer` has anyone to tell, before tensors are made for it."""
    return _sanitizer() is not None


def _sanitizer() -> Any:
    """Return the tracker of the sanitizer that is on, if one is."""
    module = sys.modules.get("hwcore.testing.sanitizer.sanitizer")
    return None if module is None else module.active_tracker()


def tensor_over(buffer: object, where: str, name: str) -> torch.Tensor:
    """Return the bytes of a buffer as a tensor that holds it, copied if that cannot be.

    Parameters
    ----------
    buffer : bytes-like
        Copied if it is read-only, or not aligned to 16 bytes.

    Returns
    -------
    Tensor, uint8, [bytes], CPU

    Raises
    ------
    ArgumentTypeError
        If it is no contiguous buffer.
    """
    try:
        array = np.frombuffer(memoryview(buffer).cast("B"), np.uint8)  # type: ignore[arg-type]
    except (TypeError, ValueError, BufferError) as error:
        if isinstance(buffer, (bytes, bytearray)) or _is_empty(buffer):
            array = np.empty(0, np.uint8)  # numpy takes no empty buffer
        else:
            fix = "Pass what the socket received"
            message = describe(where, name, buffer, "a contiguous buffer of bytes", fix)
            raise ArgumentTypeError(message) from error
    if array.flags.writeable and array.ctypes.data % 16 == 0:
        return torch.from_numpy(array)
    copy = torch.empty(array.size, dtype=torch.uint8)
    copy.numpy()[:] = array
    return copy


def host_alias(tensor: torch.Tensor) -> torch.Tensor:
    """Return a dense tensor of a device, whose memory the host can read, as one of the CPU.

    For devices of which ``needs_cpu_fallback(tensor, "serialize")`` says False. The caller waits
    for the device before it reads.
    """
    if not tensor.nbytes:
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    held: Any = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    held.tensor = tensor  # the array has no other owner
    elements = torch.from_numpy(np.frombuffer(held, np.uint8)).view(tensor.dtype)
    return elements.as_strided(tensor.shape, tensor.stride())


def in_memory_order(tensor: torch.Tensor) -> torch.Tensor:
    """Return a dense tensor's elements as one row, in the order that they have in memory."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def _is_empty(buffer: Any) -> bool:
    try:
        return memoryview(buffer).nbytes == 0
    except TypeError:
        return False
