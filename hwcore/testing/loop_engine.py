"""A transfer engine within one process, over page-locked memory of any backend.

Copies between it and the device run when the device comes to them, also where the device cannot
page-lock the pools of real engines: what waits too little is seen.
"""

from __future__ import annotations

import ctypes
import secrets
from types import MappingProxyType
from typing import TYPE_CHECKING, Self

import torch

from hwcore.errors import PeerError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hwcore.backend import Backend

__all__ = ["LoopEngine", "LoopPeer"]

_engines: dict[str, LoopEngine] = {}


class LoopEngine:
    """A pool; see :class:`hwcore.diffusion.engines.Engine`.

    Parameters
    ----------
    backend : Backend
    size_bytes : int
    is_mapped : bool
        Whether peers see the pool itself, or send to it.
    """

    name = "loop"

    def __init__(self, backend: Backend, size_bytes: int, *, is_mapped: bool = True) -> None:
        self.id = secrets.token_hex(8)
        self.address = f"loop:{self.id}"
        self.size_bytes, self.is_mapped = size_bytes, is_mapped
        self.memory = backend.pin_memory(torch.zeros(size_bytes, dtype=torch.uint8))
        self.dropped: Mapping[str, int] = MappingProxyType({})
        _engines[self.address] = self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object = None, error: object = None, traceback: object = None) -> None:
        self.close()

    def connect(self, address: str, timeout_s: float) -> LoopPeer:
        """Return the pool of the engine at ``address``, in this process."""
        if address not in _engines:
            message = (
                f"connect: `address` got {address!r}; expected one of {len(_engines)} loop engines "
                f"of this process. Pass the other engine's .address."
            )
            raise PeerError(message)
        return LoopPeer(_engines[address])

    def writers(self) -> Mapping[str, bool]:
        """Return nobody: who writes has written when the call returns."""
        return {}

    def refuse(self, engine_id: str) -> bool:
        """Say that nothing of that engine lands later."""
        return False

    def close(self) -> None:
        """Be found no more."""
        _engines.pop(self.address, None)


class LoopPeer:
    """A pool of this process; see :class:`hwcore.diffusion.engines.Peer`."""

    alive = True

    def __init__(self, engine: LoopEngine) -> None:
        self.id, self.size_bytes = engine.id, engine.size_bytes
        self.memory = engine.memory if engine.is_mapped else None
        self._target = engine.memory

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object = None, error: object = None, traceback: object = None) -> None:
        self.close()

    def fileno(self) -> int:
        """Return -1: it does not go by itself."""
        return -1

    def write(self, source: torch.Tensor, offset: int, timeout_s: float) -> None:
        """Copy as somebody does who knows no stream: at once."""
        ctypes.memmove(self._target.data_ptr() + offset, source.data_ptr(), source.numel())

    def close(self) -> None:
        """Let go of nothing."""
