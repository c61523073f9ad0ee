import pytest


@pytest.fixture(autouse=True, scope="module")
def _once(once):
    """These tests start processes of their own for the backends they need."""
