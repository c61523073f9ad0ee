"""The peer that ``benchmarks/device_gather.py`` measures with: it must do what it is a peer in."""

import pytest
import torch

from hwcore.cli.bench import load


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 8, 1500])
def test_the_single_tensor_gather_copies_rows(dtype, width):
    rows = torch.arange(7 * width).view(7, width).to(dtype)
    indices = torch.tensor([6, 0, 3, 3])
    out = torch.full((4, width), -1).to(dtype)
    load("device_gather").single_tensor_gather()(rows, indices, out)
    assert torch.equal(out, rows[indices])
