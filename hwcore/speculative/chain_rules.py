"""How far a chain of sampled drafts is accepted: token by token, or as a block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch

from hwcore.kernels.distribution import probabilities
from hwcore.kernels.thresholds import reads_are_free
from hwcore.kernels.vocabulary import blocked
from hwcore.speculative.processors import WalkedRows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from hwcore.kernels.torch_ops import TorchOps
    from hwcore.speculative.processors import LogitProcessor
    from hwcore.speculative.sampling_params import SamplingParams

    Select: TypeAlias = Callable[[Tensor], Tensor]
    Measure: TypeAlias = Callable[[Tensor, Select], Tensor]

__all__ = ["Chain", "TargetRows", "at_nodes", "by_block", "by_token", "leftover"]


@dataclass(frozen=True, eq=False, slots=True)
class Chain:
    """The drafts to decide on: the one of step ``s`` follows node ``s`` and is node ``s + 1``.

    Attributes
    ----------
    drafts : Tensor, int64, [bs, steps]
    chances : Tensor, float32, [bs, steps]
        Probability with which each was drafted; 0 where that was none. 1 for a greedy request,
        whose target accepts with probability 0 or 1 whatever the draft's was.
    coins : Tensor, float32, [bs, steps]
    draft_probs : Tensor, float32, [bs, steps, V]
    greedy : Tensor, bool, [bs]
    ops : TorchOps
    """

    drafts: Tensor
    chances: Tensor
    coins: Tensor
    draft_probs: Tensor
    greedy: Tensor
    ops: TorchOps

    def target_chance(self, step: int) -> Measure:
        """Measure the target's probability of the draft of a step."""

        def measure(probs: Tensor, of_rows: Select) -> Tensor:
            drafts: Tensor = of_rows(self.drafts[:, step : step + 1])
            known = drafts.clamp(0, probs.shape[1] - 1)
            chance = torch.where(drafts == known, self.ops.gather(probs, 1, known), 0.0)
            return chance.squeeze(1)

        return measure

    def left(self, step: int, ratios: Tensor) -> Measure:
        """Measure the mass that the target has beyond the draft's at a step."""

        def measure(probs: Tensor, of_rows: Select) -> Tensor:
            drafted = of_rows(self.draft_probs[:, step])
            beyond = leftover(probs, drafted, of_rows(ratios), of_rows(self.greedy))
            # In blocks, so that the order does not depend on the number of rows.
            mass: Tensor = self.ops.sum(blocked(self.ops.sum, beyond), 1)
            return mass

        return measure


class TargetRows:
    """The target's probabilities after each node, computed when a rule gets there.

    On a device, which alone knows how many still walk, each step computes a row of every request.
    On the CPU it costs nothing to look, and the others are left out. The results are the same to
    the bit, for no row depends on those beside it.
    """

    def __init__(
        self,
        candidates: Tensor,
        logits: Tensor,
        params: SamplingParams,
        processor: LogitProcessor | None,
        ops: TorchOps,
    ) -> None:
        self._candidates = candidates
        self._logits = logits
        self._params = params
        self._processor = processor
        self._ops = ops
        self._picks = reads_are_free(logits)
        self._kept: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def at(self, step: int, wanted: Tensor, *measures: Measure) -> list[Tensor]:
        """Return whether each request's row after a node is valid, and measures of it, ``[bs]``.

        A request that is not wanted may be left out; then it is invalid, and its measures are 0.
        """
        if not self._picks:
            nodes = torch.where(wanted, step, 0)
            probs, valid = self._read(self._logits[:, step], None, nodes, step)
            return [valid, *(measure(probs, _whole) for measure in measures)]
        rows, logits = wanted.nonzero().squeeze(1), self._logits[:, step]
        if len(rows) < len(wanted):
            logits = logits.index_select(0, rows)
        probs, valid = self._read(logits, rows, torch.full_like(rows, step), step)
        self._kept[step] = rows, probs, valid

        def of_rows(whole: Tensor) -> Tensor:
            return whole if len(rows) == len(whole) else whole.index_select(0, rows)

        parts = [valid, *(measure(probs, of_rows) for measure in measures)]
        return [part.new_zeros(len(wanted)).index_copy_(0, rows, part) for part in parts]

    def ends(self, nodes: Tensor) -> Iterator[tuple[Tensor | None, Tensor, Tensor]]:
        """Give the rows after each request's own node, int64 ``[bs]``, in groups of requests.

        Yields
        ------
        requests : Tensor, int64, [k], or None
            None: all of them.
        probs : Tensor, float32, [k, V]
        valid : Tensor, bool, [k]
        """
        size = self._logits.shape[1]
        if not self._picks:
            found = at_nodes(self._logits, nodes, self._ops)
            yield None, *self._read(found, None, nodes, size - 1)
            return
        self.at(size - 1, nodes == size - 1)
        for step, (rows, probs, valid) in self._kept.items():
            here = (nodes.index_select(0, rows) == step).nonzero().squeeze(1)
            if len(here) == len(nodes):
                yield None, probs, valid
            elif len(here):
                yield rows[here], probs[here], valid[here]

    def _read(
        self, logits: Tensor, rows: Tensor | None, nodes: Tensor, deepest: int
    ) -> tuple[Tensor, Tensor]:
        """Return probabilities of logits, one row a request; ``rows`` None: of all requests.

        ``nodes`` is where each path ends as a processor sees it, at most ``deepest``.
        """

        def of(values: Tensor) -> Tensor:
            return values if rows is None else values.index_select(0, rows)

        if self._processor is not None:
            column = torch.arange(deepest + 1, device=nodes.device)
            path = of(self._candidates)[:, : deepest + 1]
            path = torch.where(column <= nodes.unsqueeze(1), path, -1)
            requests = torch.arange(len(nodes), device=nodes.device) if rows is None else rows
            logits = logits.to(torch.float32, copy=True)
            logits = self._processor(WalkedRows(logits, requests, path))
        params = self._params
        filters = (params.top_ks, params.top_ps, params.min_ps)
        ks, ps, least = (None if one is None else of(one) for one in filters)
        return probabilities(logits, of(params.temperatures), ks, ps, least, self._ops)


def at_nodes(
    values: Tensor, nodes: Tensor, ops: TorchOps, requests: Tensor | None = None
) -> Tensor:
    """Return the rows of requests, None for all, each at a node of its own: ``[k, V]``."""
    bs, n, vocabulary = values.shape
    if requests is None:
        requests = torch.arange(bs, device=nodes.device)
    if values.is_contiguous():
        at = requests * n + nodes
        rows: Tensor = ops.index_select(values.view(-1, vocabulary), 0, at)
    else:  # whatever its strides are, nothing but these rows is copied
        if len(requests) < bs:
            values = values.index_select(0, requests)
        at = nodes.view(-1, 1, 1).expand(-1, 1, vocabulary)
        rows = ops.gather(values, 1, at).squeeze(1)
    return rows


def _whole(batch: Tensor) -> Tensor:
    return batch


def leftover(probs: Tensor, drafted: Tensor, ratios: Tensor | None, greedy: Tensor) -> Tensor:
    """Return the target's mass beyond the draft's, ``[k, V]``: what a rejection leaves to draw.

    Parameters
    ----------
    probs : Tensor, float32, [k, V]
        The target's probabilities.
    drafted : Tensor, float32, [k, V]
        The draft's; what is no probability counts as none.
    ratios : Tensor, float32, [k], or None
        Factor on the target's; None: 1.
    greedy : Tensor, bool, [k]
        Requests of which nothing is taken away.
    """
    if ratios is not None:
        probs = ratios.unsqueeze(1) * probs
    if not reads_are_free(drafted) or not _all_count(drafted, greedy):
        # NaN is not at most 1, and what is negative would add.
        drafted = torch.where((drafted <= 1) & ~greedy.unsqueeze(1), drafted, 0.0).clamp_(min=0.0)
    return (probs - drafted).clamp_(min=0.0)


def _all_count(drafted: Tensor, greedy: Tensor) -> bool:
    """Say whether every number is a probability or 0, which costs a fraction of making it so."""
    if not len(drafted):
        return True
    # Of NaN both are NaN. By rows: over all at once torch copies what is not in one piece.
    low, high = drafted.amin(1).amin(), drafted.amax(1).amax()
    return bool((low >= 0) & (high <= 1) & ~greedy.any())


def by_token(chain: Chain, target: TargetRows) -> tuple[Tensor, None]:
    """Accept each draft with probability ``min(1, p / q)``, until one is rejected.

    Returns
    -------
    accepted : Tensor, int64, [bs]
        Drafts accepted, which is the node where the walk ends.
    ratios : None
        There is no factor on the target's probabilities there.

    Notes
    -----
    Source: Leviathan, Kalman, Matias, "Fast inference from transformers via speculative decoding"
    (2023).
    """
    bs, steps = chain.drafts.shape
    device = chain.drafts.device
    walks = torch.ones(bs, dtype=torch.bool, device=device)
    accepted = torch.zeros(bs, dtype=torch.int64, device=device)
    for step in range(steps):
        valid, p = target.at(step, walks, chain.target_chance(step))
        q = chain.chances[:, step]
        # Strictly: a token without mass is not accepted by a coin of 0.
        walks = walks & valid & (q > 0) & (chain.coins[:, step] * q < p)
        accepted += walks
    return accepted, None


def by_block(chain: Chain, target: TargetRows) -> tuple[Tensor, Tensor]:
    """Accept the longest prefix of the chain that passes as a whole.

    A draft that would be rejected alone can be made good by those before it, so that never fewer
    are accepted in expectation. Coins are looked at beyond the node where the walk ends. A row that
    cannot be sampled from ends the block: of a shorter one, all that is said here holds as well.

    Returns
    -------
    accepted : Tensor, int64, [bs]
        As :func:`by_token`.
    ratios : Tensor, float32, [bs]
        Factor on the target's probabilities there: the joint ratio of what is accepted, at most 1.

    Notes
    -----
    Source: Sun et al., "Block verification accelerates speculative decoding" (2024), algorithm 2.
    """
    bs, steps = chain.drafts.shape
    device = chain.drafts.device
    walks = torch.ones(bs, dtype=torch.bool, device=device)
    accepted = torch.zeros(bs, dtype=torch.int64, device=device)
    ratio = ratio_there = torch.ones(bs, dtype=torch.float32, device=device)

    def passes(step: int, chance: Tensor) -> None:
        """Let the block end after the draft of a step, if that passes."""
        nonlocal accepted, ratio_there
        taken = walks & (chain.coins[:, step] < chance)
        accepted = torch.where(taken, step + 1, accepted)
        ratio_there = torch.where(taken, ratio, ratio_there)

    for step in range(steps):
        measures = [chain.target_chance(step)]
        if step > 0:
            measures.append(chain.left(step, ratio))
        valid, p, *left = target.at(step, walks, *measures)
        if left:
            total = left[0] + 1 - ratio
            chance = torch.where(total > 0, left[0] / total, 1.0)
            passes(step - 1, torch.where(valid, chance, ratio))
        q = chain.chances[:, step]
        # In this order nothing is 0 * inf, however small q.
        grown = torch.where(q > 0, ratio * p / q, 0.0).clamp(max=1.0)
        ratio = torch.where(walks & valid, grown, 0.0)
        walks = ratio > 0
    if steps > 0:
        passes(steps - 1, ratio)
    return accepted, ratio_there
