"""Host tensors that a queued copy still reads."""

from __future__ import annotations

import collections
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from hwcore.backend import Backend
    from hwcore.types import Event, Stream

__all__ = ["HostInputs"]


class HostInputs:
    """Keeps host tensors until their copies have run, where their allocator would not wait.

    That is where ``host_memory_policy()`` does not say ``reuse_waits_for_copy``; elsewhere nothing
    is kept. The host does not wait: what is done is let go of when the next is kept.
    """

    def __init__(self, backend: Backend, device: torch.device) -> None:
        self._hw = backend
        self._device = device
        self._needed = not backend.host_memory_policy().reuse_waits_for_copy
        self._kept: collections.deque[tuple[Event, list[torch.Tensor]]] = collections.deque()

    def __len__(self) -> int:
        return sum(len(tensors) for _, tensors in self._kept)

    def keep(self, tensors: list[torch.Tensor], stream: Stream) -> None:
        """Keep what the copies now in ``stream`` read."""
        if not self._needed:
            return
        while self._kept and self._hw.query_event(self._kept[0][0]):
            self._kept.popleft()
        event = self._hw.create_event(self._device)
        self._hw.record_event(event, stream)
        self._kept.append((event, tensors))

    def clear(self) -> None:
        """Let go of everything: the host has waited for the device."""
        self._kept.clear()
