"""What a graph cannot hold, refused while capturing with the line at fault.

The tables were found by running every way to read a tensor under both of torch's modes.
"""

from __future__ import annotations

import inspect
import linecache
import os
import sys
from typing import Any, NoReturn

import torch
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves

from hwcore.errors import CaptureError

__all__ = ["HostReads", "check_call", "tensors_in"]

aten = torch.ops.aten
_TORCH, _HERE, _STANDARD_LIBRARY = (
    os.path.join(os.path.dirname(file), "") for file in (torch.__file__, __file__, os.__file__)
)
_SANITIZER = os.path.join(os.path.dirname(os.path.dirname(_HERE)), "testing", "sanitizer", "")
_FIX = (
    "Keep the value on the device (torch.where instead of a branch, nonzero_static or another "
    "fixed shape, an *_ex variant of torch.linalg), or read it before the capture or after a replay"
)

# Reads that never reach the dispatcher for host memory, or not from inside a constructor.
_READING_FUNCTIONS = {
    inspect.unwrap(getattr(torch.Tensor, name))
    for name in (
        *("__array__", "__dlpack__", "__format__", "__repr__", "item", "numpy", "tolist"),
        *("__bool__", "__complex__", "__float__", "__index__", "__int__", "is_nonzero"),
        *("apply_", "map_", "map2_"),
    )
}
# These read the tensors in a list; a tensor by itself is copied as by any other op.
_CONSTRUCTORS = {
    torch.as_tensor,
    torch.asarray,
    torch.tensor,
    torch.Tensor.new,
    torch.Tensor.new_tensor,
}
_TENSOR_SPLIT = {torch.tensor_split, torch.Tensor.tensor_split}

# Reads that torch's tags miss.
_READING_OPS = {
    aten._linalg_check_errors,
    aten._pack_padded_sequence,
}
_INDEXING = {aten.index, aten._unsafe_index}
_INDEX_WRITING = {aten.index_put, aten.index_put_, aten._unsafe_index_put, aten._index_put_impl_}
_COPIES = {aten.copy_, aten._foreach_copy_, aten._to_copy}
_STORAGE_CHANGES = {aten.resize_, aten.resize_as_, aten.set_}


class HostReads(TorchFunctionMode):
    """Refuses, while it is active, the host reads that the dispatcher does not see."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        values = (*args, *(kwargs or {}).values())
        plain = inspect.unwrap(func)  # another tool, such as a sanitizer, may have wrapped it
        if (
            plain in _READING_FUNCTIONS
            or (func in _CONSTRUCTORS and any(_holds_tensors(v) for v in values))
            or (func in _TENSOR_SPLIT and any(isinstance(v, torch.Tensor) for v in values[1:]))
        ):
            name = resolve_name(plain) or f"torch.Tensor.{plain.__name__}"
            _refuse(f"the host read {name}", _FIX)
        return func(*args, **(kwargs or {}))


def check_call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise if a graph cannot hold a call that is about to be made.

    Parameters
    ----------
    func : OpOverload
        An op that does not decompose further.
    args, kwargs
        What it is called with.

    Raises
    ------
    CaptureError
        Naming the op and the line of the innermost caller outside torch and this package.
    """
    packet = func.overloadpacket
    if packet in _STORAGE_CHANGES and args[0].numel():
        # An empty tensor is how torch wraps a storage, and a usual scratch for out=.
        fix = "Allocate the tensor at its final size before the capture, or use view and clone"
        _refuse(f"{func}, which changes a tensor's storage,", fix)
    if packet in _COPIES and _copies_to_host(args, kwargs):
        _refuse(f"{func} from a device to host memory", _FIX)
    if packet in _INDEXING or packet in _INDEX_WRITING:
        masked = any(t.dtype in (torch.bool, torch.uint8) for t in tensors_in(args[1]))
        # With one value torch fills by the mask and needs no positions.
        reads = masked and (packet in _INDEXING or args[2].numel() != 1)
    elif packet is aten.repeat_interleave:
        reads = kwargs.get("output_size") is None
    else:
        tags = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
        reads = packet in _READING_OPS or any(tag in func.tags for tag in tags)
    if reads:
        _refuse(f"the host read {func}", _FIX)


def tensors_in(tree: Any) -> list[torch.Tensor]:
    """Return the tensors among the leaves of a pytree."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _holds_tensors(value: Any) -> bool:
    return not isinstance(value, torch.Tensor) and bool(tensors_in(value))


def _copies_to_host(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    to, *sources = args
    if sources:  # copy_(to, from)
        hosts, sources = tensors_in(to), tensors_in(sources[0])
        to_host = any(t.device.type == "cpu" for t in hosts)
    else:  # _to_copy(from, device=to)
        sources = [to]
        to_host = torch.device(kwargs.get("device") or to.device).type == "cpu"
    return to_host and any(t.device.type != "cpu" for t in sources)


def _refuse(what: str, fix: str) -> NoReturn:
    frame = sys._getframe(1)
    while frame.f_back and not _is_user_code(frame.f_code.co_filename):
        frame = frame.f_back
    file, line = frame.f_code.co_filename, frame.f_lineno
    text = linecache.getline(file, line, frame.f_globals).strip()
    message = (
        f"Tape.capture: fn made {what} at {file}:{line}: `{text}`; "
        f"expected only work that a device does without the host. {fix}."
    )
    raise CaptureError(message)


def _is_user_code(file: str) -> bool:
    if file.startswith((_TORCH, _HERE, _SANITIZER, "<frozen")):
        return False
    # Installed packages may lie below the standard library.
    return not file.startswith(_STANDARD_LIBRARY) or "site-packages" in file
