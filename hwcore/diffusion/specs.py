"""What a tensor is, as far as another process has to know, and which ones can be sent."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import msgspec
import torch

from hwcore.errors import ArgumentTypeError, ArgumentValueError, describe

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = [
    "DTYPES",
    "MAX_TENSORS",
    "TensorSpec",
    "check_spec",
    "is_dense",
    "spec_by",
    "spec_bytes",
    "spec_of",
]

MAX_RANK = 64  # torch's own limit
MAX_TENSORS = 65_536  # of a message: what a few bytes of it could make a reader allocate

# Every dtype that torch can clone; which of them there are depends on torch's version. Not among
# them: quantised ones, which mean nothing without their scales, and int1 to uint7, which torch
# cannot copy.
_NAMES = """
    bool uint8 uint16 uint32 uint64 int8 int16 int32 int64
    float16 bfloat16 float32 float64 complex32 complex64 complex128
    float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu float4_e2m1fn_x2
    bits8 bits16 bits1x8 bits2x4 bits4x2
"""
DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name) for name in _NAMES.split() if hasattr(torch, name)
}
"""Name on the wire to dtype."""

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ITEM_BYTES = {name: dtype.itemsize for name, dtype in DTYPES.items()}
_PLAIN = (torch.Tensor, torch.nn.Parameter)


class TensorSpec(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a tensor is.

    Attributes
    ----------
    dtype : str
        A key of ``DTYPES``.
    shape : tuple of int
    strides : tuple of int, optional
        In elements, of a tensor that is dense in another order of its dimensions, such as
        channels last; None: row-major.
    """

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None


def spec_bytes(spec: TensorSpec) -> tuple[int, int]:
    """Return the bytes of a tensor's elements, and of one of them."""
    item = _ITEM_BYTES[spec.dtype]
    return math.prod(spec.shape) * item, item


def spec_of(where: str, index: int, tensor: torch.Tensor) -> TensorSpec:
    """Return what a tensor is: with its strides where it is dense in another order.

    Raises
    ------
    ArgumentTypeError
        If it is no plain strided tensor with elements of its own, or of a dtype that is not in
        ``DTYPES``.
    """
    if type(tensor) not in _PLAIN:
        fix = "Pass a plain tensor; of a subclass the plain tensors that it is made of"
        raise _unfit(where, index, type(tensor), "a torch.Tensor", fix)
    if tensor.layout is not torch.strided:
        fix = "Convert it with to_dense(), or pass its indices and values"
        raise _unfit(where, index, tensor.layout, "a layout of torch.strided", fix)
    if tensor.is_nested:
        fix = "Pass the tensors that unbind() returns"
        raise _unfit(where, index, "a nested tensor", "one shape", fix)
    if tensor.is_meta:
        fix = "Pass one that has elements, or its shape"
        raise _unfit(where, index, tensor.device, "a device with memory", fix)
    name = _DTYPE_NAMES.get(tensor.dtype)
    if name is None:
        fix = "Convert it; of a quantised tensor pass int_repr(), scale and zero point"
        raise _unfit(where, index, tensor.dtype, "a dtype that torch can clone", fix)
    if tensor.is_contiguous():
        return _row_major(name, tensor.shape)
    return TensorSpec(name, tuple(tensor.shape), tensor.stride() if is_dense(tensor) else None)


@functools.lru_cache(1024)
def _row_major(name: str, shape: torch.Size) -> TensorSpec:
    return TensorSpec(name, tuple(shape))


def spec_by(where: str, shape: Sequence[int], dtype: torch.dtype) -> TensorSpec:
    """Return the spec of a row-major tensor of that shape and dtype.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        If there can be none.
    """
    fix = "Pass what was written"
    name = _DTYPE_NAMES.get(dtype) if isinstance(dtype, torch.dtype) else None
    if name is None:
        raise ArgumentTypeError(describe(where, "dtype", dtype, "one of DTYPES", fix))
    if not isinstance(shape, (list, tuple)) or not all(type(size) is int for size in shape):
        raise ArgumentTypeError(describe(where, "shape", shape, "a sequence of ints", fix))
    spec = TensorSpec(name, tuple(shape))
    check_spec(where, 0, spec, 2**62)
    return spec


def check_spec(where: str, index: int, spec: TensorSpec, limit_bytes: int) -> None:
    """Raise unless a tensor, as a peer described it, can be, and fits.

    Raises
    ------
    ArgumentValueError
        If it cannot.
    """
    name, fix = f"tensor {index}", "Send what pack_tensors() or a pool's write says"
    if spec.dtype not in DTYPES:
        known = f"one of {', '.join(DTYPES)}"
        raise _bad(where, f"dtype of {name}", spec.dtype, known, fix)
    if len(spec.shape) > MAX_RANK:
        expected = f"at most {MAX_RANK} dimensions"
        raise _bad(where, f"rank of {name}", len(spec.shape), expected, fix)
    # An empty tensor may have any other sizes, and torch multiplies them, as int64. Factors of at
    # most 63 bits keep the product here a number of moderate length.
    sizes = [max(size, 1) for size in spec.shape]
    if not all(0 <= n < 2**63 for n in spec.shape) or math.prod(sizes) >= 2**59:
        expected = "sizes ≥ 0 of fewer than 2**59 elements"
        raise _bad(where, f"shape of {name}", spec.shape, expected, fix)
    size_bytes, _ = spec_bytes(spec)
    if size_bytes > limit_bytes:
        expected = f"at most {limit_bytes}, which there are"
        raise _bad(where, f"bytes of {name}", size_bytes, expected, fix)
    strides = spec.strides
    if strides is not None and (
        len(strides) != len(spec.shape)
        or not all(0 <= stride < 2**59 for stride in strides)
        or not size_bytes
        or not _is_dense(spec.shape, strides)
    ):
        expected = "another order of its dimensions, without gaps"
        raise _bad(where, f"strides of {name}", strides, expected, fix)


def is_dense(tensor: torch.Tensor) -> bool:
    """Say whether a tensor's elements fill their range once each, whatever the order."""
    return tensor.is_contiguous() or _is_dense(tensor.shape, tensor.stride())


def _is_dense(shape: Iterable[int], strides: Iterable[int]) -> bool:
    """Say whether elements fill their range once each, in whatever order of dimensions."""
    step = 1
    for stride, size in sorted((s, n) for n, s in zip(shape, strides, strict=True) if n != 1):
        if stride != step:
            return False
        step *= size
    return True


def _unfit(where: str, index: int, got: object, expected: str, fix: str) -> ArgumentTypeError:
    return ArgumentTypeError(describe(where, f"tensor {index}", got, expected, fix))


def _bad(where: str, what: str, got: object, expected: str, fix: str) -> ArgumentValueError:
    return ArgumentValueError(describe(where, f"`{what}`", got, expected, fix))
