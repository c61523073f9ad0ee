"""Whether torch and torch_npu fit each other, by what their files say: nothing is imported."""

from __future__ import annotations

import os
from importlib import metadata
from typing import TYPE_CHECKING

from hwcore.machine import unavailable

if TYPE_CHECKING:
    from hwcore.torch_build import TorchBuild
    from hwcore.types import Availability

__all__ = ["loads_by_itself", "problem"]

OTHERS = {"cuda": "cu", "hip": "rocm", "xpu": "xpu"}
"""Accelerators that torch may have been built for; how such a build's local version begins."""


def problem(build: TorchBuild | None) -> Availability | None:
    """Say what is wrong with the installed pair; None where it fits."""
    if build is None:
        fix = "Run `pip install torch --index-url https://download.pytorch.org/whl/cpu`"
        return unavailable("torch is not installed", fix)
    own, version = _torch_npu(), build.release
    if own is None:
        reason = f"torch_npu is not installed, and torch {build.version} needs it for this device"
        return unavailable(reason, f"Run `pip install torch_npu=={version}`")
    if own.split(".")[:3] != version.split(".")[:3]:
        reason = f"torch_npu {own} is for another torch than {build.version}"
        return unavailable(reason, f"Run `pip install torch_npu=={version}`")
    for name, label in OTHERS.items():
        if build.toolkit(name, label):
            reason = f"torch {build.version} is a build for {name}"
            fix = f"pip install torch=={version} --index-url https://download.pytorch.org/whl/cpu"
            return unavailable(
                f"{reason}, and torch takes one accelerator a process", f"Run `{fix}`"
            )
    return None


def loads_by_itself() -> bool:
    """Say whether ``import torch`` loads torch_npu, and so fails where torch_npu cannot load."""
    return _torch_npu() is not None and os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD") != "0"


def _torch_npu() -> str | None:
    try:
        return metadata.version("torch_npu")
    except metadata.PackageNotFoundError:
        return None
