"""An engine within one process, whose pools are page-locked on any backend: copies run late there.

The real ones' memory is made known to the device by a hook that a simulated device has not.
"""

import ctypes
import itertools

import torch

_engines = {}
_numbers = itertools.count()


class LoopEngine:
    """A pool; ``is_mapped`` says whether peers see it, as with `shm`, or send to it."""

    name = "loop"

    def __init__(self, hw, size_bytes, is_mapped):
        self.id = f"{next(_numbers):016x}"
        self.address = f"loop:{self.id}"
        self.size_bytes, self.is_mapped = size_bytes, is_mapped
        self.memory = hw.pin_memory(torch.zeros(size_bytes, dtype=torch.uint8))
        _engines[self.address] = self

    def connect(self, address, timeout_s):
        return LoopPeer(_engines[address])

    def writers(self):
        return {}

    def refuse(self, engine_id):
        return False

    def close(self):
        _engines.pop(self.address, None)


class LoopPeer:
    alive = True

    def __init__(self, engine):
        self.id, self.size_bytes = engine.id, engine.size_bytes
        self.memory = engine.memory if engine.is_mapped else None
        self._target = engine.memory

    def write(self, source, offset, timeout_s):
        """Copy as somebody who knows no stream: at once."""
        if source.numel():
            ctypes.memmove(self._target.data_ptr() + offset, source.data_ptr(), source.numel())

    def close(self):
        pass
