"""Whether this machine can run the simulated accelerator; asked in a process without torch."""

from __future__ import annotations

import os
import pathlib
import shlex
import shutil
from importlib.metadata import version

from hwcore.types import Availability

__all__ = ["availability"]


def availability() -> Availability:
    """Look for a built device, or for the C++ compiler that torch would build it with."""
    command = os.environ.get("CXX") or "c++"
    cache = pathlib.Path(os.environ.get("HWCORE_SIM_CACHE") or "~/.cache/hwcore/sim").expanduser()
    if any(cache.glob(f"{version('torch')}-*")) or shutil.which(shlex.split(command)[0]):
        return Availability(ok=True)
    return Availability(
        ok=False,
        reason=f"there is no C++ compiler `{command}` to build the simulated device with",
        fix="Install one, such as g++, or set CXX to its path",
    )
