import pytest
import torch

from ._tapes import MODES


@pytest.fixture(params=MODES)
def mode(request):
    return MODES[request.param]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
