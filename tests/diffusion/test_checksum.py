"""The checksum finds what goes wrong on the way; the copy that makes it is a copy."""

from __future__ import annotations

import pytest
import torch

from hwcore.diffusion.checksum import checksum, copy_with_checksum
from hwcore.errors import ArgumentTypeError, ArgumentValueError


def random_bytes(count, seed=0):
    return torch.randint(
        0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


@pytest.mark.parametrize("count", [1, 7, 16, 100, 240, 241, 1100])
@pytest.mark.parametrize("fill", ["random", "zeros"])
def test_any_single_flipped_bit_is_found(count, fill):
    data = random_bytes(count) if fill == "random" else torch.zeros(count, dtype=torch.uint8)
    whole = checksum(data)
    for place in range(count):
        for bit in range(8):
            data[place] ^= 1 << bit
            assert checksum(data) != whole
            data[place] ^= 1 << bit


def test_swapped_words_are_found():
    data = random_bytes(4096)
    whole, words = checksum(data), data.view(torch.int64)
    for first in range(0, len(words), 37):
        for second in range(first + 1, len(words)):
            swapped = words.clone()
            swapped[[first, second]] = words[[second, first]]
            assert checksum(swapped.view(torch.uint8)) != whole


def test_truncated_tails_are_found_even_where_they_are_zeros():
    data = torch.zeros(2000, dtype=torch.uint8)
    assert len({checksum(data[:count]) for count in range(2001)}) == 2001


@pytest.mark.parametrize("count", [0, 1, 262143, 262144, 262145, 1000003])
def test_a_copy_with_checksum_copies_and_sums_as_the_whole(count):
    source, destination = random_bytes(count), torch.zeros(count, dtype=torch.uint8)
    assert copy_with_checksum(destination, source) == checksum(source) == checksum(destination)
    assert torch.equal(destination, source)


@pytest.mark.parametrize(
    ("tensor", "error", "part"),
    [
        ([1, 2], ArgumentTypeError, "torch.Tensor"),
        (torch.zeros(4), ArgumentTypeError, "torch.uint8"),
        (torch.zeros(2, 2, dtype=torch.uint8), ArgumentTypeError, "dimensions"),
        (torch.zeros(4, dtype=torch.uint8)[::2], ArgumentValueError, "contiguous()"),
        (torch.zeros(4, dtype=torch.uint8, device="meta"), ArgumentTypeError, "device"),
    ],
)
def test_what_is_no_flat_host_bytes_is_refused(tensor, error, part):
    with pytest.raises(error, match=r"checksum") as caught:
        checksum(tensor)
    assert part in str(caught.value)


def test_a_destination_of_another_size_is_refused_untouched():
    destination = torch.zeros(5, dtype=torch.uint8)
    with pytest.raises(ArgumentValueError, match=r"5 \(int\); expected 4"):
        copy_with_checksum(destination, torch.ones(4, dtype=torch.uint8))
    assert not destination.any()
