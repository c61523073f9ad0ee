"""Raw access for the conformance kit: what a tensor holds now, with nothing drained to see it."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch

from hwcore.testing.conformance import RawAccess
from hwcore_sim import device

if TYPE_CHECKING:
    from hwcore.types import Stream

__all__ = ["SimRawAccess"]


class SimRawAccess(RawAccess):
    """Looks into the simulated device itself."""

    computes_on_the_host = True

    def stall(self, stream: Stream) -> None:
        """Let nothing in ``stream`` run before somebody waits for it: that is late enough."""
        device.set_drain_policy("lazy", cast("torch.Stream", stream))

    def observable(self, like: torch.Tensor) -> torch.Tensor:
        """Return a tensor of zeros on the device."""
        return torch.zeros_like(like)

    def peek(self, observable: torch.Tensor) -> torch.Tensor:
        """Return the bytes as they are."""
        return device.peek(observable)
