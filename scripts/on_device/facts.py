"""Where a run took place: ``python -m scripts.on_device.facts BACKEND`` prints it as JSON.

In a process of its own, which exits 1 with the reason where the backend cannot run here: what runs
the steps starts no device.
"""

from __future__ import annotations

import datetime
import json
import os
import pathlib
import platform
import subprocess
import sys
from importlib import metadata
from typing import Any

__all__ = ["NAMES", "commit", "of"]

NAMES = (
    "backend",
    "device",
    "device memory",
    "CPU",
    "OS",
    "driver",
    "Python",
    "torch",
    "Triton",
    "hwcore",
    "plugin",
    "commit",
    "date",
)
"""What a page's header says, in its order."""

ROOT = pathlib.Path(__file__).parents[2]
_DRIVERS = ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version")


def of(name: str) -> dict[str, str]:
    """Return the facts about this machine and its backend of a name; selects it."""
    import torch

    import hwcore

    hw = hwcore.use(name)
    memory = hw.memory_info().total_bytes
    simulated = "" if hw.info.automatic else " (simulated: says nothing of any device)"
    built = [f"{k} {v}" for k, v in vars(torch.version).items() if k in ("cuda", "hip") and v]
    return {
        "backend": f"`{name}`{simulated}",
        "device": f"{_device(hw, torch)}; {hw.device_count()} in all",
        "device memory": f"{memory / 2**30:.1f} GiB",
        "CPU": f"{_cpu()}, {os.cpu_count()} cores",
        "OS": f"{_system()}, {platform.release()}, {platform.machine()}",
        "driver": _driver(),
        "Python": platform.python_version(),
        "torch": f"{torch.__version__}{f' ({built[0]})' if built else ''}",
        "Triton": _version("triton"),
        "hwcore": _version("hwcore"),
        "plugin": f"{hw.origin.distribution} {hw.origin.version}",
    }


def _device(hw: Any, torch: Any) -> str:
    module = torch.get_device_module(hw.device()) if hw.info.device_type != "cpu" else None
    naming = getattr(module, "get_device_name", None)
    return str(naming(0)) if naming is not None else f"{hw.info.vendor} {hw.info.device_type}"


def _cpu() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or "unknown")


def _system() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return platform.system()


def _driver() -> str:
    found = (pathlib.Path(file) for file in _DRIVERS)
    return next((f.read_text().splitlines()[0] for f in found if f.is_file()), "not told")


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def commit() -> str:
    """Return the commit of this checkout, and whether files differ from it, results apart.

    Empty where there is no repository.
    """
    try:
        head = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--", ".", ":!docs/results")
    except (OSError, subprocess.CalledProcessError):
        return ""
    return f"{head}{', with changes that are not in it' if changed else ''}"


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.strip()


def today() -> str:
    """Return the date, in UTC."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")


if __name__ == "__main__":
    from hwcore.errors import HwcoreError

    try:
        print(json.dumps(of(sys.argv[1])))
    except HwcoreError as error:
        sys.exit(str(error))
