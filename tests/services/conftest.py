"""Sockets and processes that choose their backends: `make services` runs these, and once."""

import pytest

from tests.diffusion.serving._served import serve

__all__ = ["serve"]


@pytest.fixture(autouse=True, scope="session")
def _once(once):
    """No test here has a device of its own."""
