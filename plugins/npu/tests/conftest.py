"""These tests are about one backend; run them with ``pytest --backend npu``."""

from __future__ import annotations

import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import npu_on_sim


@pytest.fixture(scope="session")
def hw():
    """The plugin on the simulated device: nothing here has run on an NPU."""
    return npu_on_sim.backend()
