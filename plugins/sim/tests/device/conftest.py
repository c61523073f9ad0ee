"""The simulated device by itself: torch and the control API, no hook of hwcore between."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import textwrap

import pytest
import torch

from hwcore_sim import device


@pytest.fixture(scope="session")
def _started(hw):
    """The device, registered by the plugin's setup like everywhere else."""
    return device.start()


@pytest.fixture
def sim(_started):
    """The control API; lazy, nothing queued, nothing denied before and after each test."""
    _calm()
    yield device
    _calm()


@pytest.fixture(params=["lazy", "eager"])
def policy(sim, request):
    """Run the test once with each drain policy set."""
    sim.set_drain_policy(request.param)
    return request.param


def _calm():
    device.set_drain_policy("lazy")
    device.allow()
    device.set_pinned_reuse("safe")
    for index in range(torch.accelerator.device_count()):
        device.set_memory_capacity(4 << 30, index)
        device.reset(index)
    torch.accelerator.set_device_index(0)


@dataclasses.dataclass(frozen=True)
class Finished:
    """A process that ended: its status, what it printed, and the last line of its error."""

    status: int
    output: str
    errors: str

    @property
    def error(self):
        return self.errors.strip().splitlines()[-1] if self.errors.strip() else ""


@pytest.fixture
def python(_started):
    """Run code in a process of its own, in which the device is not started yet."""

    def run(code, timeout_s=120, **variables):
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("HWCORE_")}
        for kept in ("HWCORE_SIM_CACHE",):
            if kept in os.environ:
                inherited[kept] = os.environ[kept]
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            env={**inherited, **variables},
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout_s,
        )
        return Finished(done.returncode, done.stdout.strip(), done.stderr)

    return run
