"""Broadcasts within a group of ranks, on the device's own library or through the host."""

from __future__ import annotations

import datetime
import math
from typing import TYPE_CHECKING

from torch import distributed

from hwcore._checks import is_number
from hwcore.errors import ArgumentTypeError, ArgumentValueError, PeerError, describe

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup

__all__ = ["GroupBroadcast"]


class GroupBroadcast:
    """Sends tensors of a group's rank 0 to all others.

    Parameters
    ----------
    group : ProcessGroup
    device_type : str
        Of the tensors that are broadcast, where the group can.
    timeout_s : float
        After which a rank that does not come is given up, where the host waits for it (gloo). A
        device's library has a watchdog of its own, by the group's timeout.
    where : str
        Who speaks in errors.

    Attributes
    ----------
    is_source : bool
        This is rank 0.
    waits : bool
        The host waits for each broadcast: they are gloo's.
    staged : bool
        The tensors must be in the host's memory, for the group knows the device by gloo alone.
    """

    def __init__(self, group: ProcessGroup, device_type: str, timeout_s: float, where: str) -> None:
        what, fix = "timeout_s", "Pass seconds, such as 60.0"
        if not is_number(timeout_s):
            raise ArgumentTypeError(describe(where, what, timeout_s, "a number", fix))
        if not 0 < timeout_s < math.inf:
            expected = "a finite number above 0"
            raise ArgumentValueError(describe(where, what, timeout_s, expected, fix))
        self._group, self._where = group, where
        self._timeout = datetime.timedelta(seconds=timeout_s)
        self._source = distributed.get_global_rank(group, 0)
        self.rank = distributed.get_rank(group)
        self.is_source = self.rank == 0
        self.waits = _library(group, device_type) == "gloo"
        self.staged = self.waits and device_type != "cpu"

    def __call__(self, tensor: Tensor) -> None:
        """Fill ``tensor`` with rank 0's.

        Raises
        ------
        PeerError
            If another rank is gone, or did not come in time.
        """
        try:
            work = distributed.broadcast(tensor, self._source, self._group, async_op=True)
            # The host waits only where the work is the host's; else the current stream does.
            work.wait(self._timeout) if self.waits else work.wait()
        except (RuntimeError, ValueError) as error:
            role = "sending to" if self.is_source else "waiting for rank 0 of"
            message = (
                f"{self._where}: {role} its group, rank {self.rank} got {error!r}; expected every "
                f"rank to take part in each step, within {self._timeout.total_seconds():g} s. "
                f"Look for the rank that ended first, and start all of them again."
            )
            raise PeerError(message) from error


def _library(group: ProcessGroup, device_type: str) -> str:
    """Return what a group uses for tensors of a device; the host's where it has nothing."""
    config = str(distributed.get_backend_config(group))  # such as "cpu:gloo,mtia:xccl", or "gloo"
    known = dict(part.split(":", 1) for part in config.split(",") if ":" in part)
    return known.get(device_type) or known.get("cpu") or str(distributed.get_backend(group))
