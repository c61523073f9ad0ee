"""Run in a process of its own: the sound plugins and every faulty one, one after the other.

``python _fault_runs.py [NAME...]`` prints one JSON object a line: name and report.
"""

from __future__ import annotations

import gc
import json
import pathlib
import sys

import msgspec

import hwcore
from hwcore.testing.conformance import run
from hwcore_sim import device
from hwcore_sim.device.raw import SimRawAccess

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from faults import FAULTS, SOUND

TIMEOUT_S = 5.0
FIRST_TIMEOUT_S = 60.0  # the first operators of a process import parts of torch, which takes long


def run_with(plugin, timeout_s):
    """Return the report on a plugin, made and run here."""
    # What takes longest of the kit can find a fault of kernels alone.
    kernels = plugin in SOUND.values() or plugin.expected == "kernels"
    with device.denied(*getattr(plugin, "denied", ())):
        return run(
            lambda: hwcore.Backend(plugin()),
            raw=SimRawAccess(),
            timeout_s=timeout_s,
            keyword="" if kernels else "not sampling",
        )


if __name__ == "__main__":
    limit_s = FIRST_TIMEOUT_S
    gc.freeze()  # a third of the time would go into looking through torch's modules
    for name, plugin in {**SOUND, **FAULTS}.items():
        if not sys.argv[1:] or name in sys.argv[1:]:
            found = msgspec.to_builtins(run_with(plugin, limit_s))
            print(json.dumps({"name": name, "report": found}), flush=True)
            limit_s = TIMEOUT_S
