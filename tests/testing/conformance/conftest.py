import pytest


@pytest.fixture(autouse=True, scope="module")
def _in_the_run_for_cpu_alone(request):
    """These tests start processes of their own for the backends they need: once is enough."""
    if request.config.getoption("backend") != "cpu":
        pytest.skip("starts sim in processes of its own; the run for cpu holds it")
