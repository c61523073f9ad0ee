"""What a transfer manager tells of itself."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hwcore.diffusion.table import PoolStats

__all__ = ["TransferStats"]


@dataclasses.dataclass(frozen=True)
class TransferStats:
    """What a manager has, and has done.

    Attributes
    ----------
    pool : PoolStats
    staged, running : int
        Trees that are staged; calls that stage or push now.
    granted, consumed : int
        Receive slots that no job has, and that one has.
    quarantined_writers : int
        Writers that were taken for dead and may still write to slots that were freed.
    peers : int
        Connections that are open.
    pushed_bytes : int
        That landed, padding included.
    """

    pool: PoolStats
    staged: int
    running: int
    granted: int
    consumed: int
    quarantined_writers: int
    peers: int
    pushed_bytes: int
