"""Draft steps: from the head's likeliest tokens to the nodes that it goes on with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hwcore._checks import FLOATS, check_size, check_tensor
from hwcore.activation import current_backend
from hwcore.errors import ArgumentValueError
from hwcore.kernels.torch_ops import explains_missing, torch_ops
from hwcore.speculative.draft_results import organize_draft_results

if TYPE_CHECKING:
    from torch import Tensor

    from hwcore.backend import Backend
    from hwcore.speculative.draft_results import DraftResults

__all__ = ["Beam", "DraftSteps"]


@dataclass(frozen=True, eq=False, slots=True)
class Beam:
    """The nodes of a draft step that the head runs next.

    Attributes
    ----------
    tokens : Tensor, int64, [bs, topk]
    origin : Tensor, int64, [bs, topk]
        Which node of the beam before each follows: whose hidden state and KV path it goes on with.
        In the first beam 0, for they all follow the root.
    scores : Tensor, float32, [bs, topk]
        Product of the probabilities on the path to each.
    """

    tokens: Tensor
    origin: Tensor
    scores: Tensor


class DraftSteps:
    """What the steps of one draft proposed, and which nodes to go on with.

    >>> steps = DraftSteps(topk=4)
    >>> beam = steps.first(probs, tokens)  # [bs, 4], of the token after the root
    >>> for _ in range(spec_steps - 1):
    ...     probs, tokens = head(beam.tokens, ...)  # [bs, 4, 4]
    ...     beam = steps.next(probs, tokens)
    >>> draft_tokens, parents = steps.organize(num_draft_tokens).with_root(roots)

    Each step proposes ``topk`` tokens after each of ``topk`` nodes, and the head goes on with the
    ``topk`` of them whose paths are likeliest. With ``topk`` 1 there is nothing to choose.

    Parameters
    ----------
    topk : int
        At least 1.
    backend : Backend, optional
        By default the process's own.

    Attributes
    ----------
    scores, tokens, parents : list of Tensor
        As :func:`organize_draft_results` takes them, a step an entry.

    Notes
    -----
    A child is never likelier than its parent here, whatever the head says: a probability above 1
    counts as 1, NaN as 0. Equals keep their order, so that the same draft comes out everywhere.

    Source: EAGLE-2 (Li et al. 2024) §4; SGLang's ``select_top_k_tokens``. Host sync: no.
    Graph-safe: yes.
    """

    def __init__(self, topk: int, *, backend: Backend | None = None) -> None:
        check_size("DraftSteps", "topk", topk, 1, "Pass the branches at each node")
        self.topk = topk
        self.scores: list[Tensor] = []
        self.tokens: list[Tensor] = []
        self.parents: list[Tensor] = []
        self._backend = backend or current_backend()
        self._ops = torch_ops(self._backend)
        self._beam: Beam | None = None

    def first(self, probs: Tensor, tokens: Tensor) -> Beam:
        """Take what may follow the root.

        Parameters
        ----------
        probs : Tensor, float, [bs, topk]
            Probabilities, largest first.
        tokens : Tensor, int64, [bs, topk]
        """
        where = "DraftSteps.first"
        form = [("bs", None), ("topk", self.topk)]
        check_tensor(where, "probs", probs, FLOATS, form)
        bs, device = probs.shape[0], probs.device
        form = [("bs", bs), ("topk", self.topk)]
        check_tensor(where, "tokens", tokens, (torch.int64,), form, device)
        scores = _chances(probs)
        self.scores, self.tokens = [scores.unsqueeze(1)], [tokens]
        candidates = torch.arange(-1, self.topk, device=device)
        self.parents = [candidates.repeat(bs, 1)]
        self._beam = Beam(tokens, torch.zeros_like(tokens), scores)
        return self._beam

    def next(self, probs: Tensor, tokens: Tensor) -> Beam:
        """Take what may follow each node of the last beam, and return the next one.

        Parameters
        ----------
        probs : Tensor, float, [bs, topk, topk]
            After each node: probabilities, largest first.
        tokens : Tensor, int64, [bs, topk, topk]
        """
        where, topk = "DraftSteps.next", self.topk
        if self._beam is None:
            message = f"{where}: there is no beam yet; expected first() before. Call first()."
            raise ArgumentValueError(message)
        (bs, _), device = self._beam.tokens.shape, self._beam.tokens.device
        form = [("bs", bs), ("topk", topk), ("topk", topk)]
        check_tensor(where, "probs", probs, FLOATS, form, device)
        check_tensor(where, "tokens", tokens, (torch.int64,), form, device)
        scores = self._beam.scores.unsqueeze(2) * _chances(probs)  # [bs, topk, topk]
        flat, proposed = (each.reshape(bs, topk * topk) for each in (scores, tokens))
        # The candidates of this step are numbered after those of the steps before.
        offset = topk + topk * topk * (len(self.tokens) - 1)
        if topk == 1:
            origin, best, chosen = torch.zeros_like(proposed), flat, proposed
            listed = torch.full_like(proposed, offset)
        else:
            with explains_missing(self._backend):
                # Stable: of equals the first. topk * topk candidates are few to sort.
                order = self._ops.sort(flat, dim=1, descending=True, stable=True)
                picked = order.indices[:, :topk]
                best = order.values[:, :topk]
                chosen = self._ops.gather(proposed, 1, picked)
            origin, listed = picked // topk, picked + offset
        self.scores.append(scores)
        self.tokens.append(proposed)
        self.parents.append(listed)
        self._beam = Beam(chosen, origin, best)
        return self._beam

    def organize(self, num_draft_tokens: int) -> DraftResults:
        """Choose the likeliest nodes; see :func:`organize_draft_results`."""
        return organize_draft_results(
            self.scores, self.tokens, self.parents, num_draft_tokens, backend=self._backend
        )


def _chances(probs: Tensor) -> Tensor:
    return torch.where(probs.isnan(), 0.0, probs.float()).clamp(0.0, 1.0)
