"""One tensor-parallel rank: many verify steps of logits that differ a little from rank to rank.

Run as a script: rank, folder of the store, backend, JSON of options. It prints a digest of all
tokens that it committed, and how often the host waited for the group.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import sys
import time

import torch
from torch import distributed

import hwcore
from hwcore.overlap import FutureMap, RelayPayload, RelaySpec
from hwcore.speculative import EagleVerifyWorker, SamplingParams, VerifyBatch

VOCAB, ROWS, RESTART, AGAIN = 17, 4, 30, 20
PARENTS, SPEC_STEPS = [-1, 0, 0, 1, 1, 3], 3


class Rank:
    def __init__(self, hw, rank, group, options):
        self.hw, self.rank, self.group, self.options = hw, rank, group, options
        self.device = hw.device()
        self.noise = torch.Generator().manual_seed(rank)
        self.weight = torch.randn(64, VOCAB, generator=torch.Generator().manual_seed(9))
        self.weight = self.weight.to(self.device)
        self.relay = FutureMap(RelaySpec(pool_size=ROWS + 1), backend=hw, debug=True)
        self.worker = EagleVerifyWorker(
            self.forward,
            self.relay,
            spec_steps=SPEC_STEPS,
            group=group if options["broadcast"] else None,
            timeout_s=options.get("timeout_s", 30),
            backend=hw,
        )
        self.tree = torch.tensor([PARENTS], device=self.device)

    def forward(self, draft_tokens, positions):
        if self.options["layers"]:
            # As a layer does; of other sizes on other ranks it would fail or hang.
            distributed.all_reduce(torch.ones(len(draft_tokens)), group=self.group)
        state = (draft_tokens * 7 + positions.view_as(draft_tokens) * 13) % 64
        logits = self.weight.index_select(0, state.view(-1)).view(*state.shape, VOCAB)
        noise = torch.randn(VOCAB, generator=self.noise) * 0.3 * self.rank
        return logits + noise.to(self.device)

    def step(self, rows):
        lens, relayed = self.relay.resolve_seq_lens(rows), self.relay.resolve(rows)
        node = torch.arange(len(PARENTS), device=self.device)
        state = (relayed.next_token * 7 + lens * 13) % 64
        likely = self.weight.index_select(0, state).topk(2).indices  # the children of the root
        drafts = (relayed.next_token.unsqueeze(1) + node) % VOCAB
        drafts = torch.cat((drafts[:, :1], likely, drafts[:, 3:]), 1)
        more = {}
        if self.options["sampling"]:
            params = SamplingParams.of([1.0] * len(rows), device=self.device)
            more = {"sampling": params, "seeds": rows * 1000}
        parents = self.tree.expand(len(rows), -1)
        bounds = (1,) * len(rows)
        return self.worker.run(
            VerifyBatch(rows, drafts, parents, lens, bounds, relayed=relayed, **more)
        )

    def run(self):
        digest, emitted, committed = hashlib.sha256(), 0, []
        active = list(range(1, ROWS + 1))
        self.begin(active)
        for step in range(self.options["steps"]):
            if self.rank == 0 and step == self.options.get("dies_at"):
                os._exit(7)
            if self.rank == 0 and step == self.options.get("hangs_at"):
                time.sleep(1000)
            done = self.step(torch.tensor(active, device=self.device))
            committed.append(done.commit.accept_tokens)
            if step % AGAIN == AGAIN - 1:
                tokens = torch.cat(committed).tolist()
                committed.clear()
                emitted += sum(token >= 0 for row in tokens for token in row)
                digest.update(repr(tokens).encode())
                # Who leaves depends on lengths: ranks that disagree go on with other batches.
                every = torch.arange(1, ROWS + 1, device=self.device)
                lens = self.relay.resolve_seq_lens(every, to_cpu=True).tolist()
                left = [row for row in active if lens[row - 1] > RESTART]
                came = [row for row in range(1, ROWS + 1) if row not in active]
                self.worker.vacate(left)
                self.begin(came)
                active = sorted({*active, *came} - set(left)) or came
                if not active:
                    active = left
                    self.begin(left)
        self.worker.close()
        return digest.hexdigest(), emitted, self.worker.host_syncs

    def begin(self, rows):
        if rows:
            rows = torch.tensor(rows, device=self.device)
            self.relay.publish(rows, rows * 2)
            self.relay.stash(rows, RelayPayload(rows % VOCAB))


def main(rank, folder, backend, options):
    hw = hwcore.use(backend)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )
    started = time.monotonic()
    try:
        print("done", *Rank(hw, rank, distributed.group.WORLD, options).run(), flush=True)
    except hwcore.HwcoreError as error:
        print(f"{type(error).__name__} after {time.monotonic() - started:.1f} s: {error}")
        sys.stdout.flush()
        os._exit(3)  # not to wait for a peer that is gone
    with contextlib.suppress(RuntimeError):
        distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3], json.loads(sys.argv[4]))
