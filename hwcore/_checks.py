"""Argument checks shared by what takes tensors from callers.

What a tensor *is* (dtype, shape, device) costs nothing to look at and is always checked. What it
*holds* is on the host for CPU tensors; elsewhere reading it would stall the device, so that is
left to ``HWCORE_DEBUG=1``. A graph cannot hold a read on the host: none happens while capturing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeGuard

import torch

from hwcore._env import debug_enabled
from hwcore.backend import backends_of
from hwcore.errors import ArgumentTypeError, ArgumentValueError, describe
from hwcore.graphs import tape

if TYPE_CHECKING:
    from collections.abc import Sequence


FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def may_read(tensor: torch.Tensor) -> bool:
    """Say whether a check may look at the values of ``tensor``."""
    if tensor.device.type == "cpu":
        return not tape.is_capturing()
    return debug_enabled() and not is_captured(tensor)


def is_captured(tensor: torch.Tensor) -> bool:
    """Say whether what is done to ``tensor`` now goes into a graph, the tape's or the device's."""
    kind = tensor.device.type
    # Of those there are: a check must not select one.
    backends = [] if kind == "cpu" else backends_of(kind)
    return tape.is_capturing() or any(backend.is_capturing() for backend in backends)


def check_instance(where: str, name: str, value: object, expected: type, maker: str) -> None:
    """Raise unless ``value`` is an ``expected``, which ``maker`` returns."""
    if not isinstance(value, expected):
        what = f"a {expected.__name__}"
        raise ArgumentTypeError(describe(where, name, value, what, f"Pass what {maker} returned"))


def is_number(value: object) -> TypeGuard[float]:
    """Say whether ``value`` is an int or a float; a bool is neither."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_callable(where: str, name: str, value: object, fix: str) -> None:
    """Raise unless ``value`` is None or can be called."""
    if value is not None and not callable(value):
        raise ArgumentTypeError(describe(where, name, value, "a callable", fix))


def check_size(where: str, name: str, value: object, lowest: int, fix: str) -> None:
    """Raise unless ``value`` is an int (a bool is none) and at least ``lowest``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ArgumentTypeError(describe(where, name, value, "an int", fix))
    if value < lowest:
        raise ArgumentValueError(describe(where, name, value, f"at least {lowest}", fix))


def check_tensor(
    where: str,
    name: str,
    value: object,
    dtypes: Sequence[torch.dtype],
    shape: Sequence[tuple[str, int | None]],
    device: torch.device | None = None,
) -> None:
    """Raise unless ``value`` is a tensor of one of ``dtypes``, of ``shape``, on ``device``.

    Parameters
    ----------
    shape : sequence of (str, int or None)
        One entry a dimension: how messages call it, and its size; None admits any.
    """
    form = "[" + ", ".join(label for label, _ in shape) + "]"
    if not isinstance(value, torch.Tensor):
        fix = "Pass a torch.Tensor"
        raise ArgumentTypeError(describe(where, name, value, f"a tensor {form}", fix))
    if value.dtype not in dtypes:
        wanted = " or ".join(str(dtype) for dtype in dtypes)
        fix = f"Convert it with {name}.to({dtypes[0]})"
        raise ArgumentTypeError(describe(where, f"{name}.dtype", value.dtype, wanted, fix))
    if value.dim() != len(shape):
        wanted = f"{len(shape)} dimensions, {form}"
        fix = f"Reshape {name}, which is {list(value.shape)}"
        raise ArgumentTypeError(describe(where, f"{name}.dim()", value.dim(), wanted, fix))
    if any(size not in (None, got) for (_, size), got in zip(shape, value.shape, strict=True)):
        sizes = [label if size is None else f"{label}={size}" for label, size in shape]
        wanted = f"[{', '.join(sizes)}]"
        fix = "Make the sizes agree with the other arguments"
        raise ArgumentValueError(describe(where, f"{name}.shape", list(value.shape), wanted, fix))
    if device is not None and value.device != device:
        fix = f"Move it with {name}.to({str(device)!r})"
        wanted = f"{device}, where the other arguments are"
        raise ArgumentTypeError(describe(where, f"{name}.device", value.device, wanted, fix))


def check_values(
    where: str, name: str, values: torch.Tensor, bad: torch.Tensor, expected: str, fix: str
) -> None:
    """Raise if the boolean ``bad`` is set anywhere, naming the first place and value there."""
    bad = bad.cpu()  # it is read here anyway, and the device may lack what finds the place
    if bool(bad.any()):
        place = bad.nonzero()[0].tolist()
        what = f"{name}[{', '.join(map(str, place))}]"
        got = values[tuple(place)].item()
        raise ArgumentValueError(describe(where, what, got, expected, fix))


def check_range(
    where: str, name: str, values: torch.Tensor, lowest: float, end: float, expected: str, fix: str
) -> None:
    """Raise unless all ``values`` are in [lowest, end), naming the first that is not.

    One pass over the values, where all is well; NaN is in no range.
    """
    if values.numel():
        least, most = torch.aminmax(values)
        if not (least.item() >= lowest and most.item() < end):
            check_values(where, name, values, ~((values >= lowest) & (values < end)), expected, fix)
