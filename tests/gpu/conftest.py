"""Both GPU plugins; what they have in common is tested on both."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import pytest
import torch

from hwcore_cuda import probe as cuda_probe
from hwcore_cuda.plugin import CudaPlugin
from hwcore_hip import probe as hip_probe
from hwcore_hip.plugin import HipPlugin

from ._torch_cuda import FakeCuda

ROOT = pathlib.Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A plugin, its probe, the torch it is for, and what it says of itself."""

    name: str
    plugin: Any
    probe: Any
    toolkit: str
    readme: str


GPUS = {
    name: Gpu(name, plugin, probe, toolkit, (ROOT / f"plugins/{name}/README.md").read_text())
    for name, plugin, probe, toolkit in (
        ("cuda", CudaPlugin, cuda_probe, "cuda"),
        ("hip", HipPlugin, hip_probe, "hip"),
    )
}


def pytest_ignore_collect(collection_path, config):
    """A run for sim holds what needs the simulated device, a run for any other the rest."""
    on_sim = collection_path.name == "test_on_sim.py"
    return on_sim != (config.getoption("backend") == "sim") or None


@pytest.fixture(params=GPUS)
def gpu(request):
    return GPUS[request.param]


@pytest.fixture
def fake(gpu, monkeypatch):
    """A stand-in for the module ``torch.cuda``, of a torch that was built for the plugin."""
    return pretend(gpu, monkeypatch, FakeCuda())


@pytest.fixture
def plugin(gpu, fake):
    """The plugin, set up on the stand-in."""
    made = gpu.plugin()
    made.setup()
    fake.calls.clear()
    return made


def pretend(gpu, monkeypatch, fake):
    """Let torch have been built for the plugin, and have another module of the device."""
    monkeypatch.setattr(torch.version, gpu.toolkit, "1.0")
    monkeypatch.setattr(torch, "get_device_module", lambda device: fake)
    return fake
