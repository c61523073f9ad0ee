"""The engine: schedule a step, submit it, and only then look at the tokens of the one before."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

import hwcore
from examples.serving.drafting import NO_DRAFTS
from examples.serving.kv_pool import KVPool
from examples.serving.scheduler import Scheduler
from examples.serving.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from examples.serving.drafting import Drafting
    from examples.serving.llama import Llama
    from examples.serving.request import Request
    from examples.serving.worker import Step


@dataclass
class Timing:
    """What a run took.

    Attributes
    ----------
    steps : int
        That were submitted.
    total_s : float
    gap_s : float
        Host time between the submissions of two steps, without the wait for tokens: what a device
        stands idle where nothing else is in flight.
    gather_s : float
        Host time in ``FutureMap.resolve``.
    tokens : int
        In all answers.
    decoded, decodes : int
        Tokens that decode steps emitted, and for how many requests, summed over the steps.
    """

    steps: int = 0
    total_s: float = 0.0
    gap_s: float = 0.0
    gather_s: float = 0.0
    tokens: int = 0
    decoded: int = 0
    decodes: int = 0


class Engine:
    """Continuous batching on the selected backend.

    Requests come when they come, run side by side, lose their memory to older ones when the pool
    is full, and leave. With overlap the host is a step ahead: while a step runs it turns to the
    tokens of the step before, and to who runs next. What a step needs of the last one stays on
    the device (:class:`~examples.serving.worker.Worker`).

    Parameters
    ----------
    llama : Llama
    num_slots : int
        Entries that the KV pool holds, the padding slot included.
    max_context : int
        Entries that a request may have; every step looks at so many.
    buckets : sequence of int
        Batch sizes that are run; smaller batches are padded. The largest is the limit.
    drafting : callable
        Makes what drafts, from the :class:`~examples.serving.kv_pool.KVPool`; default: nothing
        does, and each step decodes one token.
    chunk : int
        Tokens of a prefill step.
    overlap : bool
        Submit a step before the tokens of the last one are on the host. Off: look at them first.
    graphs : bool
        Replay captured graphs of the model's forward over the trees.

    Raises
    ------
    ValueError
        If the model, or a draft head, is not prepared for so many positions.
    """

    def __init__(
        self,
        llama: Llama,
        num_slots: int,
        max_context: int,
        *,
        buckets: Sequence[int] = (8,),
        drafting: Callable[[KVPool], Drafting] = NO_DRAFTS,
        chunk: int = 64,
        overlap: bool = True,
        graphs: bool = False,
    ) -> None:
        if max_context > llama.max_context:
            message = (
                f"Engine: max_context is {max_context}; expected at most the {llama.max_context} "
                "positions that the Llama is prepared for. Lower it, or make the Llama with more."
            )
            raise ValueError(message)
        self.overlap, self.timing = overlap, Timing()
        self.pool = KVPool(llama, num_slots, max(buckets) + 1, max_context)
        drafts = drafting(self.pool)
        self.scheduler = Scheduler(self.pool, drafts.spec_steps + 1, drafts.reach, chunk)
        self.worker = Worker(llama, self.pool, drafts, sorted(buckets), chunk, overlap, graphs)
        self._hw = hwcore.current_backend()
        self._in_flight: Step | None = None
        self._now = 0  # in steps, those without a batch included: the clock of arrivals
        self._submitted_s = 0.0  # end of the last submission, put off by what was waited since

    def run(self, requests: Sequence[Request]) -> None:
        """Answer requests: each is there from its arrival on, and its ``tokens`` are the answer."""
        for request in requests:
            self.scheduler.add(request)
        began = time.perf_counter()
        while self.scheduler.busy or self._in_flight is not None:
            self.step()
        self.timing.total_s += time.perf_counter() - began
        self.timing.gather_s = self.worker.gather_s
        self.timing.tokens += sum(len(request.tokens) for request in requests)

    @torch.inference_mode()
    def step(self) -> None:
        """Schedule and submit a step; collect the tokens of the one before, or without overlap its.

        Host sync: where :meth:`_collect` says so, and nowhere else.
        """
        batch = self.scheduler.schedule(self._now)
        self._now += 1
        self.worker.forget(self.scheduler.vacated())
        step = None
        if batch is not None:
            prepared = self.worker.prepare(batch)
            began = time.perf_counter()
            self.timing.gap_s += began - self._submitted_s if self._submitted_s else 0.0
            step = self.worker.submit(batch, prepared)
            self.timing.steps += 1
            self._submitted_s = time.perf_counter()
        if self.overlap:
            step, self._in_flight = self._in_flight, step
        if step is not None:
            self._collect(step)

    def _collect(self, step: Step) -> None:
        """Wait for a step's tokens, the one wait of the host, and give them to its requests."""
        began = time.perf_counter()
        self._hw.synchronize_event(step.arrived)
        self._submitted_s += time.perf_counter() - began
        if not step.batch.emits:
            return
        for request, row in zip(step.batch.requests, step.tokens.tolist(), strict=False):
            tokens = [token for token in row if token >= 0]
            request.in_flight -= 1
            if not step.batch.chunk:
                self.timing.decodes += 1
                self.timing.decoded += len(tokens)
            if request.finished:
                continue  # it had ended when this step was submitted, and nobody knew
            request.take(tokens)
            if request.finished:
                self.scheduler.finish(request)

    def close(self) -> None:
        """Release what the worker holds; raises what the relay found wrong, while debugging."""
        self.worker.forget(self.scheduler.vacated())
        self.worker.close()
