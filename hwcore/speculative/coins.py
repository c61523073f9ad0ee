"""Coins: the random numbers of speculation, which depend on no one but the request itself."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, TypeAlias

import torch

from hwcore._checks import check_size, check_tensor
from hwcore.errors import ArgumentTypeError, ArgumentValueError, describe

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["COIN_BITS", "CoinPurpose", "block_positions", "draw_coins"]

_WHERE = "draw_coins"

COIN_BITS = 24
"""A coin is a multiple of ``2 ** -COIN_BITS``: what float32 tells apart everywhere in [0, 1)."""


class CoinPurpose(enum.IntEnum):
    """What a coin decides. A position has one coin of each, and none is used for two things."""

    DRAFT = 0
    """Which token the draft model proposes for the position."""
    ACCEPT = 1
    """Whether the target accepts a proposed token; siblings share it."""
    RESIDUAL = 2
    """Which token the target itself emits there: the bonus, what follows a rejection, or, without
    speculation, the only one."""


_Several: TypeAlias = list[CoinPurpose] | tuple[CoinPurpose, ...]


def draw_coins(seeds: Tensor, positions: Tensor, purpose: CoinPurpose | _Several) -> Tensor:
    """Draw the coins of positions, as a function of seed, position and purpose alone.

    Called wherever a draft, verify or sampling step needs randomness. There is no state: a request
    gets the same coins whatever batch, row or step it is in, and on any device.

    Parameters
    ----------
    seeds : Tensor, int64, [bs]
        One a request; any value.
    positions : Tensor, int64, [bs, n]
        Absolute position, in its request, of the token that the coin decides; any value.
    purpose : CoinPurpose, or list or tuple of them
        Several cost hardly more launches than one.

    Returns
    -------
    coins : Tensor, float32, [bs, n], or [purposes, bs, n] for several
        Multiples of 2^-24 in [0, 1).

    Raises
    ------
    ArgumentTypeError
        If an argument's type, dtype, rank or device is wrong.
    ArgumentValueError
        If the batch sizes differ, or no purpose is given.

    Notes
    -----
    A coin is output ``position`` of the SplitMix64 generator that starts at the mixed seed. The
    integers become floats by their upper 24 bits, which float32 holds exactly; a cast of all bits
    would round up to 1.0, a coin that no probability beats.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (2014), with
    Stafford's mixer 13. Mutates: none. Host sync: no. Graph-safe: yes.
    """
    several = isinstance(purpose, (list, tuple))
    purposes = purpose if isinstance(purpose, (list, tuple)) else (purpose,)
    _check(seeds, positions, purposes)
    if several:
        state = torch.stack([seeds + _PURPOSES[each] for each in purposes]).unsqueeze(-1)
    else:
        state = (seeds + _PURPOSES[purposes[0]]).unsqueeze(-1)  # [bs, 1]
    state = torch.add(_mixed(state), positions, alpha=_INCREMENT)
    # The mixer's last step would change lower bits only.
    upper = _shifted(_mixed(state), 64 - COIN_BITS)
    return upper.to(torch.float32).mul_(2.0**-COIN_BITS)


def block_positions(root_positions: Tensor, n: int) -> Tensor:
    """Return positions for the coins of a block, in which the step counts as well.

    Block verification decides by coins beyond the node where its walk ends, and so by the drafts
    there. The next step comes to the same absolute positions again; with the same coins its result
    would depend on what is known of them by then. Draft and accept coins of a block are therefore
    keyed on the position of its root and the distance from it, as negative numbers, which are no
    position. The coin of the token that the target draws itself is not one of them.

    Parameters
    ----------
    root_positions : Tensor, int64 or int32, [bs]
        Position of the last token emitted, in [0, 2^47).
    n : int
        Tokens of the block, at most 2^16.

    Returns
    -------
    positions : Tensor, int64, [bs, n]
        For :func:`draw_coins`; column ``k`` for the token ``k + 1`` after the root.

    Notes
    -----
    Mutates: none. Host sync: no. Graph-safe: yes.
    """
    where, form = "block_positions", [("bs", None)]
    check_tensor(where, "root_positions", root_positions, (torch.int64, torch.int32), form)
    check_size(where, "n", n, 0, "Pass the tokens of the block")
    distance = torch.arange(n, device=root_positions.device)
    # Times -2^16, for a product keeps its sign where a shift would be of its bits.
    return root_positions.to(torch.int64).unsqueeze(1) * -(2**16) - 1 - distance


def _signed(word: int) -> int:
    """Return the int64 with the bits of an unsigned 64-bit word."""
    return word - 2**64 if word >= 2**63 else word


_INCREMENT = _signed(0x9E3779B97F4A7C15)  # 2^64 / golden ratio
_MULTIPLIERS = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)
# Far apart, so that the small seeds of one purpose are never those of another: the first 64-bit
# words of the fractional parts of the square roots of 2, 3 and 5.
_PURPOSES = {
    CoinPurpose.DRAFT: _signed(0x6A09E667F3BCC908),
    CoinPurpose.ACCEPT: _signed(0xBB67AE8584CAA73B),
    CoinPurpose.RESIDUAL: _signed(0x3C6EF372FE94F82B),
}


def _shifted(words: Tensor, bits: int) -> Tensor:
    """Shift right, zeros coming in: int64 itself repeats the sign, and few devices know uint64."""
    return (words >> bits).bitwise_and_(2 ** (64 - bits) - 1)


def _mixed(words: Tensor) -> Tensor:
    """Return the words mixed, in place of them; a bijection whose upper bits depend on all."""
    first, second = _MULTIPLIERS
    words = words.bitwise_xor_(_shifted(words, 30)).mul_(first)
    return words.bitwise_xor_(_shifted(words, 27)).mul_(second)


def _check(seeds: Tensor, positions: Tensor, purposes: Sequence[object]) -> None:
    int64 = (torch.int64,)
    check_tensor(_WHERE, "seeds", seeds, int64, [("bs", None)])
    form = [("bs", seeds.shape[0]), ("n", None)]
    check_tensor(_WHERE, "positions", positions, int64, form, seeds.device)
    names = ", ".join(f"CoinPurpose.{each.name}" for each in CoinPurpose)
    fix = "Pass a member of CoinPurpose, or a list of them"
    if not purposes:
        raise ArgumentValueError(describe(_WHERE, "purpose", purposes, f"one of {names}", fix))
    for each in purposes:
        if not isinstance(each, CoinPurpose):
            raise ArgumentTypeError(describe(_WHERE, "purpose", each, f"one of {names}", fix))
