"""A kernel beside the reference of its name."""

import torch

import hwcore.kernels
from hwcore.testing.conformance.operations import leaves, mapped


def copied(arguments):
    """Copies that keep their strides, but not what lies between."""

    def copy(tensor):
        if 0 in tensor.stride():  # nobody writes to what is repeated
            return tensor
        like = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        return like.copy_(tensor)

    return mapped(copy, arguments)


def same(one, other):
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    if other.is_floating_point():
        return torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
    return torch.equal(one, other)


def agree(kernels, name, *arguments):
    """Assert that a kernel returns, writes and leaves alone what the reference does."""
    ours, theirs = copied(arguments), copied(arguments)
    got = leaves(kernels[name](*ours))
    want = leaves(getattr(hwcore.kernels, name)(*theirs))
    assert [field for field, _ in got] == [field for field, _ in want]
    for (field, one), (_, other) in zip(got, want, strict=True):
        if isinstance(other, torch.Tensor):
            assert same(one, other), f"{field}: {one} for {other}"
        else:
            assert one == other, field
    for (field, one), (_, other) in zip(leaves(ours), leaves(theirs), strict=True):
        if isinstance(other, torch.Tensor):
            assert same(one, other), f"argument {field} after the call"
    return [value for _, value in got]


def spread(tensor):
    """The same values as a view of every second element."""
    return tensor.unsqueeze(-1).repeat(*[1] * tensor.dim(), 2)[..., 0]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


FAR = 2**30 + 16  # elements; three such steps do not fit 32 bits, one does


def far_apart(folder, width, dtype):
    """Three rows of zeros, ``FAR`` apart, in a file with holes: what nobody touches takes no room.

    There is as much before them as 32 bits can count, so that a wrong address is one in the file.
    """
    size = 2**31 + 3 * FAR
    memory = torch.from_file(str(folder / str(dtype)), shared=True, size=size, dtype=dtype)
    return memory.as_strided((3, width), (FAR, 1), storage_offset=2**31)
