"""These tests are about one backend; run them with ``pytest --backend sim``."""

from __future__ import annotations

import pytest

import hwcore


@pytest.fixture(scope="session")
def hw():
    """The simulated accelerator, selected for the whole process."""
    return hwcore.use("sim")
