"""What a step does on the device, from the host's lists to tokens on their way to the host."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

import hwcore
from examples.serving.step import root_only
from hwcore.graphs import BATCH, GraphRunner, Slot
from hwcore.overlap import FutureMap, PlanStream, RelaySpec
from hwcore.speculative import (
    EagleVerifyWorker,
    SamplingParams,
    VerifyBatch,
    verify_sampling,
    verify_slots,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from examples.serving.drafting import Drafting
    from examples.serving.kv_pool import KVPool
    from examples.serving.llama import Llama
    from examples.serving.request import Batch
    from hwcore.overlap import RelayPayload
    from hwcore.speculative import VerifyStep
    from hwcore.types import Event


@dataclass
class Step:
    """A submitted step; its tokens, -1 past the last, are here once ``arrived`` is reached."""

    batch: Batch
    tokens: Tensor
    arrived: Event
    staged: list[Tensor]


@dataclass
class _Prepared:
    """A batch on the device. All int64 but the temperatures; the last three are of a prefill."""

    rows: Tensor  # [bs]; 0 is padding
    slots: Tensor  # [bs, max_context]
    sampling: SamplingParams
    seeds: Tensor  # [bs]
    text: Tensor  # [1, chunk + 1]: the chunk, and the token after it
    start: Tensor  # [1]
    count: Tensor  # [1]


class Worker:
    """Runs steps, each on what the last one left on the device; the host waits for nothing.

    ``prepare`` brings what the host decided to the device, on the plan stream, while the last step
    may still run. ``submit`` takes newest tokens and lengths from the
    :class:`~hwcore.overlap.FutureMap`, and drafts; an
    :class:`~hwcore.speculative.EagleVerifyWorker` runs the model over the drafts, verifies, and
    leaves tokens and lengths in the map for the next step. Plain decoding is the same with trees
    of one node.

    Parameters
    ----------
    llama : Llama
    pool : KVPool
    drafting : Drafting
    buckets : sequence of int
        Batch sizes, ascending.
    chunk : int
    plan_stream : bool
        False: steps are not prepared on a side stream, whatever the backend and its user say.
    graphs : bool
    """

    def __init__(
        self,
        llama: Llama,
        pool: KVPool,
        drafting: Drafting,
        buckets: Sequence[int],
        chunk: int,
        plan_stream: bool,
        graphs: bool,
    ) -> None:
        self._llama, self._pool, self._device = llama, pool, llama.device
        self._drafting, self._buckets, self._chunk = drafting, buckets, chunk
        self._hw = hwcore.current_backend()
        self._plan = PlanStream(backend=self._hw, enabled=None if plan_stream else False)
        spec = RelaySpec(pool_size=pool.num_rows, **drafting.relay)
        self._relay = FutureMap(spec, backend=self._hw)
        self._graphs = self._capture() if graphs else None
        self._verifier = EagleVerifyWorker(
            self._target,
            self._relay,
            runner=self._graphs,
            draft_extend=self._draft_extend,
            move_kv=pool.move if drafting.branches else None,
            spec_steps=drafting.spec_steps,
            num_slots=pool.num_slots,
            plan_stream=False,  # between drafting and verifying the main stream has nothing to do
            backend=self._hw,
        )
        self._slots: Tensor | None = None  # of the step that is being submitted
        # Two, for at most two steps are in flight.
        empty = torch.full((buckets[-1], drafting.spec_steps + 1), -1)
        self._arrivals = [self._hw.pin_memory(empty.clone()) for _ in range(2)]
        self._staged: list[Tensor] = []
        self.gather_s = 0.0

    def prepare(self, batch: Batch) -> _Prepared:
        """Bring a batch to the device: rows, slots, coins, and of a prefill the chunk."""
        size = len(batch.requests)
        if not batch.chunk:
            size = next(bucket for bucket in self._buckets if bucket >= size)
        padding = [0] * (size - len(batch.requests))
        chunk = batch.chunk + batch.following
        with self._plan.block() as outputs:
            rows, seeds, start, count, text, *places = self._upload(
                [request.row for request in batch.requests] + padding,
                [request.seed for request in batch.requests] + padding,
                [batch.start],
                [len(batch.chunk)],
                chunk + [0] * (self._chunk + 1 - len(chunk)),
                *([new[part] for new in batch.new_slots] for part in range(3)),
            )
            # Only this stream touches the table, so that nothing else need wait for it.
            self._pool.table.index_put_((places[0], places[1]), places[2])
            slots = self._pool.table.index_select(0, rows)
            heat = [request.temperature for request in batch.requests] + [0.0] * len(padding)
            temperatures = self._stage(torch.tensor(heat))
            outputs.update(rows=rows, slots=slots, seeds=seeds, temperatures=temperatures)
            outputs.update(text=text.unsqueeze(0), start=start, count=count)
        there = self._plan.join().outputs
        sampling = SamplingParams(there.pop("temperatures"), all_greedy=not any(heat))
        return _Prepared(sampling=sampling, **there)

    def submit(self, batch: Batch, prepared: _Prepared) -> Step:
        """Run a prepared batch, and send its tokens to the host."""
        self._plan.mark()  # what comes from here on, the next step's plan need not wait for
        if batch.chunk:
            emitted = self._prefill(prepared, batch.emits)
        else:
            # Entries at most, if each step in flight emits what it can.
            bounds = [len(request.slots) - self._drafting.reach for request in batch.requests]
            emitted = self._decode(prepared, bounds)
        tokens = self._arrivals[0][: len(emitted), : emitted.shape[1]]
        self._arrivals.reverse()
        tokens.copy_(emitted, non_blocking=True)
        arrived = self._hw.create_event(self._device)
        self._hw.record_event(arrived)
        # What is copied from must live until it has been: until this step is collected.
        staged, self._staged = self._staged, []
        return Step(batch, tokens, arrived, staged)

    def _prefill(self, prepared: _Prepared, emits: bool) -> Tensor:
        """Bring a chunk of one text into the cache; return the token after it, ``[1, 1]``."""
        start, count, slots = prepared.start, prepared.count, prepared.slots
        chunk, text = prepared.text[:, :-1], prepared.text
        logits, features = self._llama.forward_features(
            self._pool.kv, chunk, start, slots, count, last=True, taps=self._drafting.taps
        )
        token = self._after(
            chunk.gather(1, count.unsqueeze(1) - 1), start + count - 1, logits, prepared
        )
        if emits:
            text = text.scatter(1, count.unsqueeze(1), token)
        payload = self._drafting.prefill(prepared.rows, start, text, count, features, slots)
        if emits:
            self._relay.publish(prepared.rows, start + count)
            self._relay.stash(prepared.rows, payload)
        return token

    def _after(self, newest: Tensor, lens: Tensor, logits: Tensor, prepared: _Prepared) -> Tensor:
        """Choose the token after a text, ``[1, 1]``: by a tree that is nothing but its root."""
        result = verify_sampling(
            root_only(newest, lens), logits, prepared.sampling, seeds=prepared.seeds
        )
        return result.bonus_tokens.unsqueeze(1)

    def _decode(self, prepared: _Prepared, bounds: list[int]) -> Tensor:
        """Decode at least a token for each row; return them, ``[bs, n]``, -1 past the last."""
        rows, slots = prepared.rows, prepared.slots
        lens = self._relay.resolve_seq_lens(rows)
        began = time.perf_counter()
        relayed = self._relay.resolve(rows)
        self.gather_s += time.perf_counter() - began
        nodes, parents = self._drafting.draft(rows, lens, relayed, slots)
        places = lens.unsqueeze(1) + torch.arange(nodes.shape[1], device=self._device)
        self._slots = slots
        step = self._verifier.run(
            VerifyBatch(
                rows,
                nodes,
                parents,
                lens,
                tuple(bounds) + (1,) * (len(rows) - len(bounds)),
                cache_locs=slots.gather(1, places),
                sampling=None if prepared.sampling.all_greedy else prepared.sampling,
                seeds=prepared.seeds,
                relayed=relayed,
                extra={"slots": slots},
            )
        )
        assert step is not None  # the batch is not empty
        return step.commit.accept_tokens

    def _target(
        self,
        draft_tokens: Tensor,
        positions: Tensor,
        tree_mask: Tensor,
        cache_locs: Tensor,
        seq_lens: Tensor,
        slots: Tensor,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the model's logits at each node, and what the drafting wants to see of it."""
        logits, features = self._llama.forward_features(
            self._pool.kv,
            draft_tokens,
            seq_lens,
            slots,
            positions=positions.view_as(draft_tokens),
            tree_mask=tree_mask,
            write=cache_locs,
            taps=self._drafting.taps,
        )
        return (logits, features) if self._drafting.taps else logits

    def _draft_extend(self, step: VerifyStep) -> RelayPayload:
        assert self._slots is not None  # `_decode` has set them
        return self._drafting.extend(step, self._slots)

    def _capture(self) -> GraphRunner:
        """Capture ``_target`` for every bucket."""
        extra = {"slots": Slot(torch.int64, (BATCH, self._pool.max_context))}
        slots = verify_slots(self._target, extra=extra)
        buckets = [(size, self._drafting.width) for size in self._buckets]
        static: dict[str, Any] = {"kv": self._pool.kv}
        runner = GraphRunner(self._target, slots, buckets, backend=self._hw, static=static)
        runner.capture()
        return runner

    # --- From the host to the device ---

    def _upload(self, *parts: Sequence[int]) -> list[Tensor]:
        """Copy lists of numbers to the device, all in one copy that the host does not wait for."""
        values = [number for part in parts for number in part]
        there = self._stage(torch.tensor(values, dtype=torch.int64))
        return list(there.split_with_sizes([len(part) for part in parts]))

    def _stage(self, values: Tensor) -> Tensor:
        staged = self._hw.pin_memory(values)
        self._staged.append(staged)
        return staged.to(self._device, non_blocking=True)

    def forget(self, rows: Sequence[int]) -> None:
        """Empty what the relay holds for rows that were given back; before they are taken again."""
        self._verifier.vacate(rows)

    def close(self) -> None:
        """Release graphs and relay; raises what the relay found wrong, while debugging."""
        self._verifier.close()
        if self._graphs is not None:
            self._graphs.close()
        self._relay.close()
