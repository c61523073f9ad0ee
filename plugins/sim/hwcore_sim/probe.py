"""Whether this machine can run the simulated accelerator; asked in a process without torch."""

from __future__ import annotations

import os
import shlex
import shutil

from hwcore.types import Availability

__all__ = ["availability"]


def availability() -> Availability:
    """Look for the C++ compiler that torch would call (``CXX``, else ``c++``)."""
    command = os.environ.get("CXX") or "c++"
    if shutil.which(shlex.split(command)[0]) is None:
        return Availability(
            ok=False,
            reason=f"there is no C++ compiler `{command}` to build the simulated device with",
            fix="Install one, such as g++, or set CXX to its path",
        )
    return Availability(ok=True)
