"""Engines of one launch, here and in another process."""

from __future__ import annotations

import contextlib

import pytest
import torch

from hwcore.diffusion.engines import Token, open_engine
from hwcore.types import TransferEngineSpec

from ._remote import Remote


@pytest.fixture(autouse=True)
def _of_the_host_alone(once):
    """A pool is memory of the host: no test here has a device."""


@pytest.fixture
def token():
    return Token.create()


@pytest.fixture(params=["shm", "tcp"])
def kind(request):
    return request.param


@pytest.fixture
def opened(token):
    """Open an engine of a kind; all are closed after the test."""
    with contextlib.ExitStack() as stack:

        def open_one(kind, size_bytes=1 << 20, token=token, **options):
            specs = [TransferEngineSpec(kind, "any")]
            return stack.enter_context(open_engine(specs, size_bytes, token, **options))

        yield open_one


@pytest.fixture
def remote(token):
    """Start another process with an engine of a kind."""
    with contextlib.ExitStack() as stack:

        def start(kind, size_bytes=1 << 20):
            other = Remote(kind, token, size_bytes)
            stack.callback(other.close)
            return other

        yield start


@pytest.fixture
def data():
    """Random bytes, [100_003]."""
    return torch.randint(
        0, 256, (100_003,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
