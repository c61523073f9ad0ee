"""The KV entries of an accepted path, moved to where the next forward looks for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hwcore import kernels
from hwcore._checks import check_range, check_tensor, may_read
from hwcore.errors import ArgumentTypeError, ArgumentValueError, describe
from hwcore.kernels.torch_ops import explains_missing

if TYPE_CHECKING:
    from torch import Tensor

    from hwcore.backend import Backend

_WHERE = "move_kv"


def move_kv(kv: Tensor, kv_src: Tensor, kv_dst: Tensor, *, backend: Backend | None = None) -> None:
    """Copy KV entries between the slots of each request, in every layer.

    Called after :func:`commit`, on the stream of the forward. Of the moves that
    ``EagleVerifyWorker`` hands to its ``move_kv`` pass views of ``[bs, spec_steps + 1]``.

    Parameters
    ----------
    kv : Tensor, any dtype, [layers, slots, ...]
        Written in place. Of a cache with a tensor for each layer pass ``layer.unsqueeze(0)``.
    kv_src, kv_dst : Tensor, int64 or int32, [bs, W]
        As in :class:`CommitResult`: slots to copy from and to. A request's entries are all read
        before any is written, and no request touches what another one writes.
    backend : Backend, optional
        By default the process's own.

    Raises
    ------
    ArgumentTypeError
        If an argument's type, dtype, rank or device is wrong.
    ArgumentValueError
        If a shape does not fit, or a slot is not one of the cache (content: CPU arguments always,
        others under ``HWCORE_DEBUG=1``).

    Notes
    -----
    Mutates: ``kv``. Host sync: no (under ``HWCORE_DEBUG=1`` yes). Graph-safe: yes.
    """
    from hwcore.activation import current_backend

    _check(kv, kv_src, kv_dst)
    backend = backend or current_backend()
    with explains_missing(backend):
        kernels.kernel(backend, kernels.move_kv)(kv, kv_src, kv_dst)


def _check(kv: Tensor, kv_src: Tensor, kv_dst: Tensor) -> None:
    if not isinstance(kv, torch.Tensor):
        fix = "Pass the cache's own tensor"
        raise ArgumentTypeError(describe(_WHERE, "kv", kv, "a Tensor", fix))
    if kv.dim() < 3:
        expected, fix = "[layers, slots, ...]", "Pass kv.unsqueeze(0) for a single layer"
        raise ArgumentValueError(describe(_WHERE, "kv.shape", tuple(kv.shape), expected, fix))
    kinds, device = (torch.int64, torch.int32), kv.device
    check_tensor(_WHERE, "kv_src", kv_src, kinds, [("bs", None), ("W", None)], device)
    bs, width = kv_src.shape
    check_tensor(_WHERE, "kv_dst", kv_dst, kinds, [("bs", bs), ("W", width)], device)
    if may_read(kv_src):
        fix = "Pass the moves that commit returned for slots of this cache"
        expected = f"a slot from 0 to {kv.shape[1] - 1}"
        check_range(_WHERE, "kv_src", kv_src, 0, kv.shape[1], expected, fix)
        check_range(_WHERE, "kv_dst", kv_dst, 0, kv.shape[1], expected, fix)
