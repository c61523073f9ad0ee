"""What a verify step starts from, and what it leaves: the two sides of ``EagleVerifyWorker``."""

from __future__ import annotations

import collections.abc
import dataclasses
from typing import TYPE_CHECKING

import torch

from hwcore._checks import check_instance, check_tensor, check_values, may_read
from hwcore.errors import ArgumentTypeError, ArgumentValueError, describe
from hwcore.overlap.relay import RelayPayload
from hwcore.speculative.sampling_params import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from hwcore.speculative.commit import CommitResult
    from hwcore.speculative.tree import DraftTree
    from hwcore.speculative.verify import VerifyResult

__all__ = ["VerifyBatch", "VerifyStep", "check_batch", "check_locs", "check_room"]

_INDEX = (torch.int64, torch.int32)


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class VerifyBatch:
    """The drafts of a batch of requests, and what the host knows of it.

    Every tensor of it has been submitted when it is handed to ``mark`` or ``prepare``: that is what
    the plan stream waits for. Whoever writes into one of them afterwards has a race, which the
    sanitizer reports.

    Attributes
    ----------
    rows : Tensor, int64 or int32, [bs], device
        Rows of the request pool; 0 is padding, and nothing of it is kept.
    draft_tokens : Tensor, int64, [bs, N], device
        As :func:`~hwcore.speculative.build_tree` takes them; column 0 is the root.
    parents : Tensor, int64, [bs, N], device
        Likewise.
    seq_lens : Tensor, int64, [bs], device
        Tokens in the KV cache before the root.
    host_seq_lens : tuple of int, [bs]
        The same as far as the host knows, never less: with overlap the most that they can be. A
        backend is told of it (``ReplayBatch.seq_lens``), and it must leave room for the tree.
    cache_locs : Tensor, int64, [bs, N], device, optional
        KV slot of each node. Default: what ``req_to_token`` says from ``seq_lens`` on.
    sampling : SamplingParams, optional
        None: everyone is greedy.
    seeds : Tensor, int64, [bs], device, optional
        Of the requests' coins; with ``sampling``.
    relayed : RelayPayload, optional
        What ``FutureMap.resolve`` returned for ``rows``. It is put back if the step fails before
        its results are published, so that the rows are as they were.
    extra : Mapping of str to Tensor
        Further inputs of the forward, by its own names, such as a page table.
    seq_lens_sum : int, optional
        Their exact sum, which a FULL mask needs on a device.
    attention : str
        The attention kind, for the backend.
    is_idle : bool
        Nobody's step, such as a data-parallel rank without requests makes: the forward runs, for
        other ranks wait for its collectives, and nothing else. Its rows are padding; there may be
        none.
    has_positions : bool
        False: the forward makes its positions itself, and is given none.
    """

    rows: Tensor
    draft_tokens: Tensor
    parents: Tensor
    seq_lens: Tensor
    host_seq_lens: tuple[int, ...]
    cache_locs: Tensor | None = None
    sampling: SamplingParams | None = None
    seeds: Tensor | None = None
    relayed: RelayPayload | None = None
    extra: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    seq_lens_sum: int | None = None
    attention: str = ""
    is_idle: bool = False
    has_positions: bool = True

    @property
    def is_empty(self) -> bool:
        """Whether nothing of the batch counts: it is idle, or has no requests."""
        return self.is_idle or not self.host_seq_lens


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class VerifyStep:
    """What a verify step leaves. All of it is of the stream that verified.

    Attributes
    ----------
    rows : Tensor, [bs], device
        The batch's rows, 0 for those that were vacated meanwhile: what to publish to.
    tree : DraftTree
    result : VerifyResult
    commit : CommitResult
        ``accept_tokens`` is what goes to the host; ``hidden_states``, where the forward returns
        any, are what the next draft goes on from.
    cache_locs : Tensor, int64, [bs, N], or None
        KV slot of each node, the padding slot for rows that were vacated.
    replayed : bool
        A graph ran the forward.
    """

    rows: Tensor
    tree: DraftTree
    result: VerifyResult
    commit: CommitResult
    cache_locs: Tensor | None
    replayed: bool


def check_batch(where: str, batch: VerifyBatch, device: torch.device) -> None:
    """Raise unless a batch is of the form that its class says. ``build_tree`` looks at the tree."""
    check_instance(where, "batch", batch, VerifyBatch, "VerifyBatch(...)")
    check_tensor(where, "batch.rows", batch.rows, _INDEX, [("bs", None)], device)
    bs = batch.rows.shape[0]
    int64 = (torch.int64,)
    form = [("bs", bs), ("N", None)]
    check_tensor(where, "batch.draft_tokens", batch.draft_tokens, int64, form, device)
    n = batch.draft_tokens.shape[1]
    check_tensor(where, "batch.parents", batch.parents, int64, [("bs", bs), ("N", n)], device)
    check_tensor(where, "batch.seq_lens", batch.seq_lens, int64, [("bs", bs)], device)
    lens = batch.host_seq_lens
    if not isinstance(lens, tuple) or len(lens) != bs or any(type(n) is not int for n in lens):
        expected, fix = f"a tuple of {bs} ints", "Pass what the host knows of the lengths"
        raise ArgumentTypeError(describe(where, "batch.host_seq_lens", lens, expected, fix))
    if batch.cache_locs is not None:
        form = [("bs", bs), ("N", n)]
        check_tensor(where, "batch.cache_locs", batch.cache_locs, int64, form, device)
    if batch.sampling is not None:
        check_instance(where, "batch.sampling", batch.sampling, SamplingParams, "SamplingParams.of")
        batch.sampling.check(where, bs, device)
        if batch.seeds is None and not batch.sampling.all_greedy:
            expected, fix = "a seed for each request, for some are sampled", "Pass them"
            raise ArgumentValueError(describe(where, "batch.seeds", None, expected, fix))
    if batch.seeds is not None:
        check_tensor(where, "batch.seeds", batch.seeds, int64, [("bs", bs)], device)
    if batch.relayed is not None:
        check_instance(where, "batch.relayed", batch.relayed, RelayPayload, "FutureMap.resolve")
    extra = batch.extra
    if not isinstance(extra, collections.abc.Mapping) or not all(
        isinstance(value, torch.Tensor) for value in extra.values()
    ):
        expected, fix = "tensors by their names", "Pass a dict of tensors"
        raise ArgumentTypeError(describe(where, "batch.extra", extra, expected, fix))


def check_room(where: str, batch: VerifyBatch, max_context: int) -> None:
    """Raise unless a batch's trees find their places in rows of ``max_context``; by the host."""
    n, longest = batch.draft_tokens.shape[1], max(batch.host_seq_lens, default=0)
    if longest + n > max_context:
        expected = f"room for {n} nodes within the {max_context} places of a row of req_to_token"
        fix = "Draft fewer nodes, or end the request before"
        what = "max(batch.host_seq_lens)"
        raise ArgumentValueError(describe(where, what, longest, expected, fix))


def check_locs(where: str, cache_locs: Tensor, num_slots: int) -> None:
    """Raise unless KV slots are of the pool; where the host can see it, or debugging looks."""
    if may_read(cache_locs):
        bad = (cache_locs < 0) | (cache_locs >= num_slots)
        fix = "Pass slots of the KV pool; a move must stay in it"
        check_values(where, "cache_locs", cache_locs, bad, f"a slot in [0, {num_slots})", fix)
