"""Checksum of host bytes: XXH3 with 64 bits, over the bytes and their number.

Of what was measured (``hwcore bench transfer_engines``) it is the one that costs less than the
copy it guards: crc32 of the standard library and crc32c wheels are slower than memcpy, and a plain
sum of words does not see two that were swapped. It finds accidents, a flipped bit, moved words, a
tail that is missing; it is no defence against somebody who wants two contents to look the same.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import torch
import xxhash

from hwcore._checks import check_tensor
from hwcore.errors import ArgumentValueError, describe

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Digest", "bytes_of", "checksum", "copy_with_checksum", "memoryview_of", "sum_of"]

_CHUNK_BYTES = 256 * 1024  # in a core's cache between its checksum and its copy
_HOST = torch.device("cpu")


def bytes_of(where: str, name: str, tensor: Tensor) -> memoryview:
    """Return the bytes of a host tensor, without copying; they keep the tensor's memory alive.

    Parameters
    ----------
    where, name : str
        How an error calls the function and the argument.
    tensor : Tensor, uint8, [n], contiguous, on the CPU

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        If the tensor is not as above.
    """
    check_tensor(where, name, tensor, (torch.uint8,), [("n", None)], _HOST)
    if not tensor.is_contiguous():
        fix = f"Pass {name}.contiguous()"
        got = tensor.stride()
        raise ArgumentValueError(describe(where, f"{name}.stride()", got, "(1,)", fix))
    if not tensor.numel():
        return memoryview(b"")
    array = (ctypes.c_ubyte * tensor.numel()).from_address(tensor.data_ptr())
    vars(array)["tensor"] = tensor  # the address alone would not keep the memory
    return memoryview(array).cast("B")


def checksum(tensor: Tensor) -> int:
    """Return the checksum of a tensor's bytes.

    Parameters
    ----------
    tensor : Tensor, uint8, [n], contiguous, on the CPU

    Returns
    -------
    int
        In [0, 2**64).

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        If the tensor is not as above.
    """
    return xxhash.xxh3_64_intdigest(bytes_of("checksum", "tensor", tensor))


def copy_with_checksum(destination: Tensor, source: Tensor) -> int:
    """Copy bytes and return the checksum of the source, reading memory once.

    Each chunk is summed and then copied while a core's cache has it.

    Parameters
    ----------
    destination, source : Tensor, uint8, [n], contiguous, on the CPU
        Of the same size, not overlapping.

    Returns
    -------
    int
        As :func:`checksum` of ``source``.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        If a tensor is not as above. Nothing was copied then.
    """
    where = "copy_with_checksum"
    bytes_of(where, "destination", destination)
    view = bytes_of(where, "source", source)
    if destination.numel() != source.numel():
        fix = "Pass the part of the destination that the source fills"
        got = destination.numel()
        expected = f"{source.numel()}, as source.numel()"
        raise ArgumentValueError(describe(where, "destination.numel()", got, expected, fix))
    digest = Digest()
    digest._copy(destination.data_ptr(), source.data_ptr(), view)
    return digest.value


def sum_of(tensor: Tensor) -> int:
    """Return what :func:`checksum` does, of a tensor that needs no check."""
    return xxhash.xxh3_64_intdigest(memoryview_of(tensor))


class Digest:
    """A checksum of bytes that come one after the other; like :func:`checksum` of all at once."""

    def __init__(self) -> None:
        self._state = xxhash.xxh3_64()

    @property
    def value(self) -> int:
        """The checksum of what has come so far, in [0, 2**64)."""
        return self._state.intdigest()

    def add(self, tensor: Tensor) -> None:
        """Add bytes: uint8, [n], contiguous, on the CPU."""
        self._state.update(memoryview_of(tensor))

    def copy(self, destination: Tensor, source: Tensor) -> None:
        """Add the bytes of ``source`` and copy them to ``destination``, of the same size."""
        self._copy(destination.data_ptr(), source.data_ptr(), memoryview_of(source))

    def _copy(self, target: int, origin: int, view: memoryview) -> None:
        for start in range(0, len(view), _CHUNK_BYTES):
            count = min(_CHUNK_BYTES, len(view) - start)
            self._state.update(view[start : start + count])
            ctypes.memmove(target + start, origin + start, count)  # slices of tensors cost more


def memoryview_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor that needs no check: uint8, [n], contiguous, on the CPU."""
    array: Any = tensor.numpy()
    return memoryview(array)
