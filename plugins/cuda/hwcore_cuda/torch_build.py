"""Whether the installed torch is one for CUDA; asked without importing it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hwcore.machine import unavailable

if TYPE_CHECKING:
    from hwcore.torch_build import TorchBuild
    from hwcore.types import Availability

__all__ = ["INSTALL", "problem"]

INSTALL = (
    "Run `pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu130`"
)


def problem(build: TorchBuild | None) -> Availability | None:
    """Say what is wrong with a torch for this plugin; None where it is one for CUDA."""
    if build is None:
        return unavailable("torch is not installed", INSTALL)
    cuda, hip = build.toolkit("cuda", "cu"), build.toolkit("hip", "rocm")
    if hip:
        fix = f"{INSTALL}, or, for an AMD GPU, `pip install hwcore-hip`"
        return unavailable(f"the installed torch {build.version} was built for ROCm ({hip})", fix)
    if not cuda:
        reason = f"the installed torch {build.version} was built without CUDA"
        return unavailable(reason, INSTALL)
    return None
