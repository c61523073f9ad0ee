"""Triton's interpreter runs the kernels on the CPU: ``make test-triton``.

It must be asked for before Triton is imported, so these tests have a process of their own.
"""

import os

import pytest

from hwcore.kernels.triton import tuning

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(items):
    for item in items:
        if "kernels/triton" in item.path.as_posix():
            item.add_marker("interpreter")
            if not INTERPRETED:
                item.add_marker(pytest.mark.skip(reason="without TRITON_INTERPRET=1"))
            # numpy warns of NaN and infinities, which are among the inputs.
            item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*"))


@pytest.fixture(scope="session")
def kernels():
    from hwcore.kernels import triton

    return triton.kernels()


@pytest.fixture(params=[(4096, 1), (128, 1), (128, 4)], ids="{0[0]} by {0[1]}".format)
def pieces(request, monkeypatch):
    """Rows read in one block, in several, and by several programs."""
    block, splits = request.param
    for name in ("verify_tree_greedy", "verify_tree_sampling"):
        monkeypatch.setitem(tuning.TUNED, name, tuning.Tuning(block=block, num_warps=4))
    for name in ("greedy", "sampling"):
        module = f"hwcore.kernels.triton.{name}.splits_of_a_row"
        monkeypatch.setattr(module, lambda batch, vocab: splits)
