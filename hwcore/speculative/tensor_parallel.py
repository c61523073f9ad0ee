"""Tensor parallel: all ranks commit what rank 0 has verified.

Each rank computes the same logits but for rounding: where two tokens are close, ranks may choose
differently, in greedy no less than in sampling. From then on their lengths differ, and the next
collective hangs or mixes what does not belong together. So the results of one rank count.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from hwcore._collectives import GroupBroadcast
from hwcore.errors import CaptureError
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
        self._hw = backend
        self._broadcast = GroupBroadcast(
            group, backend.info.device_type, timeout_s, "ResultBroadcast"
        )
        self.is_source = self._broadcast.is_source
        self.host_syncs = 0
        self._staged = self._broadcast.staged
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
