"""How large a tree to verify: what a step costs against what a tree should bring."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

from hwcore._checks import check_size, is_number
from hwcore.errors import ArgumentTypeError, ArgumentValueError, describe
from hwcore.speculative.tree_costs import check_sizes

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Sequence

__all__ = ["TreeSizer"]

_WHERE = "TreeSizer"
_MOST = sys.float_info.max
_LEAST_PROBE = 8  # steps between probes, however little they cost


class TreeSizer:
    """Chooses ``num_draft_tokens`` for a batch: the size that should give most tokens a second.

    It learns from what was accepted how likely the node of each rank is to be on the path. Nodes
    are ranked by their scores, so that the first ranks of a large tree are the smaller trees, and
    one tree teaches about them all. The tokens to expect of a tree are one and these chances.

    >>> sizer = TreeSizer(measure_costs(step, (1, 4, 8, 16)))
    >>> size = sizer.choose()
    >>> sizer.learn(accepted_ranks, size)

    or for batches of several sizes, which cost differently and are accepted alike:

    >>> sizer = TreeSizer(measure_costs(step, (1, 4, 8, 16), batch_sizes=(1, 8, 32)))
    >>> size = sizer.choose(bs=len(requests))
    >>> sizer.learn_batch(ranks_of_each_request, size)

    Drafts of different kinds, such as looked-up matches of different lengths, are told apart by
    ``kind``, anything hashable; each has chances of its own, so that there should be few. A draft
    need not have been verified to be learnt from: decoding shows as well whether its nodes are on
    the path, if it is compared with what followed.

    All of it is plain Python on the host, and the same observations choose the same sizes.

    Parameters
    ----------
    costs : mapping of int to float, or of int to that
        Seconds of a step by tree size, 1 among them, decoding without drafts; or these by batch
        size: those of the next greater batch count, as it is padded to that one's graph.
    prior : float
        Chance of a node before anything was seen: of rank ``r`` it is ``prior ** sqrt(r)``.
    prior_weight : float
        Observations that it, or the drafter's own chances, counts for, greater than 0.
    memory : float
        Weight that an observation keeps with each later step, in (0, 1]: what lets it follow a text
        that changes.
    margin : float
        What a tree must promise over the size in use: the best of many noisy estimates flatters
        itself, and sizes should not flap. Going back to no drafts needs none.
    probe_share : float
        Of the time, in [0, 1): how much goes at most into steps with a larger tree than pays, to
        see whether it does by now. 0: never.

    Attributes
    ----------
    size : int
        What was chosen last, a probe's size apart.
    costs : mapping
        As they were passed.
    """

    def __init__(
        self,
        costs: Mapping[int, float] | Mapping[int, Mapping[int, float]],
        *,
        prior: float = 0.6,
        prior_weight: float = 4.0,
        memory: float = 0.98,
        margin: float = 1.05,
        probe_share: float = 0.02,
    ) -> None:
        for name, value, low, high in (
            ("prior", prior, 0.0, 1.0),
            ("prior_weight", prior_weight, 0.0, _MOST),
            ("memory", memory, 0.0, 1.0),
            ("margin", margin, 1.0, _MOST),
            ("probe_share", probe_share, 0.0, 1.0),
        ):
            if not is_number(value):
                fix = "Leave it out for the default"
                raise ArgumentTypeError(describe(_WHERE, name, value, "a number", fix))
            outside = {"prior_weight": 0.0, "memory": 0.0, "probe_share": 1.0}.get(name)
            if not low <= value <= high or value == outside:
                expected = f"a number in [{low}, {high}]" + (
                    "" if outside is None else f", not {outside}"
                )
                fix = "Leave it out for the default"
                raise ArgumentValueError(describe(_WHERE, name, value, expected, fix))
        self._by_batch = _checked(costs)
        self.costs = costs
        self.size = 1
        self._memory, self._margin, self._probe_share = memory, margin, probe_share
        ranks = range(max(max(by_size) for by_size in self._by_batch.values()))
        self._prior_weight = prior_weight
        self._prior = [prior ** math.sqrt(rank) for rank in ranks]
        self._seen: dict[Hashable, _Acceptance] = {}
        self._in_use: dict[tuple[int | None, Hashable], _InUse] = {}

    def expected(
        self, size: int, *, kind: Hashable = None, chances: Sequence[float] | None = None
    ) -> float:
        """Return the tokens to expect of a step with a tree of so many nodes.

        Parameters
        ----------
        size : int
        kind : hashable
        chances : sequence of float, optional
            What the drafter itself gives the nodes of this draft, by rank, the root's first. They
            take the place of ``prior``; where they end there is no node.
        """
        return self._expected((size,), kind, chances)[size]

    def break_even(self, bs: int | None = None) -> dict[int, float]:
        """Return how many tokens a step each size must bring to be as fast as no drafts."""
        costs = self._by_batch[self._batch(bs)]
        return {size: seconds / costs[1] for size, seconds in costs.items()}

    def choose(
        self,
        bs: int | None = None,
        *,
        kind: Hashable = None,
        chances: Sequence[float] | None = None,
    ) -> int:
        """Return the size for the next step; 1: without drafts.

        Parameters
        ----------
        bs : int, optional
            Requests of the batch; needed where costs are by batch size.
        kind, chances
            As :meth:`expected` takes them.
        """
        batch = self._batch(bs)
        costs = self._by_batch[batch]
        tokens = self._expected(costs, kind, chances)
        speeds = {size: tokens[size] / cost for size, cost in costs.items()}
        used = self._in_use.setdefault((batch, kind), _InUse())
        best = max(speeds, key=speeds.__getitem__)  # of equals the smallest
        stays = speeds[best] <= self._margin * speeds[used.size]
        if best > 1 and stays and (used.size == 1 or speeds[used.size] > speeds[1]):
            best = used.size
        if best != used.size:
            used.size, used.saved_s = best, 0.0
        self.size = best
        return self._probe(used, costs) or best

    def learn(self, accepted: Iterable[int], size: int, *, kind: Hashable = None) -> None:
        """Take what a verified tree showed.

        Parameters
        ----------
        accepted : iterable of int
            Ranks of the nodes on the accepted path (``DraftResults.ranks``); the root's, 0, may be
            among them.
        size : int
            Nodes that the tree had.
        kind : hashable
        """
        self.learn_batch((accepted,), size, kind=kind)

    def learn_batch(
        self, accepted: Iterable[Iterable[int]], size: int, *, kind: Hashable = None
    ) -> None:
        """Take what the trees of one step showed: as :meth:`learn`, of each request."""
        most = min(size, len(self._prior))
        trials, hits = 0, [0.0] * most
        for path in accepted:
            trials += 1
            for rank in set(path):
                if 0 <= rank < most:
                    hits[rank] += 1.0
        if trials and most > 1:
            if kind not in self._seen:
                self._seen[kind] = _Acceptance(len(self._prior), self._prior_weight)
            self._seen[kind].add(hits, trials, self._memory)

    def _expected(
        self, sizes: Iterable[int], kind: Hashable, chances: Sequence[float] | None
    ) -> dict[int, float]:
        prior = self._prior if chances is None else chances
        seen = self._seen.get(kind)
        found = list(prior[: len(self._prior)] if seen is None else seen.chances(prior))
        # From the first rank on, so that a larger tree never seems to bring less.
        sums = [1.0, 1.0]
        for chance in found[1:]:
            sums.append(sums[-1] + chance)
        return {size: sums[min(size, len(sums) - 1)] for size in sizes}

    def _probe(self, used: _InUse, costs: Mapping[int, float]) -> int | None:
        """Return a larger size where its turn has come; what it costs must have been saved."""
        larger = [size for size in costs if size > used.size]
        if not larger or not self._probe_share:
            return None
        size, step_s = larger[used.turn % len(larger)], costs[used.size]
        used.saved_s += self._probe_share * step_s
        # Counted as if it brought no token more than the size in use.
        price = max(costs[size] - step_s, _LEAST_PROBE * self._probe_share * step_s)
        if used.saved_s < price:
            return None
        used.saved_s, used.turn = 0.0, used.turn + 1
        return size

    def _batch(self, bs: int | None) -> int | None:
        """Return the batch size whose costs count."""
        if None in self._by_batch:
            return None
        known = cast("dict[int, dict[int, float]]", self._by_batch)
        fix = "Pass the requests of the batch: costs are by batch size"
        check_size(_WHERE, "bs", bs, 1, fix)
        return min((batch for batch in known if batch >= cast("int", bs)), default=max(known))


class _InUse:
    """What is in use for one batch size and kind, and what was saved up for a probe."""

    __slots__ = ("saved_s", "size", "turn")

    def __init__(self) -> None:
        self.size, self.saved_s, self.turn = 1, 0.0, 0


class _Acceptance:
    """How often the node of each rank was on the path, and how often there was one."""

    def __init__(self, ranks: int, prior_weight: float) -> None:
        self._hits, self._trials = [0.0] * ranks, [0.0] * ranks
        self._prior_weight = [prior_weight] * ranks

    def add(self, hits: Sequence[float], trials: int, memory: float) -> None:
        most = len(hits)
        self._hits[:most] = [
            memory * old + new for old, new in zip(self._hits[:most], hits, strict=True)
        ]
        self._trials[:most] = [memory * old + trials for old in self._trials[:most]]
        self._prior_weight[:most] = [memory * old for old in self._prior_weight[:most]]

    def chances(self, prior: Sequence[float]) -> list[float]:
        """Return the chance of each rank that ``prior`` has one for."""
        known = zip(prior, self._hits, self._trials, self._prior_weight, strict=False)
        return [(hits + weight * p) / (trials + weight) for p, hits, trials, weight in known]


def _checked(
    costs: Mapping[int, float] | Mapping[int, Mapping[int, float]],
) -> dict[int | None, dict[int, float]]:
    """Return costs by batch size, which is None where there is but one."""
    if not isinstance(costs, Mapping):
        expected, fix = "a mapping of seconds by tree size", "Pass what measure_costs returned"
        raise ArgumentTypeError(describe(_WHERE, "costs", costs, expected, fix))
    nested = [isinstance(value, Mapping) for value in costs.values()]
    if any(nested) and not all(nested):
        expected, fix = "seconds throughout, or mappings throughout", "Pass what measure_costs gave"
        raise ArgumentTypeError(describe(_WHERE, "costs", costs, expected, fix))
    if not any(nested):
        return {None: _checked_by_size("costs", cast("Mapping[int, float]", costs))}
    by_batch = cast("Mapping[int, Mapping[int, float]]", costs)
    for bs in by_batch:
        check_size(_WHERE, "a batch size", bs, 1, "Count the requests")
    return {bs: _checked_by_size(f"costs[{bs}]", by_batch[bs]) for bs in sorted(by_batch)}


def _checked_by_size(name: str, costs: Mapping[int, float]) -> dict[int, float]:
    for size in costs:
        check_size(_WHERE, "a tree size", size, 1, "Count the root as well")
    check_sizes(_WHERE, sorted(costs))
    for size, seconds in costs.items():
        if not is_number(seconds):
            expected, fix = "seconds, a number", "Pass what measure_costs returned"
            raise ArgumentTypeError(describe(_WHERE, f"{name}[{size}]", seconds, expected, fix))
        if not math.isfinite(seconds) or seconds <= 0:
            expected, fix = "seconds, greater than 0", "Pass what measure_costs returned"
            raise ArgumentValueError(describe(_WHERE, f"{name}[{size}]", seconds, expected, fix))
    return {size: costs[size] for size in sorted(costs)}
