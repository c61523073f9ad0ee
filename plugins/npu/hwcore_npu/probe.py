"""Whether this machine can run an Ascend NPU; asked in a process of its own, without torch."""

from __future__ import annotations

import re

from hwcore.machine import Machine, unavailable
from hwcore.types import Availability
from hwcore_npu.torch_build import loads_by_itself, problem

__all__ = ["LIBRARIES", "availability"]

LIBRARIES = tuple(
    f"lib{name}.so" for name in ("ascendcl", "hccl", "ge_runner", "graph", "acl_op_compiler")
)
"""What torch_npu is linked against, of CANN."""

VISIBLE = "ASCEND_RT_VISIBLE_DEVICES"


def availability(machine: Machine | None = None) -> Availability:
    """Look for driver, device nodes, CANN and torch_npu, in this order."""
    machine = machine or Machine()
    software = _cann(machine) or problem(machine.torch())
    found = _device(machine) or software
    if found is None:
        return Availability(ok=True)
    if software and loads_by_itself():
        reason = "`import torch` fails here, for it loads torch_npu by itself"
        fix = "set TORCH_DEVICE_BACKEND_AUTOLOAD=0 until then"
        return unavailable(f"{found.reason}; and {reason}", f"{found.fix}, and {fix}")
    return found


def _device(machine: Machine) -> Availability | None:
    managers, nodes = machine.nodes("davinci_manager"), machine.nodes("davinci[0-9]*")
    if not (managers and nodes):
        lacking = "/dev/davinci_manager" if nodes else "/dev/davinci* device node"
        return _without_nodes(machine, lacking, driver=bool(managers or nodes))
    if not (machine.may_use(managers[0]) and any(map(machine.may_use, nodes))):
        reason = "this user may not open /dev/davinci_manager, or any /dev/davinci* device node"
        fix = "Add the user to their group, such as with `usermod -aG HwHiAiUser USER`"
        return unavailable(reason, fix)
    visible = machine.environ.get(VISIBLE, "0")
    first = re.match(r"\d+", visible)
    if first is None or int(first[0]) >= len(nodes):
        reason = f"{VISIBLE}={visible} hides every device (there are {len(nodes)})"
        return unavailable(reason, f"Unset it, or name devices from 0 to {len(nodes) - 1}")
    return None


def _without_nodes(machine: Machine, lacking: str, driver: bool) -> Availability:
    if not (driver or "drv_davinci" in machine.text("proc/modules")):
        reason = "there is no Ascend driver: no /dev/davinci_manager, no drv_davinci in"
        fix = "Install the driver and firmware of the device, and see that `npu-smi info` lists it"
        return unavailable(f"{reason} /proc/modules", fix)
    if machine.in_container:
        fix = "Start it with --device for /dev/davinci0, davinci_manager, devmm_svm and hisi_hdc"
        reason = f"the host has an Ascend driver, but this container has no {lacking}"
        return unavailable(reason, fix)
    fix = "See what `npu-smi info` and `dmesg` say of the device, and load the driver again"
    return unavailable(f"there is an Ascend driver, but no {lacking}", fix)


def _cann(machine: Machine) -> Availability | None:
    """Try to load each library, and say of which the loader cannot."""
    absent = []
    for name in LIBRARIES:
        try:
            machine.load(name)
        except OSError as error:
            absent.append(str(error))
    if not absent:
        return None
    fix = "Install the CANN toolkit and run `source set_env.sh` of its folder in this shell"
    return unavailable(f"CANN's libraries cannot be loaded: {'; '.join(absent)}", fix)
