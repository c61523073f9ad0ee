"""Whether the installed torch is one for ROCm; asked without importing it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hwcore.machine import unavailable

if TYPE_CHECKING:
    from hwcore.torch_build import TorchBuild
    from hwcore.types import Availability

__all__ = ["INSTALL", "problem"]

INSTALL = (
    "Run `pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/rocm7.0`"
)


def problem(build: TorchBuild | None) -> Availability | None:
    """Say what is wrong with a torch for this plugin; None where it is one for ROCm."""
    if build is None:
        return unavailable("torch is not installed", INSTALL)
    cuda, hip = build.toolkit("cuda", "cu"), build.toolkit("hip", "rocm")
    if hip:
        return None
    if cuda:
        fix = f"{INSTALL}, or, for an NVIDIA GPU, `pip install hwcore-cuda`"
        return unavailable(f"the installed torch {build.version} was built for CUDA ({cuda})", fix)
    reason = f"the installed torch {build.version} was built without ROCm"
    return unavailable(reason, INSTALL)
