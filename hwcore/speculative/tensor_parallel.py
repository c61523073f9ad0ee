"""Tensor parallel: all ranks commit what rank 0 has verified.

Each rank computes the same logits but for rounding: where two tokens are close, ranks may choose
differently, in greedy no less than in sampling. From then on their lengths differ, and the next
collective hangs or mixes what does not belong together. So the results of one rank count.
"""

from __future__ import annotations

import datetime
import logging
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

from hwcore._checks import is_number
from hwcore.errors import ArgumentTypeError, ArgumentValueError, CaptureError, PeerError, describe
from hwcore.speculative.verify import VerifyResult

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from torch.distributed import ProcessGroup

    from hwcore.backend import Backend

__all__ = ["ResultBroadcast"]

_log = logging.getLogger("hwcore")


class ResultBroadcast:
    """Gives every rank of a group the results of its rank 0: one collective a step.

    Parameters
    ----------
    group : ProcessGroup
        Of the ranks that compute one model together. On the device's own communication library
        (``distributed_backend()``) the collective is ordered in the current stream. Where the group
        knows the device by gloo alone, the results are staged through the host: the host waits
        each step, which is logged once and counted, and cannot be captured.
    backend : Backend
    timeout_s : float
        After which a rank that does not come is given up, where the host waits for it (gloo). A
        device's library has a watchdog of its own, by the group's timeout.

    Attributes
    ----------
    is_source : bool
        This is rank 0: the others need not verify.
    host_syncs : int
        How often the host has waited.
    """

    def __init__(self, group: ProcessGroup, backend: Backend, timeout_s: float = 60.0) -> None:
        where, what, fix = "EagleVerifyWorker", "timeout_s", "Pass seconds, such as 60.0"
        if not is_number(timeout_s):
            raise ArgumentTypeError(describe(where, what, timeout_s, "a number", fix))
        if not 0 < timeout_s < math.inf:
            expected = "a finite number above 0"
            raise ArgumentValueError(describe(where, what, timeout_s, expected, fix))
        self._group, self._hw = group, backend
        self._timeout = datetime.timedelta(seconds=timeout_s)
        self._source = distributed.get_global_rank(group, 0)
        self.is_source = distributed.get_rank(group) == 0
        self.host_syncs = 0
        device_type = backend.info.device_type
        name = _library(group, device_type)
        self._waits = name == "gloo"  # its collectives are the host's
        self._staged = self._waits and device_type != "cpu"
        if self._staged:
            _log.warning(
                "hwcore: backend `%s`: results of tensor-parallel ranks go through the host, which "
                "waits each step; the group's backend is gloo, the device's own is %s",
                backend.info.name,
                backend.distributed_backend(),
            )

    def __call__(
        self, result: VerifyResult | None, bs: int, n: int, width: int, device: torch.device
    ) -> VerifyResult:
        """Return rank 0's result; what is passed elsewhere is not looked at.

        Raises
        ------
        PeerError
            If another rank is gone, or did not come in time.
        CaptureError
            If the results go through the host, within a capture.
        """
        sizes = (bs * n, bs * width, bs, bs, bs)
        if self._staged and self._hw.is_capturing():
            message = (
                "ResultBroadcast: the call came within a capture, but the group's results go "
                "through the host (gloo); expected a call outside. Do not capture it, or make the "
                "group with the device's own backend."
            )
            raise CaptureError(message)
        if self.is_source and result is not None:
            parts = [result.predict, result.accept_index, result.accept_lens]
            parts += [result.bonus_tokens, result.status]
            packed = torch.cat([part.reshape(-1).to(torch.int64) for part in parts])
        else:
            packed = torch.empty(sum(sizes), dtype=torch.int64, device=device)
        if self._staged:
            self.host_syncs += 1
            # Waits for the device; the other way, the copy has read the host's memory when it
            # returns.
            packed = packed.cpu() if self.is_source else torch.empty_like(packed, device="cpu")
        self._broadcast(packed)
        if self.is_source and result is not None:
            return result
        return _unpacked(packed.to(device), sizes, (bs, width))

    def _broadcast(self, packed: Tensor) -> None:
        try:
            work = distributed.broadcast(packed, self._source, self._group, async_op=True)
            # The host waits only where the work is the host's; else the current stream does.
            work.wait(self._timeout) if self._waits else work.wait()
        except (RuntimeError, ValueError) as error:
            role = "sending to" if self.is_source else "waiting for rank 0 of"
            message = (
                f"ResultBroadcast: {role} its group, rank {distributed.get_rank(self._group)} got "
                f"{error!r}; expected every rank to take part in each step, within "
                f"{self._timeout.total_seconds():g} s. Look for the rank that ended first, and "
                f"start all of them again."
            )
            raise PeerError(message) from error


def _unpacked(packed: Tensor, sizes: Sequence[int], form: tuple[int, int]) -> VerifyResult:
    predict, index, lens, bonus, status = packed.split_with_sizes(list(sizes))
    int32: Any = torch.int32
    return VerifyResult(
        predict=predict.to(int32),
        accept_index=index.view(form).to(int32),
        accept_lens=lens.to(int32),
        bonus_tokens=bonus,
        status=status.to(int32),
    )


def _library(group: ProcessGroup, device_type: str) -> str:
    """Return what a group uses for tensors of a device; the host's where it has nothing."""
    config = str(distributed.get_backend_config(group))  # such as "cpu:gloo,mtia:xccl", or "gloo"
    known = dict(part.split(":", 1) for part in config.split(",") if ":" in part)
    return known.get(device_type) or known.get("cpu") or str(distributed.get_backend(group))
