"""Whether torch and torch_npu fit each other, by what their files say: nothing is imported."""

from __future__ import annotations

import os
import re
from importlib import metadata

__all__ = ["loads_by_itself", "problem"]


def problem() -> tuple[str, str] | None:
    """Return what is wrong with the installed pair and the fix, or None."""
    torch = metadata.version("torch")
    release = torch.partition("+")[0]
    own = _torch_npu()
    if own is None:
        return (
            f"torch_npu is not installed, and torch {torch} needs it for this device",
            f"Run `pip install torch_npu=={release}`",
        )
    if own.split(".")[:3] != release.split(".")[:3]:
        return (
            f"torch_npu {own} is for another torch than {torch}",
            f"Run `pip install torch_npu=={release}`",
        )
    if other := _accelerator():
        return (
            f"torch {torch} is a build for {other}, and torch takes one accelerator a process",
            f"Run `pip install torch=={release} --index-url https://download.pytorch.org/whl/cpu`",
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


def _accelerator() -> str | None:
    """Return what else torch was built for, such as ``cuda``, as ``torch/version.py`` says."""
    text = metadata.distribution("torch").read_text("../torch/version.py") or ""
    found = re.search(r"^(cuda|hip|xpu)\b[^=\n]*= *['\"]", text, re.MULTILINE)
    return found[1] if found else None
