"""Whether this machine can run ROCm; asked in a process without torch.

Looks at files, and loads the runtime's library where torch does not bring its own. That makes no
context: it takes a call of HIP, and none is made, so a process that has probed can still be forked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hwcore.machine import Machine, unavailable
from hwcore.types import Availability
from hwcore_hip.torch_build import problem

if TYPE_CHECKING:
    import pathlib

__all__ = ["availability"]

LIBRARY = "libamdhip64.so"
VERSIONS = (".7", ".6", "")


def availability(machine: Machine | None = None) -> Availability:
    """Say whether ROCm can run here, and if not, the first thing that is missing."""
    machine = machine or Machine()
    # ROCm's own filter, then HIP's, which has CUDA's name too where its own is not set.
    variables = ["ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"]
    if "HIP_VISIBLE_DEVICES" not in machine.environ:
        variables.append("CUDA_VISIBLE_DEVICES")
    return (
        _device_nodes(machine)
        or machine.hidden_by(tuple(variables))
        or problem(machine.torch())
        or _library(machine)
        or Availability(ok=True)
    )


def _device_nodes(machine: Machine) -> Availability | None:
    """Look for the driver, and for a compute and a GPU's node that may be used."""
    if machine.has("dev/dxg"):  # Windows' driver: one node for every GPU
        return None
    compute, renderers = machine.nodes("kfd"), machine.nodes("dri/renderD*")
    if not (compute and renderers):
        return _without_nodes(machine, "/dev/dri/renderD128" if compute else "/dev/kfd")
    for nodes in (compute, renderers):
        if not any(map(machine.may_use, nodes)):
            return _refused(machine, nodes[0])
    return None


def _without_nodes(machine: Machine, missing: str) -> Availability:
    # Of a host's driver a container sees this as well.
    if not machine.has("sys/module/amdgpu"):
        reason = "no AMD driver is loaded (/sys/module/amdgpu is missing)"
        fix = "Install the driver, so that `rocminfo` lists the GPU"
        return unavailable(reason, f"{fix}; in a virtual machine, pass the GPU through to it")
    if machine.in_container:
        reason = f"the host has an AMD driver, but this container has no {missing}"
        fix = "Start it with `docker run --device /dev/kfd --device /dev/dri`"
        return unavailable(reason, fix)
    reason = f"the AMD driver is loaded, but there is no device node {missing}"
    return unavailable(reason, "Install a driver with ROCm support (amdgpu-dkms), and restart")


def _refused(machine: Machine, node: pathlib.Path) -> Availability:
    reason = f"this user may not read and write {machine.shown(node)}"
    fix = "Run `sudo usermod -aG render,video $USER` and log in again"
    return unavailable(reason, f"{fix}; for a container, `docker run --group-add render`")


def _library(machine: Machine) -> Availability | None:
    """Look for the runtime's library beside torch, else load the system's."""
    build = machine.torch()
    if build is not None:
        beside = (build.folder / "lib", build.folder.parent / "_rocm_sdk_core/lib")
        if any(list(folder.glob(f"{LIBRARY}*")) for folder in beside):
            return None
    for version in VERSIONS:
        try:
            machine.load(LIBRARY + version)
        except OSError as error:
            said = str(error)
        else:
            return None
    reason = f"ROCm's library {LIBRARY} is not part of torch and cannot be loaded ({said})"
    fix = "Install ROCm, or add its folder, such as /opt/rocm/lib, to LD_LIBRARY_PATH"
    return unavailable(reason, fix)
