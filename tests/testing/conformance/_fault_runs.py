"""Run in a process of its own: every fault, one after the other, and the plugin without any.

``python _fault_runs.py [NAME...]`` prints one JSON object a line: name, expected hook, report.
"""

from __future__ import annotations

import json
import pathlib
import sys

import msgspec
from hwcore_sim import device
from hwcore_sim.conformance import SimRawAccess
from hwcore_sim.plugin import SimPlugin

import hwcore
from hwcore.testing.conformance import run

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from faults import FAULTS

TIMEOUT_S = 2.0
HONEST = "none"


def run_with(plugin):
    """Return the report on a plugin, made and run here."""
    with device.denied(*getattr(plugin, "denied", ())):
        return run(lambda: hwcore.Backend(plugin()), raw=SimRawAccess(), timeout_s=TIMEOUT_S)


if __name__ == "__main__":
    for name in sys.argv[1:] or [HONEST, *FAULTS]:
        plugin = SimPlugin if name == HONEST else FAULTS[name]
        found = msgspec.to_builtins(run_with(plugin))
        print(json.dumps({"name": name, "report": found}), flush=True)
