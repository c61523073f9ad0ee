"""EagleVerifyWorker: one verify step, from a batch of drafts to what the next step starts from."""

from __future__ import annotations

import collections.abc
import contextlib
from typing import TYPE_CHECKING, Any

import torch

from hwcore._checks import check_instance
from hwcore.backend import Backend
from hwcore.errors import ArgumentTypeError, ArgumentValueError, CapabilityError, describe
from hwcore.fence import StreamFence
from hwcore.graphs import GraphRunner
from hwcore.graphs.prepared import Verdict
from hwcore.overlap import FutureMap
from hwcore.speculative.batch import VerifyBatch, VerifyStep, check_batch
from hwcore.speculative.finishing import Finisher
from hwcore.speculative.inputs import names_of
from hwcore.speculative.planning import Inputs, Planner, PreparedBatch
from hwcore.speculative.sampling import check_rules
from hwcore.speculative.tensor_parallel import ResultBroadcast
from hwcore.speculative.tree import TreeMaskMode
from hwcore.speculative.turns import Turns, are_in

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor
    from torch.distributed import ProcessGroup

    from hwcore.overlap import RelayPayload

__all__ = ["EagleVerifyWorker"]

_WHERE = "EagleVerifyWorker"
_PADDING = 0  # row and KV slot that belong to nobody


class EagleVerifyWorker:
    """Verifies draft trees with a target model, step after step, without the host.

    A step: the batch's tree, positions and KV slots are made on the plan stream, and copied into
    the graph's buffers; the main stream joins, runs the target's forward, verifies, commits, moves
    KV entries and leaves lengths and tokens in the :class:`~hwcore.overlap.FutureMap` for the step
    that follows. The worker knows no model: the engine brings the forward, the pools and the
    drafts.

    >>> relay, rows = FutureMap(RelaySpec(pool_size=3)), on([1, 2])
    >>> relay.publish(rows, on([4, 7]))  # a prefill: tokens in the cache, and the one after them
    >>> relay.stash(rows, RelayPayload(next_token=on([10, 20])))
    >>> worker = EagleVerifyWorker(lambda draft_tokens: draft_tokens + 1, relay)

    >>> lens, relayed = relay.resolve_seq_lens(rows), relay.resolve(rows)
    >>> root = relayed.next_token
    >>> drafts = torch.stack((root, root + 1, root + 5), 1)  # two drafts, of which one is right
    >>> batch = VerifyBatch(rows, drafts, on([[-1, 0, 1]] * 2), lens, (4, 7), relayed=relayed)
    >>> step = worker.run(batch)
    >>> step.commit.accept_tokens.tolist()  # what is sent to the host, which need not wait for it
    [[11, 12, -1], [21, 22, -1]]
    >>> relay.resolve_seq_lens(rows, to_cpu=True).tolist()
    [6, 9]

    Where the main stream has something to do between drafting and verifying::

        worker.mark(batch)  # the plan stream may read it; what comes next it need not wait for
        extend_the_draft_models_cache()
        prepared = worker.prepare(batch)
        step = worker.verify(prepared)

    **Requests that leave.** Rows that the scheduler gives back are told to :meth:`vacate`, before
    they are given away again. They are emptied in the map, and a batch that is under way neither
    publishes nor moves nor writes anything of theirs: its ``rows`` and ``cache_locs`` become 0
    there, which belong to nobody. (A forward that writes through another input, of ``extra``, has
    to see to that itself.)

    **Errors.** If a step fails before its results are published, what the map held for its rows is
    put back (``VerifyBatch.relayed``): resolve them again and go on. A call out of turn changes
    nothing. The worker can be used after either.

    Parameters
    ----------
    forward : callable
        The target over the trees. It is given by name what it names, or everything if it takes
        ``**kwargs``: ``draft_tokens`` [bs, N]; ``positions`` [bs * N]; ``tree_mask``;
        ``cache_locs`` [bs, N], where it writes its KV entries; ``seq_lens`` [bs]; ``rows`` [bs];
        ``mrope_positions`` [3, bs * N]; and what ``VerifyBatch.extra`` holds. It returns logits
        [bs, N, vocab], or the tokens of greedy decoding, int64 [bs, N]; or a pair of those and
        hidden states [bs, N, hidden]; with bs * N for both dimensions just as well.
    relay : FutureMap
        Through which steps hand on.
    runner : GraphRunner, optional
        Graphs of ``forward``, captured by whoever made it, with the slots of
        :func:`~hwcore.speculative.verify_slots`. Where it has none for a batch, ``forward`` runs.
    draft_extend : callable, optional
        What the draft model does after the commit: takes the :class:`VerifyStep` and returns the
        :class:`~hwcore.overlap.RelayPayload` to stash. Needed if the map holds ``topk_p`` or
        ``draft_probs``; without it the bonus tokens are stashed, and the last accepted hidden
        states if the map holds them.
    move_kv : callable, optional
        Copies KV entries from slots to slots, both int64 [bs * (spec_steps + 1)]. May be left out
        where every tree is a chain: its path lies at the front.
    req_to_token : Tensor, int64 or int32, [pool, max_context], optional
        KV slots by row and place: where ``VerifyBatch.cache_locs`` are looked up.
    mrope_deltas : Tensor, int64, [pool], optional
        Of a model with mrope positions: what each row's differ by. Not looked at for a forward that
        does not take ``mrope_positions``, such as a text model that shares the pool.
    spec_steps : int, optional
        Bound on the depth of trees; default ``N - 1``.
    tree_mask_mode : TreeMaskMode
    page_size : int
        Of the KV pool.
    num_slots : int, optional
        Of the KV pool, to check ``cache_locs`` with: on the CPU, and under ``HWCORE_DEBUG=1``.
    threshold_single, threshold_acc : float
        Of :func:`~hwcore.speculative.verify_sampling`.
    processor : callable, optional
        Logit processor of :func:`~hwcore.speculative.verify_sampling`. One that runs on the host
        is a sync in each step, and no graph is used.
    group : ProcessGroup, optional
        Tensor-parallel ranks: all commit what rank 0 has verified.
    timeout_s : float
        After which a rank is given up, where the host waits for it.
    plan_stream : bool, optional
        The user's switch; default ``HWCORE_PLAN_STREAM``, else what the backend's policy says.
        False switches off what the policy has on. True where the policy has it off is an error:
        the policy's reason is about steps such as this one, so that this class is stricter than
        :class:`~hwcore.overlap.PlanStream`, by which one may still try it.
    fence : StreamFence, optional
        By which ``req_to_token`` and ``mrope_deltas`` are shared; default: one of the worker's.
    backend : Backend, optional
        By default the process's own.

    Attributes
    ----------
    fence : StreamFence
        Whoever writes ``req_to_token`` or ``mrope_deltas`` does it in ``worker.fence.writing()``,
        on whatever stream; the plan stream and the forward read them in blocks of it.
    plan_stream_active : bool
        What was decided.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        If an argument is not as described.
    CapabilityError
        If a plan stream is wanted where the backend's policy has none.

    Notes
    -----
    One thread, one batch at a time: ``prepare`` and ``verify`` in turn. Host sync: none, but what
    the processor, the group (gloo on a device) and ``HWCORE_DEBUG=1`` bring. Graph-safe: no, for
    it orders streams; it replays graphs itself.

    Source: SGLang's EAGLE worker with overlap scheduling, whose races on three devices (pull
    requests 23423, 22113, 26380) were each mended on one, and whose greedy ranks diverge (34238).
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        relay: FutureMap,
        *,
        runner: GraphRunner | None = None,
        draft_extend: Callable[[VerifyStep], RelayPayload] | None = None,
        move_kv: Callable[[Tensor, Tensor], Any] | None = None,
        req_to_token: Tensor | None = None,
        mrope_deltas: Tensor | None = None,
        spec_steps: int | None = None,
        tree_mask_mode: TreeMaskMode = TreeMaskMode.QLEN_ONLY,
        page_size: int = 1,
        num_slots: int | None = None,
        threshold_single: float = 1.0,
        threshold_acc: float = 1.0,
        processor: Callable[..., Any] | None = None,
        group: ProcessGroup | None = None,
        timeout_s: float = 60.0,
        plan_stream: bool | None = None,
        fence: StreamFence | None = None,
        backend: Backend | None = None,
    ) -> None:
        from torch.distributed import ProcessGroup

        from hwcore.activation import current_backend

        check_instance(_WHERE, "relay", relay, FutureMap, "FutureMap(RelaySpec(...))")
        self._names = names_of(_WHERE, forward)
        check_rules(_WHERE, threshold_single, threshold_acc, processor)
        for name, value, kind, maker in (
            ("runner", runner, GraphRunner, "GraphRunner(...)"),
            ("group", group, ProcessGroup, "torch.distributed.new_group"),
            ("fence", fence, StreamFence, "StreamFence(...)"),
            ("backend", backend, Backend, "load_backend"),
        ):
            if value is not None:
                check_instance(_WHERE, name, value, kind, maker)
        hw = backend or current_backend()
        self._forward, self._relay, self._runner = forward, relay, runner
        self._device = relay.device
        self._planner = Planner(
            _WHERE,
            hw,
            self._device,
            runner=runner,
            spec_steps=spec_steps,
            tree_mask_mode=tree_mask_mode,
            req_to_token=req_to_token,
            mrope_deltas=mrope_deltas if self._takes("mrope_positions") else None,
            num_slots=num_slots,
            page_size=page_size,
            fence=fence,
            plan_stream=plan_stream,
        )
        self.fence = self._planner.fence
        self.plan_stream_active = self._planner.plan.enabled
        self._broadcast = None if group is None else ResultBroadcast(group, hw, timeout_s)
        self._finisher = Finisher(
            _WHERE,
            hw,
            relay.spec,
            draft_extend=draft_extend,
            move_kv=move_kv,
            page_size=page_size,
            threshold_single=threshold_single,
            threshold_acc=threshold_acc,
            processor=processor,
            broadcast=self._broadcast,
        )
        self._turns = Turns(_WHERE, relay)

    def __repr__(self) -> str:
        state = f"plan stream {'on' if self.plan_stream_active else 'off'}"
        return f"<hwcore EagleVerifyWorker, {'closed' if self._turns.closed else state}>"

    def __enter__(self) -> EagleVerifyWorker:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    @property
    def host_syncs(self) -> int:
        """How often the host has waited for the device on the group's account."""
        return 0 if self._broadcast is None else self._broadcast.host_syncs

    # --- A step ---------------------------------------------------------------------------------

    def can_run(self, batch: VerifyBatch) -> Verdict:
        """Say whether a graph runs the forward of a batch, and if not, why.

        The runner's reasons (``"not captured"``, ``"tokens per request"``, ``"batch size"``), and
        ``"no runner"``, ``"inputs"``, which a slot of the graph lacks, and ``"processor"``, which
        runs on the host. An idle batch is one of no requests: any graph of its width takes it.
        """
        self._turns.check_open("can_run")
        check_batch(f"{_WHERE}.can_run", batch, self._device)
        return self._verdict(batch)

    def mark(self, batch: VerifyBatch) -> None:
        """Let the plan stream read a batch as soon as what is submitted now has run.

        Called on the main stream, as soon as the batch is drafted. ``prepare`` takes this batch
        then, and waits for nothing that the main stream is given in between. Marking another takes
        the place of a mark that nobody prepared.

        Raises
        ------
        ArgumentTypeError, ArgumentValueError
            If the batch is not of its form; or a prepared one was not verified.
        ClosedError
        """
        self._turns.check_free("mark")
        with self._turns.putting_back(batch):
            self._mark(batch, "mark")

    def prepare(self, batch: VerifyBatch) -> PreparedBatch:
        """Make a batch's inputs, on the plan stream; the host does not wait.

        Called on the main stream. A batch that was not marked is marked here.

        Raises
        ------
        ArgumentTypeError, ArgumentValueError
            If the batch is not of its form, its tree is none (see ``build_tree``), there is no room
            for it, or an input does not fit its slot. If another batch was marked, or the last one
            was not verified.
        ClosedError, CaptureError
        """
        turns = self._turns
        turns.check_free("prepare")
        turns.check_marked("prepare", batch)
        with turns.putting_back(batch):
            if turns.marked is None:
                self._mark(batch, "prepare")
            prepared = PreparedBatch(batch, self._verdict(batch), turns.vacated)
            turns.marked = None
            self._planner.prepare(prepared)
            turns.pending = prepared
            return prepared

    def verify(self, prepared: PreparedBatch) -> VerifyStep | None:
        """Run a prepared batch on the current stream; the host does not wait.

        Returns
        -------
        VerifyStep or None
            None of an idle batch, of which nothing is left.

        Raises
        ------
        ArgumentValueError
            If it is not the batch that was prepared last, or was verified.
        CapabilityError
            If the backend wants an input recomputed and nobody said how.
        PeerError
            If a tensor-parallel rank is gone.
        Exception
            Whatever ``forward``, ``processor``, ``move_kv`` or ``draft_extend`` raises. If the last
            does, the lengths are published and the rows empty: vacate them, and prefill their
            requests again.
        """
        batch = self._turns.take("verify", prepared).batch
        with torch.no_grad():
            with self._turns.putting_back(batch, prepared.vacated):
                with self.fence.reading():
                    inputs = self._planner.join(batch)
                    rows = self._without_vacated(inputs, prepared)
                    out = self._run_forward(inputs)
                if batch.is_empty:
                    return None
                step = self._finisher.finish(batch, inputs, rows, out)
                self._relay.publish(rows, step.commit.new_seq_lens)
            self._relay.stash(rows, self._finisher.payload(step))
        return step

    def run(self, batch: VerifyBatch) -> VerifyStep | None:
        """Prepare and verify a batch."""
        return self.verify(self.prepare(batch))

    def vacate(self, rows: Sequence[int]) -> None:
        """Take rows of finished or retracted requests out of the map, and out of what is under way.

        Called on the main stream, before the rows or their KV slots are given to others. What was
        verified before is not touched: it was submitted, and belongs to the old request.

        Parameters
        ----------
        rows : sequence of int
            As the host knows them; none twice.

        Raises
        ------
        ArgumentTypeError, ArgumentValueError
            If one is no row of the map.
        ClosedError
        """
        self._turns.check_open("vacate")
        pool_size = self._relay.spec.pool_size
        where, fix = f"{_WHERE}.vacate", "Pass rows of the request pool"
        if not isinstance(rows, collections.abc.Sequence):
            raise ArgumentTypeError(describe(where, "rows", rows, "a list of ints", fix))
        if len(set(rows)) != len(rows):
            raise ArgumentValueError(describe(where, "rows", rows, "none twice", fix))
        for row in rows:
            if type(row) is not int or not 0 < row < pool_size:
                expected = f"ints in [1, {pool_size})"
                raise ArgumentValueError(describe(where, "rows", rows, expected, fix))
        if rows:
            # Made there: nothing is copied from the host, which would have to keep it.
            parts = [torch.full((1,), row, device=self._device) for row in rows]
            self._relay.discard(torch.cat(parts))
            self._turns.vacated.extend(rows)

    def abandon(self, prepared: PreparedBatch) -> None:
        """Give a prepared batch up: its rows are as they were before they were resolved."""
        batch = self._turns.take("abandon", prepared).batch
        # Where nobody says how to compute an input again, there is none to use either.
        with contextlib.suppress(CapabilityError), self.fence.reading():
            self._planner.join(batch)
        self._turns.put_back(batch, prepared.vacated)

    def close(self) -> None:
        """Abandon what is prepared and let go of everything. Once is enough.

        Runner, relay, pools and group belong to whoever made them.
        """
        if not self._turns.closed:
            if self._turns.pending is not None:
                self.abandon(self._turns.pending)
            self._turns.closed, self._turns.marked = True, None
            del self._forward, self._runner, self._planner, self._finisher

    # --- Parts ----------------------------------------------------------------------------------

    def _verdict(self, batch: VerifyBatch) -> Verdict:
        why_not = self._finisher.why_not_captured
        if why_not and not batch.is_empty:
            return Verdict(None, "processor", why_not)
        return self._planner.can_replay(batch)

    def _mark(self, batch: VerifyBatch, method: str) -> None:
        check_batch(f"{_WHERE}.{method}", batch, self._device)
        self._planner.plan.mark()
        self._turns.marked, self._turns.vacated = batch, []

    def _without_vacated(self, inputs: Inputs, prepared: PreparedBatch) -> Tensor:
        """Take the rows that were given back out of the inputs; return the rows that are left."""
        rows, batch = inputs.by_name["rows"], prepared.batch
        gone = are_in(rows, prepared.vacated)
        if gone is None:
            return rows
        rows = rows.masked_fill(gone, _PADDING)
        inputs.replace("rows", rows)
        if "cache_locs" in inputs.by_name:
            locs = inputs.by_name["cache_locs"]
            inputs.replace("cache_locs", self._planner.redirected(locs, batch, gone))
        return rows

    def _run_forward(self, inputs: Inputs) -> Any:
        if inputs.graph is not None:
            assert self._runner is not None  # it prepared the batch
            slots = self._runner.buffers.slots
            renewed = {name: t for name, t in inputs.renewed.items() if name in slots}
            return self._runner.replay(inputs.graph, renewed)
        given = inputs.by_name.items()
        return self._forward(**{name: t for name, t in given if self._takes(name)})

    def _takes(self, name: str) -> bool:
        return self._names is None or name in self._names
