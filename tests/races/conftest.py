import pytest

from ._race import Race


@pytest.fixture
def race(hw, request):
    """The program of the test's module on the backend under test."""
    return Race(hw, request.module.program)


@pytest.fixture
def expected(request):
    """What the test's module says about its race."""
    return request.module
