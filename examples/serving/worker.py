"""What a step does on the device, from the host's lists to tokens on their way to the host."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

import hwcore
from examples.serving.drafting import PromptLookup
from hwcore.graphs import BATCH, TOKENS_PER_REQUEST, GraphRunner, Slot
from hwcore.overlap import FutureMap, PlanStream, RelayPayload, RelaySpec
from hwcore.speculative import TreeMaskMode, build_tree, commit, verify_greedy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from examples.serving.kv_pool import KVPool
    from examples.serving.llama import Llama
    from examples.serving.request import Batch
    from hwcore.types import Event


@dataclass
class Step:
    """A submitted step; its tokens, -1 past the last, are here once ``arrived`` is reached."""

    batch: Batch
    tokens: Tensor
    arrived: Event
    staged: list[Tensor]


class Worker:
    """Runs steps, each on what the last one left on the device; the host waits for nothing.

    ``prepare`` brings what the host decided to the device, on the plan stream, while the last step
    may still run. ``submit`` takes newest tokens and lengths from the
    :class:`~hwcore.overlap.FutureMap`, drafts, runs the model, verifies, and leaves tokens and
    lengths there for the next step. The parameters are those of the engine.
    """

    def __init__(
        self,
        llama: Llama,
        pool: KVPool,
        buckets: Sequence[int],
        width: int,
        chunk: int,
        plan_stream: bool,
        graphs: bool,
    ) -> None:
        self._llama, self._pool, self._device = llama, pool, llama.device
        self._buckets, self._width, self._chunk = buckets, width, chunk
        self._hw = hwcore.current_backend()
        self._relay = FutureMap(RelaySpec(pool_size=pool.num_rows), backend=self._hw)
        self._plan = PlanStream(backend=self._hw, enabled=None if plan_stream else False)
        self._lookup = PromptLookup(pool.num_rows, pool.max_context, width, self._device)
        # Two, for at most two steps are in flight.
        empty = torch.full((buckets[-1], width), -1)
        self._arrivals = [self._hw.pin_memory(empty.clone()) for _ in range(2)]
        self._staged: list[Tensor] = []
        self._graphs = self._capture() if graphs else None
        self.gather_s = 0.0

    def prepare(self, batch: Batch) -> dict[str, Tensor]:
        """Bring a batch to the device: rows, slots, and of a prefill the chunk and its place."""
        size = len(batch.requests)
        if not batch.chunk:
            size = next(bucket for bucket in self._buckets if bucket >= size)
        padding = [0] * (size - len(batch.requests))
        with self._plan.block() as outputs:
            rows, start, count, chunk, *places = self._upload(
                [request.row for request in batch.requests] + padding,
                [batch.start],
                [len(batch.chunk)],
                batch.chunk + [0] * (self._chunk - len(batch.chunk)),
                *([new[part] for new in batch.new_slots] for part in range(3)),
            )
            # Only this stream touches the table, so that nothing else need wait for it.
            self._pool.table.index_put_((places[0], places[1]), places[2])
            slots = self._pool.table.index_select(0, rows)
            outputs.update(rows=rows, slots=slots, start=start, count=count, chunk=chunk)
        return self._plan.join().outputs

    def submit(self, batch: Batch, prepared: dict[str, Tensor]) -> Step:
        """Run a prepared batch, and send its tokens to the host."""
        self._plan.mark()  # what comes from here on, the next step's plan need not wait for
        if batch.chunk:
            emitted = self._prefill(batch.emits, **prepared)
        else:
            bounds = [len(request.slots) for request in batch.requests]
            emitted = self._decode(prepared["rows"], prepared["slots"], bounds)
        tokens = self._arrivals[0][: len(emitted), : emitted.shape[1]]
        self._arrivals.reverse()
        tokens.copy_(emitted, non_blocking=True)
        arrived = self._hw.create_event(self._device)
        self._hw.record_event(arrived)
        # What is copied from must live until it has been: until this step is collected.
        staged, self._staged = self._staged, []
        return Step(batch, tokens, arrived, staged)

    def _prefill(
        self, emits: bool, rows: Tensor, slots: Tensor, start: Tensor, count: Tensor, chunk: Tensor
    ) -> Tensor:
        """Bring a chunk of one text into the cache; return the token after it, ``[1, 1]``."""
        chunk = chunk.unsqueeze(0)
        logits = self._llama.forward(self._pool.kv, chunk, start, slots, count, last=True)
        token = logits.argmax(-1)
        self._lookup.append(rows, start, chunk)
        if emits:
            self._hand_on(rows, start + count, token[:, 0], token)
        return token

    def _decode(self, rows: Tensor, slots: Tensor, bounds: list[int]) -> Tensor:
        """Decode at least a token for each row; return them, ``[bs, width]``, -1 past the last."""
        lens = self._relay.resolve_seq_lens(rows)
        began = time.perf_counter()
        roots = self._relay.resolve(rows).next_token
        self.gather_s += time.perf_counter() - began
        nodes, parents = self._lookup.draft(rows, lens, roots)
        tree = build_tree(nodes, parents, lens, tree_mask_mode=TreeMaskMode.QLEN_ONLY)
        inputs = {
            "tokens": nodes,
            "lens": lens,
            "slots": slots,
            "positions": tree.positions.view_as(nodes),
            "tree_mask": tree.tree_mask,
        }
        if self._graphs is None:
            target = self._target(**inputs)
        else:
            padded = tuple(bounds) + (1,) * (len(rows) - len(bounds))
            target = self._graphs.run(inputs, padded, self._width)
        # The path of a chain lies at its front: no entry has to move, as a tree's would.
        result = commit(tree, verify_greedy(tree, target), lens)
        self._hand_on(rows, result.new_seq_lens, result.bonus_tokens, result.accept_tokens)
        return result.accept_tokens

    def _target(
        self, tokens: Tensor, lens: Tensor, slots: Tensor, positions: Tensor, tree_mask: Tensor
    ) -> Tensor:
        """Return the model's token after each node, int64 ``[bs, width]``."""
        kv = self._pool.kv
        logits = self._llama.forward(
            kv, tokens, lens, slots, positions=positions, tree_mask=tree_mask
        )
        return logits.argmax(-1)

    def _capture(self) -> GraphRunner:
        """Capture ``_target`` for every bucket."""
        shape = BATCH, TOKENS_PER_REQUEST
        slots = {
            "tokens": Slot(torch.int64, shape),
            "lens": Slot(torch.int64, (BATCH,)),
            "slots": Slot(torch.int64, (BATCH, self._pool.max_context)),
            "positions": Slot(torch.int64, shape),
            # Some kernels make NaN of a node that attends to nothing; the pool would keep it.
            "tree_mask": Slot(torch.bool, (*shape, TOKENS_PER_REQUEST), fill=True),
        }
        buckets = [(size, self._width) for size in self._buckets]
        static: dict[str, Any] = {"kv": self._pool.kv}
        runner = GraphRunner(self._target, slots, buckets, backend=self._hw, static=static)
        runner.capture()
        return runner

    def _hand_on(self, rows: Tensor, lens: Tensor, newest: Tensor, tokens: Tensor) -> None:
        """Leave for the next step: entries, newest token, and the text to draft from."""
        self._relay.publish(rows, lens)
        self._relay.stash(rows, RelayPayload(next_token=newest))
        # The newest token is number `lens` of the text, for it has no entry yet.
        self._lookup.append(rows, lens + 1 - (tokens >= 0).sum(1), tokens)

    # --- From the host to the device ---

    def _upload(self, *parts: Sequence[int]) -> list[Tensor]:
        """Copy lists of numbers to the device, all in one copy that the host does not wait for."""
        values = [number for part in parts for number in part]
        staged = self._hw.pin_memory(torch.tensor(values, dtype=torch.int64))
        self._staged.append(staged)
        there = staged.to(self._device, non_blocking=True)
        return list(there.split_with_sizes([len(part) for part in parts]))

    def forget(self, rows: Sequence[int]) -> None:
        """Empty what the relay holds for rows that were given back; before they are taken again."""
        if rows:
            self._relay.discard(*self._upload(rows))

    def close(self) -> None:
        """Release graphs and relay; raises what the relay found wrong, while debugging."""
        if self._graphs is not None:
            self._graphs.close()
        self._relay.close()
