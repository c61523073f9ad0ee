import pytest


@pytest.fixture
def device(hw):
    """Where the tests put their tensors: the device of the backend under test."""
    return hw.device()


@pytest.fixture
def unread(monkeypatch) -> str:
    """A device whose tensors have no values, in production mode: any read on the host raises."""
    monkeypatch.setenv("HWCORE_DEBUG", "0")
    return "meta"
