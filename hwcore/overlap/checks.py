"""What callers of a FutureMap pass: checked before anything is written.

What a tensor is costs nothing to look at. What it holds is on the host for CPU tensors alone; on a
device the debug mode looks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hwcore._checks import check_instance, check_tensor, may_read
from hwcore.errors import ArgumentTypeError, ArgumentValueError, describe
from hwcore.overlap.relay import RelayPayload

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor

    from hwcore.overlap.relay import Field

__all__ = [
    "INDEX_DTYPES",
    "check_batch",
    "check_held",
    "check_needs",
    "check_payload",
    "check_range",
    "check_rows_once",
    "check_switch",
    "is_on_host",
]

INDEX_DTYPES = (torch.int64, torch.int32)


def is_on_host(tensor: Tensor) -> bool:
    """Say whether the host can look at a tensor's contents without waiting for a device."""
    return tensor.device.type == "cpu"


def check_batch(where: str, indices: Tensor, limit: int, device: torch.device) -> int:
    """Raise unless ``indices`` are a batch of the map's; return how long it is."""
    # Once a step: the common case passes with as few calls as there can be.
    if (
        not isinstance(indices, torch.Tensor)
        or indices.dim() != 1
        or (indices.dtype is not torch.int64 and indices.dtype is not torch.int32)
        or indices.device != device
    ):
        check_tensor(where, "indices", indices, INDEX_DTYPES, [("bs", None)], device)
    count = indices.numel()
    if count > limit:
        expected = f"at most {limit}, the spec's longest batch"
        fix = "Split the batch, or make the map with a larger max_batch_size"
        raise ArgumentValueError(describe(where, "len(indices)", count, expected, fix))
    return count


def check_range(where: str, indices: Tensor, pool_size: int) -> None:
    """Raise if an index is no row of the pool; where the host can see it."""
    for place, row in enumerate(indices.tolist() if may_read(indices) else ()):
        if not 0 <= row < pool_size:
            expected = f"a row of the pool, in [0, {pool_size})"
            what, fix = f"indices[{place}]", "Pass rows of the request pool"
            raise ArgumentValueError(describe(where, what, row, expected, fix))


def check_rows_once(where: str, indices: Tensor, pool_size: int) -> None:
    """Raise if an index is no row, or a row but the padding occurs twice; likewise."""
    if not is_on_host(indices):
        return
    check_range(where, indices, pool_size)
    rows = [row for row in indices.tolist() if row]
    if len(set(rows)) != len(rows):
        row = next(row for row in rows if rows.count(row) > 1)
        expected, fix = "each row once (the padding row 0 aside)", "Drop the repeats"
        raise ArgumentValueError(describe(where, "indices", row, expected, fix))


def check_held(where: str, name: str, fields: Iterable[str]) -> None:
    """Raise unless the map has a value of that name."""
    if name not in fields:
        expected = f"one of {', '.join(sorted(fields))}, which the spec has"
        fix = "Make the map with a RelaySpec that sizes it"
        raise ArgumentValueError(describe(where, "value", name, expected, fix))


def check_needs(where: str, needs: Sequence[str], fields: Iterable[str]) -> None:
    """Raise unless the map has all values that are named."""
    if isinstance(needs, str):
        expected, fix = "a sequence of names", f"Pass ({needs!r},)"
        raise ArgumentTypeError(describe(where, "needs", needs, expected, fix))
    for name in needs:
        check_held(where, name, fields)


def check_switch(where: str, name: str, value: object) -> None:
    """Raise unless a switch is on, off, or left to others."""
    if value is not None and not isinstance(value, bool):
        fix = "Pass one of them"
        raise ArgumentTypeError(describe(where, name, value, "True, False or None", fix))


def check_payload(
    where: str,
    payload: RelayPayload,
    fields: Mapping[str, Field],
    count: int,
    device: torch.device,
) -> None:
    """Raise unless a payload holds for ``count`` requests what the spec says, and no more."""
    check_instance(where, "payload", payload, RelayPayload, "RelayPayload(next_token=...)")
    for name in RelayPayload.__slots__:
        value = getattr(payload, name)
        if value is None:
            if name in fields:
                expected = "a tensor, for the spec has it"
                fix = "Pass it with each stash, or leave it out of the spec"
                raise ArgumentTypeError(describe(where, name, None, expected, fix))
            continue
        check_held(where, name, fields)
        if isinstance(value, torch.Tensor) and value.layout is not torch.strided:
            fix = f"Convert it with {name}.to_dense()"
            what = f"{name}.layout"
            raise ArgumentTypeError(describe(where, what, value.layout, "torch.strided", fix))
        sizes = [("bs", count), *((name, size) for size in fields[name].shape)]
        check_tensor(where, name, value, (fields[name].dtype,), sizes, device)
