import pytest


@pytest.fixture(autouse=True, scope="module")
def _in_the_run_for_cpu_alone(request):
    """These tests start processes of their own for the backends they need: once is enough."""
    if request.config.getoption("backend") != "cpu":
        pytest.skip("runs in processes of its own, and did in the run for cpu")
