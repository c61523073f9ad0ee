"""From rows of logits to probabilities, and from probabilities to tokens.

Each row is handled by itself, in the same way whatever the number of rows: a request's tokens do
not depend on its neighbours. Sums over the vocabulary are taken in blocks, so that a draw reads
the row once and then one block of it, where a running sum over the vocabulary takes as long as a
softmax.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hwcore.kernels.thresholds import reads_are_free, thresholds
from hwcore.kernels.torch_ops import TORCH
from hwcore.kernels.vocabulary import BLOCK, block_of, blocked, lowest_argmax

if TYPE_CHECKING:
    from torch import Tensor

    from hwcore.kernels.thresholds import Filters
    from hwcore.kernels.torch_ops import TorchOps

__all__ = [
    "are_valid",
    "divisors_of",
    "draw",
    "draw_with_total",
    "probabilities",
    "weights",
]

_LEAST_TEMPERATURE = 1e-20  # below it, logits over temperature would pass the range of float32


def probabilities(
    rows: Tensor,
    temperatures: Tensor,
    top_ks: Tensor | None = None,
    top_ps: Tensor | None = None,
    min_ps: Tensor | None = None,
    ops: TorchOps = TORCH,
) -> tuple[Tensor, Tensor]:
    """Turn logits into the distribution that is sampled from.

    Temperature first, then top-k, top-p of what top-k left, min-p. Each is a threshold on the
    logit: tokens as likely as the last one kept are kept too. Found without sorting.

    Parameters
    ----------
    rows : Tensor, float, [k, V], device
        Logits; computed with in float32.
    temperatures : Tensor, float32, [k], device
        At least 0; 0 puts all mass on the highest logit, the lowest token of equal ones. Others
        below 1e-20 count as 1e-20.
    top_ks : Tensor, int64, [k], device, optional
        Below 1: all tokens.
    top_ps : Tensor, float32, [k], device, optional
        In (0, 1]; 1: all tokens.
    min_ps : Tensor, float32, [k], device, optional
        In [0, 1], relative to the likeliest token; 0: all tokens.
    ops : TorchOps
        Torch's operations as the device runs them.

    Returns
    -------
    probs : Tensor, float32, [k, V], device
        Sum 1 but for rounding; anything in rows that are not valid.
    valid : Tensor, bool, [k], device
        False where a row holds NaN or +inf, or nothing but -inf.

    Notes
    -----
    Top-p adds masses up in fixed point, 2^-40 a unit, so that their order does not matter. Mutates:
    none. Host sync: no. Graph-safe: yes.
    """
    divisors = divisors_of(temperatures)
    found, total = weights(rows, divisors, (top_ks, top_ps, min_ps), ops)
    valid = are_valid(found)
    if total is not None:
        found /= total
    greedy = temperatures <= 0
    if reads_are_free(rows) and not bool(greedy.any()):
        return found, valid
    token = lowest_argmax(rows, ops)
    one_hot = torch.arange(rows.shape[1], device=rows.device) == token.unsqueeze(1)
    found = torch.where(greedy.unsqueeze(1), one_hot.to(torch.float32), found)
    return found, torch.where(greedy, token >= 0, valid)


def divisors_of(temperatures: Tensor) -> Tensor:
    """Return what to divide logits by, ``[k, 1]``; a greedy row is decided elsewhere."""
    return temperatures.clamp(min=_LEAST_TEMPERATURE).unsqueeze(1)


def are_valid(weights: Tensor) -> Tensor:
    """Say of which rows, ``[k]``, the logits were valid.

    A softmax with NaN, +inf or nothing but -inf in it is NaN throughout.
    """
    return weights[:, 0] == weights[:, 0]


def weights(
    rows: Tensor,
    divisors: Tensor,
    filters: Filters,
    ops: TorchOps,
    scratch: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return probabilities before they are scaled to sum 1 again, as :func:`probabilities` does.

    Parameters
    ----------
    divisors : Tensor, float32, [k, 1], device
        From :func:`divisors_of`.
    filters : tuple
        ``top_ks``, ``top_ps`` and ``min_ps``, each of which may be None.
    scratch, out : Tensor, float32, [k, V], device, optional
        Memory to work in, and for the weights: allocating it anew costs more than filling it.

    Returns
    -------
    weights : Tensor, float32, [k, V]
        Softmax, and 0 for what top-k, top-p or min-p leave out.
    total : Tensor, float32, [k, 1], or None
        Their sum; 1 in rows where nothing was left out, None where nothing could be.
    """
    scaled = torch.div(rows.to(torch.float32), divisors, out=scratch)
    found = ops.softmax(scaled, -1, out=out)
    if all(each is None for each in filters):
        return found, None
    least, cut = thresholds(scaled, found, are_valid(found), filters, ops)
    # As numbers, which multiply faster than truth values.
    found *= torch.ge(scaled, least, out=scaled)
    total = ops.sum(blocked(ops.sum, found), -1, keepdim=True)
    return found, torch.where(cut, total, 1.0)


def draw(weights: Tensor, coins: Tensor, ops: TorchOps = TORCH) -> Tensor:
    """Draw a token from each row by the inverse of its distribution function.

    Parameters
    ----------
    weights : Tensor, float32, [k, V], device
        At least 0, to any sum.
    coins : Tensor, float32, [k], device
        In [0, 1).

    Returns
    -------
    Tensor, int64, [k], device
        The first token whose cumulative weight exceeds ``coin * sum``; where rounding leaves
        none, the last one of positive weight. Never one of weight 0, but V - 1 in a row that has
        nothing else, or holds NaN.

    Notes
    -----
    Mutates: none. Host sync: no. Graph-safe: yes.
    """
    tokens, _ = draw_with_total(weights, coins, ops)
    return tokens


def draw_with_total(weights: Tensor, coins: Tensor, ops: TorchOps) -> tuple[Tensor, Tensor | None]:
    """Return what :func:`draw` does, and the sum of each row, float32 ``[k]``.

    None for the sums: all are known to be positive, and the rows without NaN.
    """
    vocab = weights.shape[1]
    sums = blocked(ops.sum, weights)  # [k, blocks]
    reached = ops.cumsum(sums, -1)
    total = reached[:, -1:]
    aim = coins.unsqueeze(1) * total
    starts = torch.nn.functional.pad(reached, (1, 0))
    if reads_are_free(weights):  # where running sums grow steadily: no search in them goes astray
        block = ops.searchsorted(reached, aim, right=True).clamp(max=sums.shape[1] - 1)
        inside = block_of(weights, block, 0.0, ops)
        sought = ops.gather(starts, 1, block) + ops.cumsum(inside, -1)
        place = ops.searchsorted(sought, aim, right=True)
        if bool((place < inside.shape[1]).all()):
            return (block * BLOCK + place).squeeze(1), None
    block = _first_beyond(reached, sums, aim, ops)
    inside = block_of(weights, block, 0.0, ops)
    sought = ops.gather(starts, 1, block) + ops.cumsum(inside, -1)
    place = _first_beyond(sought, inside, aim, ops)
    token = torch.where(total > 0, block * BLOCK + place, vocab - 1)
    return token.squeeze(1), total.squeeze(1)


def _first_beyond(reached: Tensor, steps: Tensor, aim: Tensor, ops: TorchOps) -> Tensor:
    """Return the first place of a positive step where ``reached > aim``, else the last such.

    Any place where no step is positive. Asking for a positive step costs nothing where running
    sums grow steadily; elsewhere it keeps a dip by rounding from choosing a token of weight 0.
    """
    length = steps.shape[1]
    place = torch.arange(length, device=steps.device)
    # What lies beyond comes before all else, in its order; the rest follows in the reverse order.
    rank = torch.where(reached > aim, place, 2 * length - place)
    least: Tensor = ops.amin(torch.where(steps > 0, rank, 3 * length), 1, keepdim=True)
    return torch.where(least < length, least, 2 * length - least).clamp(min=0)
