"""A language model of a few lines, whose KV pool holds which tokens it was written.

The logits after a text are a hash of every (token, position) of it, read back from the pool: a KV
entry at a wrong slot, a wrong length or mask, gives other logits. The hash is a sum, so that a
draft can carry it on; ``logits_after`` says the same in plain Python.
"""

from __future__ import annotations

import math
import random

import torch

from hwcore.graphs import GraphRunner
from hwcore.overlap import FutureMap, RelayPayload, RelaySpec
from hwcore.speculative import EagleVerifyWorker, SamplingParams, VerifyBatch, verify_slots

VOCAB = 11
CONTEXT = 64
_M = 65537
TREES = {
    0: ([-1], 0),
    1: ([-1, 0, 1, 2], 3),
    3: ([-1, 0, 0, 0, 1, 1, 2, 4], 3),
}  # topk: parents, spec_steps


def entry(token, position):
    """What a text's token adds to its hash; numbers or tensors."""
    return ((token * 31 + 7) * (position * 17 + 3) * 2654435 + token * 977) % _M


def spread(hashed, token):
    """The logit of a token, in units of 1/_M * SCALE; numbers or tensors."""
    return (hashed % _M * (2 * token + 1) * 40503 + token * token * 12345 + 77) % _M


SCALE = 3.0


def greedy_answer(prompt, count):
    """What decoding one token at a time gives, in plain Python."""
    text = list(prompt)
    for _ in range(count):
        hashed = sum(entry(token, at) for at, token in enumerate(text)) % _M
        logits = [spread(hashed, token) for token in range(VOCAB)]
        text.append(logits.index(max(logits)))
    return text[len(prompt) :]


def probabilities(text, temperature=1.0):
    """The distribution of the token after a text, in plain Python."""
    hashed = sum(entry(token, at) for at, token in enumerate(text)) % _M
    weights = [math.exp(spread(hashed, token) * SCALE / _M / temperature) for token in range(VOCAB)]
    return [weight / sum(weights) for weight in weights]


class ToyModel:
    """Slot 0 and row 0 belong to nobody."""

    def __init__(self, device, num_slots, num_rows):
        self.kv = torch.full((num_slots, 2), 5, device=device)
        self.table = torch.zeros(num_rows, CONTEXT, dtype=torch.int64, device=device)
        self.vocab = torch.arange(VOCAB, device=device)
        self.places = torch.arange(CONTEXT, device=device)

    def prefix(self, rows, seq_lens):
        """Return the hash of each row's text, ``[bs]``."""
        slots = self.table.index_select(0, rows)
        held = self.kv.index_select(0, slots.view(-1)).view(*slots.shape, 2)
        inside = self.places < seq_lens.unsqueeze(1)
        return (entry(held[..., 0], held[..., 1]) * inside).sum(1) % _M

    def forward(self, draft_tokens, positions, tree_mask, cache_locs, seq_lens, rows):
        written = torch.stack((draft_tokens, positions.view_as(draft_tokens)), -1)
        self.kv.index_copy_(0, cache_locs.view(-1), written.view(-1, 2))
        held = self.kv.index_select(0, cache_locs.view(-1)).view(*cache_locs.shape, 2)
        own = entry(held[..., 0], held[..., 1]).unsqueeze(1) * tree_mask  # [bs, N, N]
        hashed = self.prefix(rows, seq_lens).unsqueeze(1) + own.sum(-1)
        return self.logits(hashed)

    def logits(self, hashed):
        return spread(hashed.unsqueeze(-1), self.vocab).to(torch.float32) * (SCALE / _M)

    def move(self, src, dst):
        self.kv.index_copy_(0, dst, self.kv.index_select(0, src))

    def draft(self, rows, seq_lens, roots, parents):
        """Return draft tokens ``[bs, N]``: of ``k`` siblings one is right, ``k`` times in k + 1."""
        hashed = [self.prefix(rows, seq_lens) + entry(roots, seq_lens)]
        tokens, depth = [roots], [0]
        for node, parent in enumerate(parents[1:], 1):
            siblings = [n for n, p in enumerate(parents) if p == parent]
            right = self.logits(hashed[parent]).argmax(-1)
            lucky = hashed[parent] % _M % (len(siblings) + 1) == siblings.index(node)
            wrong = (right + 1 + siblings.index(node)) % VOCAB
            tokens.append(torch.where(lucky, right, wrong))
            depth.append(depth[parent] + 1)
            hashed.append(hashed[parent] + entry(tokens[-1], seq_lens + depth[-1]))
        return torch.stack(tokens, 1)


class Request:
    def __init__(self, prompt, count, arrival=0, temperature=0.0, seed=0):
        self.prompt, self.count, self.arrival = prompt, count, arrival
        self.temperature, self.seed = temperature, seed
        self.tokens = []
        self.row, self.pages, self.in_flight = 0, [], 0

    @property
    def done(self):
        return len(self.tokens) >= self.count


class ToyEngine:
    """Continuous batching, a step ahead of the host, with a seeded scheduler that is unkind.

    Between ``prepare`` and ``verify`` it may look at the last step's tokens, take rows from those
    who have ended, retract others, and give rows and slots to the next at once.
    """

    def __init__(
        self,
        hw,
        *,
        topk=1,
        page_size=1,
        plan_stream=None,
        graphs=False,
        rows=3,
        pages=None,
        seed=0,
        debug=True,
        **options,
    ):
        self.hw, self.device, self.page_size = hw, hw.device(), page_size
        self.parents, steps = TREES[topk]
        self.n, self.width = len(self.parents), steps + 1
        self.rng = random.Random(seed)
        pages = pages or rows * CONTEXT // page_size
        self.free_pages = list(range(1, pages + 1))
        self.rng.shuffle(self.free_pages)
        self.free_rows = list(range(rows, 0, -1))
        self.model = ToyModel(self.device, (pages + 1) * page_size, rows + 1)
        self.relay = FutureMap(RelaySpec(pool_size=rows + 1), backend=hw, debug=debug)
        self.runner = None
        forward = self.model.forward
        if graphs:
            buckets = [(size, self.n) for size in (1, 2, rows)]
            static = {"kv": self.model.kv, "table": self.model.table}
            self.runner = GraphRunner(
                forward, verify_slots(forward), buckets, backend=hw, static=static
            )
            self.runner.capture()
        self.worker = EagleVerifyWorker(
            forward,
            self.relay,
            runner=self.runner,
            move_kv=self.model.move if topk > 1 else None,
            req_to_token=self.model.table,
            spec_steps=steps,
            page_size=page_size,
            num_slots=(pages + 1) * page_size,
            plan_stream=plan_stream,
            backend=hw,
            **options,
        )
        self.staged = []
        self.tree = self.upload([self.parents])
        self.now, self.prepared, self.in_flight = 0, [], None
        self.waiting, self.running = [], []
        self.seen = {"vacated": 0, "retracted": 0, "replayed": 0, "accepted": 0, "steps": 0}

    def upload(self, values):
        staged = self.hw.pin_memory(torch.tensor(values, dtype=torch.int64))
        self.staged.append(staged)  # until the end, for tests are short
        return staged.to(self.device, non_blocking=True)

    def run(self, requests):
        self.waiting = list(requests)
        while self.waiting or self.running or self.in_flight:
            self.step()
            assert self.now < 40 * len(requests), "the toy's scheduler is stuck"
        self.worker.close()
        self.relay.close()  # while debugging: raises what it found
        if self.runner is not None:
            self.runner.close()
        return [request.tokens for request in requests]

    def step(self):
        self.admit()
        batch = self.schedule()
        prepared = sent = None
        if batch is not None:
            self.worker.mark(batch)
            self.model.vocab + 1  # something that the main stream does meanwhile
            prepared = self.worker.prepare(batch)
        mid = self.rng.random() < 0.5
        if mid:
            self.turn_to_the_last_step()
        if prepared is not None:
            step = self.worker.verify(prepared)
            self.seen["replayed"] += step.replayed
            self.seen["steps"] += 1
            sent = self.send(step)
            self.prepared = []
        if not mid:
            self.turn_to_the_last_step()
        self.in_flight = sent
        self.now += 1

    def turn_to_the_last_step(self):
        self.collect()
        self.retract()
        self.admit()

    def admit(self):
        while self.free_rows:
            ready = [r for r in self.waiting if r.arrival <= self.now and not r.in_flight]
            if not ready:
                return
            request = ready[0]
            text = request.prompt + request.tokens
            if len(text) + 3 * self.n > len(self.free_pages) * self.page_size:
                return
            self.waiting.remove(request)
            request.row, request.pages = self.free_rows.pop(), []
            self.reach(request, len(text) + self.n)
            slots = self.slots(request)[: len(text) - 1]
            entries = [[token, at] for at, token in enumerate(text[:-1])]
            self.model.kv.index_copy_(0, self.upload(slots), self.upload(entries))
            row = self.upload([request.row])
            self.relay.publish(row, self.upload([len(text) - 1]))
            self.relay.stash(row, RelayPayload(self.upload([text[-1]])))
            self.running.append(request)

    def slots(self, request):
        size = self.page_size
        return [page * size + i for page in request.pages for i in range(size)]

    def reach(self, request, count):
        """Take pages for ``count`` places, and write them into the table."""
        first = len(request.pages) * self.page_size
        while len(request.pages) * self.page_size < count:
            request.pages.append(self.free_pages.pop())
        new = self.slots(request)[first:]
        if new:
            with self.worker.fence.writing():
                places = self.upload(list(range(first, first + len(new))))
                self.model.table[request.row].index_copy_(0, places, self.upload(new))

    def schedule(self):
        batch, bounds = [], []
        for request in self.running:
            if len(request.tokens) + request.in_flight >= request.count:
                continue
            bound = len(request.prompt) + len(request.tokens) - 1 + request.in_flight * self.width
            if bound + self.n > (len(request.pages) + len(self.free_pages)) * self.page_size:
                continue
            self.reach(request, bound + self.n)
            batch.append(request)
            bounds.append(bound)
            request.in_flight += 1
        self.prepared = batch
        if not batch:
            return None
        rows = self.upload([request.row for request in batch])
        lens = self.relay.resolve_seq_lens(rows)
        relayed = self.relay.resolve(rows)
        tokens = self.model.draft(rows, lens, relayed.next_token, self.parents)
        more = {}
        if any(request.temperature for request in batch):
            heat = [request.temperature for request in batch]
            more["sampling"] = SamplingParams.of(heat, device=self.device)
            more["seeds"] = self.upload([request.seed for request in batch])
        tree = self.tree.expand(len(batch), -1)
        return VerifyBatch(rows, tokens, tree, lens, tuple(bounds), relayed=relayed, **more)

    def send(self, step):
        """Copy a step's tokens to the host, whom it does not keep waiting."""
        emitted = step.commit.accept_tokens
        tokens = self.hw.pin_memory(torch.zeros(emitted.shape, dtype=torch.int64))
        tokens.copy_(emitted, non_blocking=True)
        arrived = self.hw.create_event()
        self.hw.record_event(arrived)
        return tokens, arrived, self.prepared

    def collect(self):
        if self.in_flight is None:
            return
        (tokens, arrived, owners), self.in_flight = self.in_flight, None
        self.hw.synchronize_event(arrived)
        for request, row in zip(owners, tokens.tolist(), strict=True):
            if request is None:
                continue
            request.in_flight -= 1
            if request.done:
                continue
            new = [token for token in row if token >= 0]
            self.seen["accepted"] += len(new) - 1
            request.tokens = (request.tokens + new)[: request.count]
            if request.done and request.row:
                self.leave(request)
            elif request.done:
                self.waiting.remove(request)

    def leave(self, request):
        self.worker.vacate([request.row])
        self.running.remove(request)
        if request in self.prepared:  # it gets nothing of that step
            self.prepared[self.prepared.index(request)] = None
            request.in_flight -= 1
            self.seen["vacated"] += 1
        self.free_rows.append(request.row)
        self.free_pages += reversed(request.pages)
        request.row, request.pages = 0, []

    def retract(self):
        if self.running and self.rng.random() < 0.3:
            request = self.rng.choice(self.running)
            self.leave(request)
            self.waiting.insert(0, request)
            self.seen["retracted"] += 1


def requests(count=6, seed=1, longest=12, temperatures=(0.0,)):
    rng = random.Random(seed)
    prompts = [[rng.randrange(VOCAB) for _ in range(rng.randrange(2, 9))] for _ in range(count)]
    return [
        Request(prompt, rng.randrange(3, longest), i, temperatures[i % len(temperatures)], 100 + i)
        for i, prompt in enumerate(prompts)
    ]
