"""Single verify steps: a target that says what it was given, and batches for it."""

from __future__ import annotations

import torch

import hwcore
from hwcore.graphs import GraphRunner
from hwcore.overlap import FutureMap, RelayPayload, RelaySpec
from hwcore.speculative import EagleVerifyWorker, VerifyBatch, verify_slots
from hwcore.types import PlanStreamPolicy

ROWS, CONTEXT, N = 6, 24, 3  # the pool's rows, places of a row, nodes of a chain
PARENTS = [-1, 0, 1]


class Target:
    """Decodes token + 1: says so, or with ``vocab`` by logits that are highest there.

    What it is given it leaves in memory of its own, graphs included.
    """

    def __init__(self, device, table, mrope=False, vocab=0):
        self.table, self.mrope, self.vocab, self.calls = table, mrope, vocab, 0
        self.locs = torch.full((ROWS, N + 1), -1, device=device)
        self.rows = torch.full((ROWS,), -1, device=device)
        self.tokens = torch.full((ROWS, N + 1), -1, device=device)
        self.positions = torch.full((ROWS * (N + 1),), -1, device=device)
        self.mrope_positions = torch.full((3, ROWS * (N + 1)), -1, device=device)
        self.attended = torch.full((ROWS, CONTEXT), -1, device=device)
        self.kv = torch.zeros(ROWS * CONTEXT, dtype=torch.int64, device=device)

    @property
    def forward(self):
        return self._with_mrope if self.mrope else self._plain

    def _plain(self, draft_tokens, rows, positions, cache_locs):
        self.calls += 1
        bs, n = draft_tokens.shape
        self.tokens[:bs, :n].copy_(draft_tokens)
        self.rows[:bs].copy_(rows)
        self.positions[: bs * n].copy_(positions)
        self.locs[:bs, :n].copy_(cache_locs)
        self.attended[:bs].copy_(self.table.index_select(0, rows))
        self.kv.index_copy_(0, cache_locs.view(-1), draft_tokens.view(-1))
        hidden = (draft_tokens * 10).unsqueeze(-1).to(torch.float32)
        if not self.vocab:
            return draft_tokens + 1, hidden
        likely = torch.arange(self.vocab, device=draft_tokens.device)
        return -(likely - draft_tokens.unsqueeze(-1) - 1).abs().to(torch.float32), hidden

    def _with_mrope(self, draft_tokens, rows, positions, cache_locs, mrope_positions):
        self.mrope_positions[:, : mrope_positions.shape[1]].copy_(mrope_positions)
        return self._plain(draft_tokens, rows, positions, cache_locs)


class Steps:
    """A worker on a target. Row r's place p lies at slot r * CONTEXT + p; row 0's all at slot 0."""

    def __init__(
        self, hw, *, graphs=False, mrope=False, vocab=0, buckets=((4, N),), relay=None, **options
    ):
        self.hw, self.device = hw, hw.device()
        spec = relay or RelaySpec(pool_size=ROWS)
        self.relay = FutureMap(spec, backend=hw, debug=True)
        places = torch.arange(ROWS * CONTEXT).view(ROWS, CONTEXT)
        places[0] = 0
        self.table = places.to(self.device)
        self.target = Target(self.device, self.table, mrope, vocab)
        forward = self.target.forward
        self.runner = None
        if graphs:
            slots = verify_slots(forward, mrope=mrope)
            self.runner = GraphRunner(forward, slots, buckets, backend=hw)
            self.runner.capture()
        if mrope:
            options.setdefault(
                "mrope_deltas", torch.zeros(ROWS, dtype=torch.int64, device=self.device)
            )
        self.worker = EagleVerifyWorker(
            forward, self.relay, runner=self.runner, backend=hw, req_to_token=self.table, **options
        )
        hw.synchronize()

    def on(self, values):
        """Copy numbers to the device; the host waits for nothing."""
        staged = self.hw.pin_memory(torch.tensor(values))
        self.staged = [*getattr(self, "staged", []), staged]
        return staged.to(self.device, non_blocking=True)

    def prefill(self, rows, lens, roots):
        self.relay.publish(self.on(rows), self.on(lens))
        self.relay.stash(self.on(rows), RelayPayload(self.on(roots)))

    def batch(self, rows, lens, roots=None, prefilled=True, **more):
        """Return a batch of chains, of whose two drafts the first is right."""
        roots = roots or [10 * row for row in rows]
        if prefilled:
            self.prefill(rows, lens, roots)
        there = self.on(rows)
        relayed = self.relay.resolve(there)
        root = relayed.next_token
        drafts = torch.stack((root, root + 1, root + 5), 1)
        parents = self.on([PARENTS] * len(rows))
        seq_lens = self.relay.resolve_seq_lens(there)
        more = {"relayed": relayed, **more}
        return VerifyBatch(there, drafts, parents, seq_lens, tuple(lens), **more)

    def idle(self, rows=0, **more):
        """Return a batch of nobody's rows."""
        none = torch.zeros(rows, N, dtype=torch.int64, device=self.device)
        parents = self.on([PARENTS] * rows) if rows else none
        more = {"is_idle": True, **more}
        return VerifyBatch(none[:, 0], none, parents, none[:, 0], (0,) * rows, **more)

    def held(self, rows):
        """Return what the map holds for rows, which are empty afterwards."""
        return self.relay.resolve(self.on(rows)).next_token.tolist()

    def lens(self, rows):
        return self.relay.resolve_seq_lens(self.on(rows)).tolist()

    def close(self):
        self.worker.close()
        self.relay.close()  # raises what was found
        if self.runner is not None:
            self.runner.close()


class Naming:
    """For a while, a backend whose policy names mrope positions."""

    def __init__(self, hw):
        class Wrapper:
            @hwcore.hookimpl(wrapper=True)
            def plan_stream_policy(self):
                yield
                return PlanStreamPolicy(recompute_after_join=frozenset({"mrope_positions"}))

        self.hw, self.wrapper = hw, Wrapper()

    def __enter__(self):
        self.hw.register(self.wrapper)

    def __exit__(self, *raised):
        self.hw.unregister(self.wrapper)
