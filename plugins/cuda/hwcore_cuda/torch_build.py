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
    cuda, hip = _built_for(build)
    if hip:
        fix = f"{INSTALL}, or, for an AMD GPU, `pip install hwcore-hip`"
        return unavailable(f"the installed torch {build.version} was built for ROCm ({hip})", fix)
    if not cuda:
        reason = f"the installed torch {build.version} was built without CUDA"
        return unavailable(reason, INSTALL)
    return None


def _built_for(build: TorchBuild) -> tuple[str, str]:
    """Return the versions of CUDA and of HIP, empty where there is none.

    ``torch/version.py`` says it of every build; the version's local part, of some.
    """
    if build.toolkits is not None:
        return build.toolkits.get("cuda", ""), build.toolkits.get("hip", "")
    local = build.local
    return local if local.startswith("cu") else "", local if local.startswith("rocm") else ""
