"""Whether this machine can run an Ascend NPU; asked in a process of its own, without torch."""

from __future__ import annotations

import ctypes
import os
import pathlib
import re

from hwcore.types import Availability
from hwcore_npu import torch_build

__all__ = ["LIBRARIES", "availability"]

LIBRARIES = tuple(
    f"lib{name}.so" for name in ("ascendcl", "hccl", "ge_runner", "graph", "acl_op_compiler")
)
"""What torch_npu is linked against, of CANN."""

Problem = tuple[str, str] | None


def availability(root: pathlib.Path = pathlib.Path("/")) -> Availability:
    """Look for driver, device nodes, CANN and torch_npu, in this order."""
    cann, build = _cann(), torch_build.problem()
    found = _device(root) or cann or build
    if found is None:
        return Availability(ok=True)
    reason, fix = found
    if torch_build.loads_by_itself() and (cann or build):
        reason += "; and `import torch` fails here, for it loads torch_npu by itself"
        fix += ", and set TORCH_DEVICE_BACKEND_AUTOLOAD=0 until then"
    return Availability(ok=False, reason=reason, fix=fix)


def _device(root: pathlib.Path) -> Problem:
    manager, nodes = root / "dev/davinci_manager", list((root / "dev").glob("davinci[0-9]*"))
    modules = root / "proc/modules"
    loaded = modules.exists() and "drv_davinci" in modules.read_text()
    if not (loaded or nodes or manager.exists()):
        return (
            "there is no Ascend driver: no /dev/davinci_manager, no drv_davinci in /proc/modules",
            "Install the driver and firmware of the device, and see that `npu-smi info` lists it",
        )
    if not (nodes and manager.exists()):
        lacking = "/dev/davinci_manager" if nodes else "/dev/davinci* device node"
        if any((root / mark).exists() for mark in (".dockerenv", "run/.containerenv")):
            return (
                f"the host has an Ascend driver, but this container has no {lacking}",
                "Start it with --device for /dev/davinci0, davinci_manager, devmm_svm and hisi_hdc",
            )
        return (
            f"there is an Ascend driver, but no {lacking}",
            "See what `npu-smi info` and `dmesg` say of the device, and load the driver again",
        )
    if not (_may_open(manager) and any(map(_may_open, nodes))):
        return (
            "this user may not open /dev/davinci_manager, or any /dev/davinci* device node",
            "Add the user to their group, such as with `usermod -aG HwHiAiUser USER`",
        )
    visible = os.environ.get("ASCEND_RT_VISIBLE_DEVICES", "0")
    first = re.match(r"\d+", visible)
    if first is None or int(first[0]) >= len(nodes):
        return (
            f"ASCEND_RT_VISIBLE_DEVICES={visible} hides every device (there are {len(nodes)})",
            f"Unset it, or name devices from 0 to {len(nodes) - 1}",
        )
    return None


def _may_open(node: pathlib.Path) -> bool:
    return os.access(node, os.R_OK | os.W_OK)


def _cann() -> Problem:
    """Try to load each library, and say of which the loader cannot."""
    absent = []
    for name in LIBRARIES:
        try:
            ctypes.CDLL(name, mode=ctypes.RTLD_LOCAL | os.RTLD_LAZY)
        except OSError as error:
            absent.append(str(error))
    if not absent:
        return None
    return (
        f"CANN's libraries cannot be loaded: {'; '.join(absent)}",
        "Install the CANN toolkit and run `source set_env.sh` of its folder in this shell",
    )
