"""Whether this machine can run CUDA; asked in a process without torch.

Looks at files and loads the driver's library, which makes no context: that takes ``cuInit``, which
is never called, so a process that has probed can still be forked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hwcore.machine import Machine, unavailable
from hwcore.types import Availability
from hwcore_cuda.torch_build import problem

if TYPE_CHECKING:
    import pathlib

__all__ = ["availability"]

LIBRARY = "libcuda.so.1"


def availability(machine: Machine | None = None) -> Availability:
    """Say whether CUDA can run here, and if not, the first thing that is missing."""
    machine = machine or Machine()
    return (
        _device_nodes(machine)
        or machine.hidden_by(("CUDA_VISIBLE_DEVICES",))
        or _library(machine)
        or problem(machine.torch())
        or Availability(ok=True)
    )


def _device_nodes(machine: Machine) -> Availability | None:
    """Look for the driver, and for device nodes that may be used."""
    # Windows' driver has one node for every GPU, that of NVIDIA's own boards other names.
    if machine.has("dev/dxg") or machine.has("dev/nvmap"):
        return None
    nodes = machine.nodes("nvidia[0-9]*")
    if not nodes:
        return _without_nodes(machine)
    if not any(map(machine.may_use, nodes)):
        return _refused(machine, nodes[0])
    control = machine.root / "dev/nvidiactl"
    if control.exists() and not machine.may_use(control):
        return _refused(machine, control)
    return None


def _without_nodes(machine: Machine) -> Availability:
    # Of a host's driver a container sees this as well.
    if not (machine.has("proc/driver/nvidia/version") or machine.has("sys/module/nvidia")):
        reason = "no NVIDIA driver is loaded (/proc/driver/nvidia is missing)"
        fix = "Install the driver, so that `nvidia-smi` lists the GPU"
        return unavailable(reason, f"{fix}; in a virtual machine, pass the GPU through to it")
    if machine.in_container:
        reason = "the host has an NVIDIA driver, but this container has no /dev/nvidia0"
        return unavailable(reason, "Start it with the GPUs, such as `docker run --gpus all`")
    reason = "the NVIDIA driver is loaded, but there is no device node /dev/nvidia0"
    return unavailable(reason, "Run `sudo nvidia-modprobe -u -c=0`, which makes it")


def _refused(machine: Machine, node: pathlib.Path) -> Availability:
    reason = f"this user may not read and write {machine.shown(node)}"
    return unavailable(reason, "Add the user to the group that owns it (`ls -l /dev/nvidia*`)")


def _library(machine: Machine) -> Availability | None:
    """Load the driver's own library, which torch does not bring along."""
    try:
        machine.load(LIBRARY)
    except OSError as error:
        fix = "Install it in the driver's version (Debian, Ubuntu: libnvidia-compute-<version>)"
        if machine.in_container:
            fix = "Start the container with NVIDIA_DRIVER_CAPABILITIES=compute,utility"
        reason = f"the driver's library {LIBRARY} cannot be loaded ({error})"
        return unavailable(reason, f"{fix}, or add its folder to LD_LIBRARY_PATH")
    return None
