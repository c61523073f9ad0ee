"""What torch's schemas cannot say: which rows an index names, what a custom kernel touches."""

from __future__ import annotations

import contextlib
import functools
import inspect
import operator
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from hwcore.errors import ArgumentTypeError, ArgumentValueError, describe
from hwcore.testing.sanitizer.operations import enter_kernel
from hwcore.testing.sanitizer.ranges import rows_of
from hwcore.testing.sanitizer.sanitizer import active_tracker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

__all__ = ["annotate", "kernel", "rows"]

F = TypeVar("F", bound="Callable[..., Any]")


@contextlib.contextmanager
def rows(tensor: torch.Tensor, rows: int | slice | Iterable[int] | torch.Tensor) -> Iterator[None]:
    """Narrow what indexed ops and kernels on a tensor count for to some of its rows.

    Without it ``index_put_``, ``scatter_``, ``index_select`` and the like count as touching the
    whole tensor. Holds for the calling thread, and for the tensor and its views. Does nothing while
    no sanitizer is on.

    Parameters
    ----------
    tensor : Tensor, [rows, ...]
    rows : int, slice, iterable of int, or integer Tensor on the CPU
        The rows that will be touched, known to the host; negative ones count from the end.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        While a sanitizer is on: if ``tensor`` is none, ``rows`` is not known to the host, or a row
        does not exist.
    """
    tracker = active_tracker()
    if tracker is None:
        yield
        return
    _check_tensors("rows", "tensor", [tensor])
    region = rows_of(
        int(tensor.storage_offset()),
        tensor.shape,
        tensor.stride(),
        tensor.itemsize,
        _row_numbers(tensor, rows) if tensor.numel() else (),
    )
    with tracker.lock:
        history = tracker.find_or_begin(tensor)
    before = tracker.thread.rows
    if history is not None:
        tracker.thread.rows = (*before, (history, region))
    try:
        yield
    finally:
        tracker.thread.rows = before


def kernel(
    name: str,
    reads: Sequence[torch.Tensor] = (),
    writes: Sequence[torch.Tensor] = (),
    host: bool = False,
) -> None:
    """Tell the sanitizer what a kernel that torch does not see touches on the current stream.

    Call it where the kernel is launched. Does nothing while no sanitizer is on.

    Parameters
    ----------
    name : str
        For reports.
    reads, writes : sequence of Tensor
        Pass views to name parts of a tensor; :func:`rows` narrows them further.
    host : bool
        True: the host itself touches them, such as through an array of ``Tensor.numpy()``.

    Raises
    ------
    ArgumentTypeError
        While a sanitizer is on: if ``reads`` or ``writes`` holds anything but tensors.
    """
    tracker = active_tracker()
    if tracker is not None:
        _check_tensors("kernel", "reads", reads)
        _check_tensors("kernel", "writes", writes)
        enter_kernel(tracker, name, reads, writes, host)


def annotate(reads: Sequence[str] = (), writes: Sequence[str] = ()) -> Callable[[F], F]:
    """Decorate a kernel's launcher with the parameters whose memory it reads and writes.

    Parameters
    ----------
    reads, writes : sequence of str
        Names of parameters that take a tensor, None, or a list or tuple of tensors.

    Raises
    ------
    ArgumentValueError
        If the function has no such parameter.
    """

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        called = _name_of(function)
        for parameter in (*reads, *writes):
            if parameter not in signature.parameters:
                known = ", ".join(signature.parameters) or "none"
                raise ArgumentValueError(
                    describe(
                        f"annotate({called})",
                        "`reads` or `writes`",
                        parameter,
                        f"a parameter of the function ({known})",
                        "Name the parameter that takes the tensor",
                    )
                )

        @functools.wraps(function)
        def launch(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            tracker = active_tracker()
            if tracker is not None:
                bound = signature.bind(*args, **kwargs)
                bound.apply_defaults()
                given = bound.arguments
                enter_kernel(
                    tracker,
                    called,
                    [t for name in reads for t in _tensors(given.get(name))],
                    [t for name in writes for t in _tensors(given.get(name))],
                    host=False,
                )
            return result

        return launch  # type: ignore[return-value] # the same signature, by functools.wraps

    return decorate


def _name_of(function: Any) -> str:
    """Return a name for a callable that has none: that of what a partial calls, or its type's."""
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__name__", type(function).__name__))


def _check_tensors(where: str, parameter: str, values: Any) -> None:
    what = f"`{parameter}`"
    if not isinstance(values, (list, tuple)):
        fix = "Put it into a list"
        raise ArgumentTypeError(describe(where, what, values, "a list or tuple of tensors", fix))
    for value in values:
        if not isinstance(value, torch.Tensor):
            fix = "Leave out what is no tensor, and pass a tensor for an array"
            raise ArgumentTypeError(describe(where, what, value, "a torch.Tensor", fix))


def _tensors(value: Any) -> list[torch.Tensor]:
    values = value if isinstance(value, (list, tuple)) else (value,)
    return [item for item in values if isinstance(item, torch.Tensor)]


def _row_numbers(tensor: torch.Tensor, rows: Any) -> list[int]:
    where, fix = "rows", "Pass row numbers that the host knows, within the tensor's first dimension"
    count = tensor.shape[0] if tensor.dim() else 0
    if isinstance(rows, slice):
        return list(range(count)[rows])
    if isinstance(rows, torch.Tensor):
        integers = not (rows.dtype.is_floating_point or rows.dtype == torch.bool)
        if rows.device.type != "cpu" or not integers or rows.dim() > 1:
            expected = "an integer tensor of at most one dimension on the CPU"
            raise ArgumentTypeError(describe(where, "`rows`", rows, expected, fix))
        rows = torch._C.TensorBase.tolist(rows)  # unseen: it is the caller who knows the rows
    try:
        numbers = [operator.index(row) for row in (rows if hasattr(rows, "__iter__") else [rows])]
    except TypeError as error:
        expected = "an int, a slice, or ints"
        raise ArgumentTypeError(describe(where, "`rows`", rows, expected, fix)) from error
    for row in numbers:
        if not -count <= row < count:
            expected = f"a row in [{-count}, {count})"
            raise ArgumentValueError(describe(where, "`rows`", row, expected, fix))
    return [row % count for row in numbers]
