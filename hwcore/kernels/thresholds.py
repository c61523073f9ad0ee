"""The least logit that top-k, top-p and min-p keep, found without sorting the vocabulary."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import torch

from hwcore.graphs.tape import is_capturing
from hwcore.kernels.vocabulary import blocked

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from hwcore.kernels.torch_ops import TorchOps

    Filters: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None]

__all__ = ["Filters", "reads_are_free", "thresholds"]

_WHOLE = 2**40  # the mass 1 in fixed point; sums of a vocabulary stay below 2^63
_ROUNDS = 32  # bits of a float32
_FIRST = 64  # tokens that are looked at first; 8 times as many in each further try


def reads_are_free(tensor: Tensor) -> bool:
    """Say whether a value may be looked at in order to do less: on a CPU, outside a capture."""
    return tensor.device.type == "cpu" and not is_capturing()


def thresholds(
    logits: Tensor,
    masses: Tensor,
    valid: Tensor,
    filters: Filters,
    ops: TorchOps,
) -> tuple[Tensor, Tensor]:
    """Return the least logit to keep, float32 ``[k, 1]``, and whether a row is cut at all.

    Parameters
    ----------
    logits : Tensor, float32, [k, V]
        Over temperature.
    masses : Tensor, float32, [k, V]
        Their softmax.
    valid : Tensor, bool, [k]
        Rows whose result matters.
    filters : tuple
        ``top_ks``, ``top_ps`` and ``min_ps`` as in ``probabilities``, each of which may be None.

    Notes
    -----
    Top-k keeps the least set of highest logits that has k members, top-p the least one that has
    the mass p: both are the highest threshold that suffices, whatever way it is found. Counts and
    masses are integers, so two ways find the same.
    """
    (top_ks, top_ps, min_ps), (rows, vocab) = filters, logits.shape
    least = logits.new_full((rows, 1), float("-inf"))
    cut = torch.zeros(rows, 1, dtype=torch.bool, device=logits.device)
    if top_ks is not None or top_ps is not None:
        ks = torch.full_like(valid, vocab, dtype=torch.int64) if top_ks is None else top_ks
        ks = torch.where((ks < 1) | (ks > vocab), vocab, ks).unsqueeze(1)
        ps = torch.ones_like(least) if top_ps is None else top_ps.unsqueeze(1)
        cut = (ks < vocab) | (ps < 1)
        if reads_are_free(logits):
            asked = (cut.squeeze(1) & valid).nonzero().squeeze(1)
            if len(asked):
                found = _from_the_top(logits[asked], masses[asked], ks[asked], ps[asked], ops)
                least[asked] = found
        else:
            used = top_ks is not None, top_ps is not None
            least = torch.where(cut, _bisected(logits, masses, ks, ps, ops, *used), least)
    if min_ps is not None:
        highest = ops.amax(blocked(ops.amax, logits), -1, keepdim=True)
        floor = highest + min_ps.unsqueeze(1).log()
        least = torch.maximum(least, floor)
        cut = cut | (min_ps.unsqueeze(1) > 0)
    return least, cut


def _fixed(masses: Tensor) -> Tensor:
    return (masses * _WHOLE).to(torch.int64)


def _target(ps: Tensor, kept: Tensor) -> Tensor:
    """Return the mass to reach, at least one unit so that something is kept."""
    return (kept.to(torch.float32) * ps).to(torch.int64).clamp(min=1)


def _from_the_top(logits: Tensor, masses: Tensor, ks: Tensor, ps: Tensor, ops: TorchOps) -> Tensor:
    """Look at ever more of the highest logits, until they hold the k and the mass of their row."""
    vocab = logits.shape[1]
    least = torch.empty_like(ps)
    open_rows = torch.arange(len(logits))
    limited = ks < vocab
    looked_at = max(_FIRST, int(torch.where(limited, ks, 0).max()) + 1)
    while len(open_rows):
        looked_at = min(looked_at, vocab)
        values, tokens = ops.topk(logits, looked_at)
        sums = ops.cumsum(_fixed(ops.gather(masses, 1, tokens)), 1)
        kth = ops.gather(values, 1, (ks - 1).clamp(max=looked_at - 1))
        kth = torch.where(limited, kth, float("-inf"))
        kept = ops.amax(torch.where(values >= kth, sums, 0), 1, keepdim=True)
        target = _target(ps, torch.where(limited, kept, _WHOLE))
        pth = torch.where(sums >= target, values, float("-inf"))
        pth = torch.where(ps < 1, ops.amax(pth, 1, keepdim=True), float("-inf"))
        # Of tokens equal to the k-th some might not be among those looked at.
        enough = (~limited | (values[:, -1:] < kth)) & ((ps >= 1) | (sums[:, -1:] >= target))
        enough = enough.squeeze(1) | (looked_at == vocab)
        least[open_rows[enough]] = torch.maximum(kth, pth)[enough]
        more = ~enough
        open_rows, logits, masses = open_rows[more], logits[more], masses[more]
        ks, ps, limited = ks[more], ps[more], limited[more]
        looked_at *= 8
    return least


def _bisected(
    logits: Tensor,
    masses: Tensor,
    ks: Tensor,
    ps: Tensor,
    ops: TorchOps,
    by_count: bool,
    by_mass: bool,
) -> Tensor:
    """Halve the range of float32 until one value is left, in a fixed number of rounds."""
    limited = ks < logits.shape[1]
    least = torch.full_like(ps, float("-inf"))

    def members(value: Tensor) -> Tensor:
        count: Tensor = ops.sum(logits >= value, 1, keepdim=True)
        return count

    if by_count:
        least = torch.where(limited, _highest(lambda value: members(value) >= ks, ks), least)
    if not by_mass:
        return least
    units = _fixed(masses)

    def mass(value: Tensor) -> Tensor:
        total: Tensor = ops.sum(torch.where(logits >= value, units, 0), 1, keepdim=True)
        return total

    target = _target(ps, torch.where(limited, mass(least), _WHOLE))
    found = _highest(lambda value: mass(value) >= target, ks)
    return torch.maximum(least, torch.where(ps < 1, found, float("-inf")))


_INFINITY = 0x7F800000  # the bits of +inf
_MAGNITUDE = 0x7FFFFFFF  # all bits but the sign


def _highest(suffices: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """Return the highest float32 that suffices, for a test that +inf fails.

    The bits of a float32, those of a negative one but the sign turned around, order as integers
    in the way that the numbers do. If not even -inf suffices, that is what comes back.
    """
    low = torch.full_like(like, -_INFINITY - 1, dtype=torch.int64)
    high = torch.full_like(low, _INFINITY)
    for _ in range(_ROUNDS):
        middle = (low + high) >> 1
        good = suffices(_as_float(middle))
        low, high = torch.where(good, middle, low), torch.where(good, high, middle)
    return _as_float(low)


def _as_float(order: Tensor) -> Tensor:
    bits = torch.where(order < 0, order ^ _MAGNITUDE, order)
    return bits.to(torch.int32).view(torch.float32)
