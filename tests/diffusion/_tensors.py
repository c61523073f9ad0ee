"""Tensors of every kind that can be sent, and what it means that one arrived."""

import torch

from hwcore.diffusion.specs import DTYPES


def bits(tensor):
    """The elements as bytes, on the host: NaNs and float8 compare like all others."""
    plain = tensor.detach().resolve_conj().resolve_neg().cpu()
    return plain.contiguous().reshape(-1).view(torch.uint8).tolist()


def filled(dtype, shape, device="cpu", seed=0):
    """A row-major tensor with random bytes for elements; of a bool 0 and 1."""
    count = torch.Size(shape).numel() * dtype.itemsize
    generator = torch.Generator().manual_seed(seed)
    limit = 2 if dtype is torch.bool else 256
    raw = torch.randint(0, limit, (count,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).view(shape).to(device)


def same(got, wanted):
    """Raise unless one tensor is, value by value and stride by stride, the other."""
    assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
    assert bits(got) == bits(wanted)


def shapes(device):
    """Tensors of float32 in every way that a tensor can lie in memory."""
    base = torch.arange(240, dtype=torch.float32, device=device)
    picture = base.view(2, 3, 4, 10)
    return {
        "0-dim": base[7],
        "empty": base[:0],
        "empty of two dims": base.new_empty(0, 3),
        "row-major": base.view(24, 10),
        "transposed": base.view(24, 10).t(),
        "channels last": picture.to(memory_format=torch.channels_last),
        "size 1 dims": base.view(1, 240, 1).transpose(0, 2),
        "every other": base[::2],
        "a column": base.view(24, 10)[:, 3],
        "expanded": base[:5].expand(4, 5),
        "expanded 0-dim": base[3].expand(2, 2),
        "a parameter": torch.nn.Parameter(base.clone()),
        "a graph's": (base.clone().requires_grad_() * 2),
        "negative": torch.view_as_complex(base.view(120, 2)).conj().imag,
        "large": base.expand(20, 240).contiguous(),
    }


def dtypes():
    return list(DTYPES.values())
