"""Drafting by sampling, for ``verify_chain``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hwcore._checks import check_instance, check_tensor, check_values, may_read
from hwcore.activation import current_backend
from hwcore.errors import ArgumentValueError, describe
from hwcore.kernels.distribution import draw, probabilities
from hwcore.kernels.torch_ops import explains_missing, torch_ops
from hwcore.speculative.coins import CoinPurpose, draw_coins
from hwcore.speculative.sampling_params import SamplingParams

if TYPE_CHECKING:
    from torch import Tensor

    from hwcore.backend import Backend

__all__ = ["sample_drafts"]

_WHERE = "sample_drafts"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def sample_drafts(
    logits: Tensor,
    params: SamplingParams,
    *,
    seeds: Tensor | None = None,
    positions: Tensor | None = None,
    coins: Tensor | None = None,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample one draft a request, and return the distribution that it came from.

    Called by a drafting worker once a draft step. ``verify_chain`` takes the tokens as candidates
    and the distributions as ``draft_probs``.

    Parameters
    ----------
    logits : Tensor, float32, bfloat16, float16 or float64, [bs, V]
        The draft model's, over the target's vocabulary.
    params : SamplingParams
        Those of the target give the draft its shape; others are lossless too.
    seeds : Tensor, int64, [bs]
    positions : Tensor, int64, [bs], with ``seeds``
        Position of the token that is drafted; for block verification, a column of
        :func:`block_positions`.
    coins : Tensor, float32, [bs], in place of ``seeds``
        In [0, 1).
    backend : Backend, optional
        Default the current one.

    Returns
    -------
    tokens : Tensor, int64, [bs]
    probs : Tensor, float32, [bs, V]
        One-hot where the temperature is 0. All 0 where the logits are NaN or otherwise no logits:
        the draft, token 0, is then rejected.

    Raises
    ------
    ArgumentTypeError
        If an argument's type, dtype, rank or device is wrong.
    ArgumentValueError
        If a shape does not fit, coins come from nowhere or from two sources, or a parameter or coin
        is out of range (content: CPU arguments always, others under ``HWCORE_DEBUG=1``).

    Notes
    -----
    Mutates: none. Host sync: no. Graph-safe: yes.
    """
    check_tensor(_WHERE, "logits", logits, _FLOATS, [("bs", None), ("V", None)])
    check_instance(_WHERE, "params", params, SamplingParams, "SamplingParams.of")
    form, device = [("bs", logits.shape[0])], logits.device
    if (seeds is None) == (coins is None):
        given = [name for name, one in (("seeds", seeds), ("coins", coins)) if one is not None]
        fix = "Pass seeds and positions, or coins"
        expected = "either seeds or coins"
        raise ArgumentValueError(describe(_WHERE, "the source of coins", given, expected, fix))
    params.check(_WHERE, logits.shape[0], device)
    if coins is not None:
        check_tensor(_WHERE, "coins", coins, (torch.float32,), form, device)
        if may_read(coins):
            bad = ~((coins >= 0) & (coins < 1))  # NaN is neither
            fix = "Draw them with draw_coins"
            check_values(_WHERE, "coins", coins, bad, "a coin in [0, 1)", fix)
    else:
        check_tensor(_WHERE, "seeds", seeds, (torch.int64,), form, device)
        check_tensor(_WHERE, "positions", positions, (torch.int64,), form, device)
    backend = backend or current_backend()
    ops = torch_ops(backend)
    with explains_missing(backend), torch.no_grad():
        if seeds is not None and positions is not None:
            coins = draw_coins(seeds, positions.unsqueeze(1), CoinPurpose.DRAFT).squeeze(1)
        assert coins is not None
        probs, valid = probabilities(
            logits, params.temperatures, params.top_ks, params.top_ps, params.min_ps, ops=ops
        )
        probs = torch.where(valid.unsqueeze(1), probs, 0.0)
        return torch.where(valid, draw(probs, coins, ops), 0), probs
