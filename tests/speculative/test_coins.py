import itertools
import math

import pytest
import torch

from hwcore.errors import ArgumentTypeError, ArgumentValueError
from hwcore.graphs.tape import Tape
from hwcore.speculative import CoinPurpose, draw_coins

WORD = 2**64
PURPOSES = list(CoinPurpose)
KNOWN = [
    [[10127277, 2038297], [15892565, 14185875]],
    [[11787488, 2728251], [6869321, 4350565]],
    [[16055003, 11261648], [12088022, 6270950]],
]


def ints(values, device="cpu"):
    return torch.tensor(values, dtype=torch.int64).to(device)


def grid(num_seeds, num_positions, purpose, first=0):
    positions = torch.arange(first, first + num_positions).expand(num_seeds, -1)
    return draw_coins(torch.arange(num_seeds), positions, purpose)


def expected(seed, position, purpose):
    """The generator's definition on Python's integers."""

    def mixed(word):
        word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % WORD
        return (word ^ word >> 27) * 0x94D049BB133111EB % WORD

    fraction = math.isqrt((2, 3, 5)[purpose] << 128) % WORD
    state = mixed((seed + fraction) % WORD)
    return (mixed((state + position * 0x9E3779B97F4A7C15) % WORD) >> 40) / 2**24


def chi_square(counts):
    mean = counts.sum().item() / counts.numel()
    return ((counts - mean) ** 2 / mean).sum().item()


def looks_uniform(counts):
    """Within five standard deviations of chi-square: a false alarm in a million or so."""
    freedom = counts.numel() - 1
    return abs(chi_square(counts.double()) - freedom) < 5 * math.sqrt(2 * freedom)


EXTREMES = [0, 1, -1, 7, 2**31, -(2**31) - 5, 2**62 + 3, 2**63 - 1, -(2**63)]


@pytest.mark.parametrize("purpose", PURPOSES)
def test_coins_are_the_generators_whatever_the_size_of_seed_and_position(purpose, device):
    pairs = list(itertools.product(EXTREMES, EXTREMES))
    seeds, positions = ([pair[k] for pair in pairs] for k in (0, 1))
    got = draw_coins(ints(seeds, device), ints(positions, device).unsqueeze(1), purpose)
    assert got.dtype == torch.float32
    assert got.device.type == torch.device(device).type
    assert got.squeeze(1).tolist() == [expected(*pair, purpose) for pair in pairs]


def test_a_few_known_coins():
    """So that a change of the definition, which changes every seeded output, is seen."""
    got = draw_coins(ints([0, 42]), ints([[0, 1], [0, 1]]), PURPOSES)
    assert (got * 2**24).to(torch.int64).tolist() == KNOWN


def test_several_purposes_at_once_are_each_drawn_alone(device):
    seeds, positions = ints([5, -6], device), ints([[0, 9, 2**40], [4, 4, 4]], device)
    chosen = (CoinPurpose.RESIDUAL, CoinPurpose.DRAFT)
    together = draw_coins(seeds, positions, chosen)
    assert together.shape == (2, 2, 3)
    for coins, purpose in zip(together, chosen, strict=True):
        assert torch.equal(coins, draw_coins(seeds, positions, purpose))


def test_a_requests_coins_do_not_depend_on_its_batch_or_row(device):
    seeds, positions = torch.arange(100, 116), torch.arange(48).view(16, 3) ** 2
    whole = draw_coins(seeds.to(device), positions.to(device), CoinPurpose.ACCEPT).cpu()
    for row in (0, 7, 15):
        alone = draw_coins(seeds[[row]].to(device), positions[[row]].to(device), CoinPurpose.ACCEPT)
        assert torch.equal(alone.cpu(), whole[[row]])
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    moved = draw_coins(seeds[order].to(device), positions[order].to(device), CoinPurpose.ACCEPT)
    assert torch.equal(moved.cpu(), whole[order])


def test_the_highest_word_is_the_highest_coin_below_one(monkeypatch, device):
    """The float that a rounding cast would turn into 1.0."""
    from hwcore.speculative import coins

    monkeypatch.setattr(coins, "_mixed", lambda words: torch.full_like(words, -1))
    assert draw_coins(ints([3], device), ints([[4]], device), CoinPurpose.ACCEPT).item() == (
        1 - 2**-24
    )
    monkeypatch.setattr(coins, "_mixed", torch.zeros_like)
    assert draw_coins(ints([3], device), ints([[4]], device), CoinPurpose.ACCEPT).item() == 0.0


@pytest.mark.parametrize("purpose", PURPOSES)
@pytest.mark.parametrize(("num_seeds", "num_positions"), [(1, 2**18), (2**18, 1), (512, 512)])
def test_coins_are_uniform_over_small_seeds_and_positions(purpose, num_seeds, num_positions):
    words = (grid(num_seeds, num_positions, purpose) * 2**24).to(torch.int64).flatten()
    assert looks_uniform((words >> 14).bincount(minlength=1024))
    assert looks_uniform((words & 1023).bincount(minlength=1024))


NEIGHBOURS = {
    "seeds": lambda coins: (coins[0, 1:], coins[0, :-1]),
    "positions": lambda coins: (coins[0, :, 1:], coins[0, :, :-1]),
    "diagonal": lambda coins: (coins[0, 1:, 1:], coins[0, :-1, :-1]),
    "antidiagonal": lambda coins: (coins[0, 1:, :-1], coins[0, :-1, 1:]),
    "draft and accept": lambda coins: (coins[0], coins[1]),
    "accept and residual": lambda coins: (coins[1], coins[2]),
    "accept and the next residual": lambda coins: (coins[1, :, :-1], coins[2, :, 1:]),
    "draft and the next seed's accept": lambda coins: (coins[0, :-1], coins[1, 1:]),
}


@pytest.mark.parametrize("which", NEIGHBOURS)
def test_neighbouring_coins_are_independent(which):
    """Joint uniformity in 32 x 32 cells, over a lattice of small integers."""
    coins = grid(512, 512, PURPOSES)
    first, second = (side.flatten() for side in NEIGHBOURS[which](coins))
    cells = (first * 32).to(torch.int64) * 32 + (second * 32).to(torch.int64)
    assert looks_uniform(cells.bincount(minlength=1024))
    # Sums and differences too: a lattice of few planes would hide from the cells.
    assert looks_uniform((((first + second) % 1) * 1024).to(torch.int64).bincount(minlength=1024))
    assert looks_uniform((((first - second) % 1) * 1024).to(torch.int64).bincount(minlength=1024))


def test_one_bit_of_seed_or_position_changes_half_of_the_coins_bits():
    generator = torch.Generator().manual_seed(2)
    seeds = torch.randint(-(2**62), 2**62, (2000,), generator=generator)
    positions = torch.randint(0, 2**20, (2000, 1), generator=generator)

    def words(seeds, positions):
        return (draw_coins(seeds, positions, CoinPurpose.DRAFT) * 2**24).to(torch.int64)

    before = words(seeds, positions)
    for bit in range(64):
        flip = torch.tensor(1 << bit if bit < 63 else -(2**63))
        for after in (words(seeds ^ flip, positions), words(seeds, positions ^ flip)):
            changed = (before ^ after).unsqueeze(-1) >> torch.arange(24) & 1
            # 2000 flips a bit of the coin: a standard deviation is 0.011.
            assert ((changed.double().mean((0, 1)) - 0.5).abs() < 0.06).all(), bit


def test_coins_of_a_large_grid_collide_as_often_as_chance_has_it():
    coins = grid(400, 200, PURPOSES).flatten()
    pairs = coins.numel() * (coins.numel() - 1) / 2 / 2**24
    counts = coins.sort().values.unique_consecutive(return_counts=True)[1]
    found = (counts * (counts - 1) / 2).sum().item()
    assert abs(found - pairs) < 5 * math.sqrt(pairs)
    assert counts.max() <= 5


def test_no_two_rows_of_coins_are_alike():
    """Streams of different seeds and purposes do not overlap, shifted ones included."""
    coins = (grid(2000, 40, PURPOSES) * 2**24).to(torch.int64).view(-1, 40)
    pairs = (coins[:, :-1] << 24 | coins[:, 1:]).flatten()  # 48 bits
    chance = pairs.numel() ** 2 / 2 / 2**48
    assert pairs.numel() - pairs.unique().numel() < chance + 5 * math.sqrt(chance) + 1


def test_seeds_an_increment_apart_do_not_share_a_shifted_stream():
    """As they would if the seed were not mixed before positions are counted from it."""
    increment = 0x9E3779B97F4A7C15 - WORD
    seeds = ints([5, 5 + increment, 5 - increment])
    coins = draw_coins(seeds, torch.arange(64).expand(3, -1), CoinPurpose.ACCEPT)
    for shift in range(-3, 4):
        for other in (1, 2):
            assert (coins[0].roll(shift) == coins[other]).sum() < 3


def test_a_captured_draw_follows_its_inputs(device):
    seeds, positions = ints([1, 2], device), ints([[3], [4]], device)
    tape = Tape()
    coins = tape.capture(lambda: draw_coins(seeds, positions, PURPOSES))
    seeds.add_(5)
    positions.mul_(9)
    tape.replay()
    assert torch.equal(
        coins, draw_coins(ints([6, 7], device), ints([[27], [36]], device), PURPOSES)
    )


def test_arguments_are_left_as_they_are(device):
    seeds, positions = ints([1, 2], device), ints([[3], [4]], device)
    draw_coins(seeds, positions, PURPOSES)
    assert seeds.tolist() == [1, 2]
    assert positions.tolist() == [[3], [4]]


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_torchs_default_dtype_changes_nothing(default):
    wanted = grid(3, 3, CoinPurpose.ACCEPT)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        got = grid(3, 3, CoinPurpose.ACCEPT)
    finally:
        torch.set_default_dtype(before)
    assert got.dtype == torch.float32
    assert torch.equal(got, wanted)


def test_an_empty_batch_has_no_coins(device):
    empty = torch.zeros(0, dtype=torch.int64, device=device)
    assert draw_coins(empty, empty.view(0, 5), CoinPurpose.DRAFT).shape == (0, 5)
    assert draw_coins(empty, empty.view(0, 5), PURPOSES).shape == (3, 0, 5)


def test_few_operations_are_enqueued():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        launches = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.launches += function.name() not in ("aten::unsqueeze", "aten::view")
            return function(*args, **(kwargs or {}))

    with Count() as one:
        grid(1, 1, CoinPurpose.ACCEPT)
    with Count() as three:
        grid(1, 1, PURPOSES)
    assert one.launches <= 25
    assert three.launches <= one.launches + 3


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"seeds": [1]}, ArgumentTypeError, r"seeds got \[1\] \(list\); expected a tensor \[bs\]"),
        ({"seeds": torch.zeros(2)}, ArgumentTypeError, r"seeds\.dtype got torch\.float32"),
        ({"seeds": ints([[1], [2]])}, ArgumentTypeError, r"seeds\.dim\(\) got 2"),
        ({"seeds": ints([1])}, ArgumentValueError, r"positions\.shape got \[2, 1\] .*\[bs=1, n\]"),
        ({"seeds": ints([1, 2]).to("meta")}, ArgumentTypeError, r"positions\.device got .*cpu"),
        ({"positions": ints([1, 2])}, ArgumentTypeError, r"positions\.dim\(\) got 1"),
        ({"positions": ints([[1], [2]]).int()}, ArgumentTypeError, r"positions\.dtype got"),
        ({"purpose": 1}, ArgumentTypeError, r"purpose got 1 \(int\); expected one of CoinPurpose"),
        ({"purpose": [1]}, ArgumentTypeError, r"purpose got 1 \(int\); expected one of CoinPurp"),
        ({"purpose": []}, ArgumentValueError, r"purpose got \[\] .*Pass a member of CoinPurpose"),
    ],
)
def test_what_is_wrong_is_named(changed, error, message):
    arguments = {"seeds": ints([1, 2]), "positions": ints([[3], [4]]), "purpose": PURPOSES}
    with pytest.raises(error, match="^draw_coins: " + message):
        draw_coins(**(arguments | changed))
