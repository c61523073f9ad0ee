"""Host memory page-locked for HIP: what torch did not allocate, such as a shared mapping."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from hwcore.errors import CapabilityError
from hwcore.host_memory import Registration

__all__ = ["HostMemory"]

_PORTABLE = 1  # hipHostRegisterPortable: page-locked for every device


class HostMemory:
    """Registers buffers with the driver, through torch.

    Parameters
    ----------
    module : module
        ``torch.cuda``, which is HIP in a ROCm build.
    """

    def __init__(self, module: Any) -> None:
        self._module = module

    def register(self, buffer: memoryview) -> Registration:
        """Page-lock a buffer until the registration is closed.

        Raises
        ------
        ArgumentTypeError, ArgumentValueError
            If the buffer is not writable and contiguous.
        CapabilityError
            If the driver refuses.
        """
        return Registration(buffer, self._lock, self._unlock)

    def _lock(self, address: int, size_bytes: int) -> None:
        # A ROCm build has HIP's functions under the names that CUDA's have.
        code = self._module.cudart().cudaHostRegister(address, size_bytes, _PORTABLE)
        try:
            self._module.check_error(code)
        except RuntimeError as error:
            self._forget_error()
            message = (
                f"hwcore-hip: register_host_memory got `{error}` for {size_bytes} bytes; expected "
                f"memory that the driver can page-lock. Close an earlier registration of the same "
                f"memory, or register less: all of it must fit into the machine's memory."
            )
            raise CapabilityError(message) from error

    def _unlock(self, address: int) -> None:
        self._module.check_error(self._module.cudart().cudaHostUnregister(address))

    def _forget_error(self) -> None:
        """Take the failed call's code out of HIP, or torch finds it behind its next kernel."""
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device="cuda")
