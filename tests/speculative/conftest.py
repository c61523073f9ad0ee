import pytest


@pytest.fixture
def device() -> str:
    """Where the tests put their tensors; it is to follow the backend under test."""
    return "cpu"


@pytest.fixture
def unread(monkeypatch) -> str:
    """A device whose tensors have no values, in production mode: any read on the host raises."""
    monkeypatch.setenv("HWCORE_DEBUG", "0")
    return "meta"
