"""The parts of the core that run on a device, each as a function from a backend to its results.

A new part is one more entry of STEPS, or of PARTS.
"""

import torch

from hwcore.graphs import BATCH, TOKENS, GraphRunner, Slot
from hwcore.overlap import FutureMap, RelayPayload, RelaySpec
from hwcore.speculative import (
    DraftSteps,
    SamplingParams,
    TreeMaskMode,
    block_positions,
    build_tree,
    cache_locs,
    commit,
    compute_spec_mrope_positions,
    sample_drafts,
    top_k,
    verify_chain,
    verify_greedy,
    verify_sampling,
)

SPEC = RelaySpec(pool_size=9, topk=2, hidden_size=3, draft_probs=(2, 3))


# --- FutureMap ------------------------------------------------------------------------------------


def relay(backend, debug):
    """Publish, stash, resolve in every way, and discard; return all that came back."""
    device = backend.device()
    batch = torch.tensor([3, 0, 5, 1], device=device)
    payload = RelayPayload(
        torch.tensor([30, 0, 50, 10], device=device),
        topk_p=torch.rand(4, 2, generator=torch.Generator().manual_seed(0)).to(device),
        topk_index=torch.tensor([[1, 2], [0, 0], [3, 4], [5, 6]], device=device),
        hidden_states=torch.ones(4, 6, device=device).bfloat16()[:, ::2],
        draft_probs=torch.full((4, 2, 3), 0.25, device=device),
    )
    seen = []
    with FutureMap(SPEC, backend=backend, debug=debug) as map_:
        for _ in range(2):
            map_.publish(batch, batch * 7)
            map_.stash(batch, payload)
            seen.append(map_.resolve_seq_lens(batch))
            seen.append(map_.resolve_seq_lens(batch, to_cpu=True))
            got = map_.resolve(batch)
            seen += [getattr(got, name).clone() for name in RelayPayload.__slots__]
        map_.stash(batch, payload)
        map_.discard(batch)
        if debug:
            map_.check()
    return seen


# --- Graphs: of their own they copy and fill ------------------------------------------------------


def graphs(backend):
    """Replay padded batches, and run one eagerly; return the outputs."""
    device = backend.device()
    slots = {"x": Slot(torch.float32, (TOKENS,), fill=7), "y": Slot(torch.int64, (3, BATCH))}
    seen = []
    with GraphRunner(lambda x, y: x * 2, slots, [(4, 1), (2, 1)], backend=backend) as runner:
        runner.capture()
        for size in (4, 3, 1, 5):
            x = torch.ones(size, device=device)
            y = torch.ones(3, size, dtype=torch.int64, device=device)
            got = runner.run({"x": x, "y": y}, (9,) * size, or_eager=True)
            seen.append(got.clone())
    return seen


# --- Speculative decoding: a step from the draft's tokens to what is committed --------------------
# Each step reads what the earlier ones left in ``state`` and returns what it adds, by name.


def _draft(state, backend):
    """Two steps of a head with two branches."""
    generator = torch.Generator().manual_seed(4)
    first = torch.rand(2, 1, 9, generator=generator).to(backend.device())
    second = torch.rand(2, 2, 9, generator=generator).to(backend.device())
    steps = DraftSteps(2, backend=backend)
    probs, tokens = top_k(first, 2, backend=backend)
    steps.first(probs[:, 0], tokens[:, 0])
    steps.next(*top_k(second, 2, backend=backend))
    results = steps.organize(6)
    tokens, parents = results.with_root(torch.tensor([7, 5], device=backend.device()))
    found = {"draft_tokens": tokens % 8, "parents": parents, "ranks": results.ranks}
    draft_ids = torch.arange(9, device=backend.device()) * 3
    return found | {"likeliest": top_k(second, 1, draft_ids=draft_ids, backend=backend)}


def _target(state, backend):
    """Logits of a target that agrees with some drafts: not a part of the core."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.rand(2, 6, 8, generator=generator)
    first = state["draft_tokens"][:, 1].tolist()  # agreed with
    logits[0, 0, first[0]] = logits[1, 0, first[1]] = 2.0
    return {"logits": logits.to(backend.device())}


def _tree_in_every_mode(state, backend):
    found = {}
    for mode in TreeMaskMode:
        found[f"tree {mode.name}"] = build_tree(
            state["draft_tokens"],
            state["parents"],
            torch.tensor([11, 4], device=backend.device()),
            spec_steps=3,
            tree_mask_mode=mode,
            seq_lens_sum=15,
            backend=backend,
        )
    return found


def _verify_greedy(state, backend):
    tree = state["tree QLEN_ONLY"]
    return {"verified": verify_greedy(tree, state["logits"], backend=backend)}


def _verify_sampling(state, backend):
    """With every filter, and one request that is greedy; coins from seeds."""
    device, found = backend.device(), {}
    params = SamplingParams.of([0.8, 0.0], [3, None], [0.9, None], [0.1, None], device=device)
    seeds = torch.tensor([5, 6], device=device)
    tree, logits = state["tree QLEN_ONLY"], state["logits"]
    for name in ("params", "bare"):
        if name == "bare":
            params = SamplingParams.of([1.0, 1.0], device=device)
        result = verify_sampling(tree, logits, params, seeds=seeds, backend=backend)
        found[f"sampled {name}"] = result
    return found


def _verify_chain(state, backend):
    """By token and by block, with drafts sampled here; rows in one piece and not."""
    device, found = backend.device(), {}
    params = SamplingParams.of([0.8, 0.0], [3, None], device=device)
    seeds, lens = torch.tensor([5, 6], device=device), torch.tensor([11, 4], device=device)
    logits = state["logits"][:, :3]
    for block in (False, True):
        where = block_positions(lens, 2)
        if not block:
            where = lens.unsqueeze(1) + torch.tensor([1, 2], device=device)
        chosen, probs = [state["draft_tokens"][:, 0]], []
        for step in range(2):
            token, distribution = sample_drafts(
                logits[:, step] * 0.5,
                params,
                seeds=seeds,
                positions=where[:, step],
                backend=backend,
            )
            chosen.append(token)
            probs.append(distribution)
        for rows in (logits, logits.contiguous()):
            result = verify_chain(
                torch.stack(chosen, 1),
                rows,
                torch.stack(probs, 1),
                params,
                seeds=seeds,
                seq_lens=lens,
                block_verification=block,
                backend=backend,
            )
            found[f"chain {block} {rows.is_contiguous()}"] = result
    return found


def _commit(state, backend):
    device = backend.device()
    slots = torch.arange(100, 112, device=device).view(2, 6)
    lens = torch.tensor([11, 4], device=device)
    tree, result = state["tree QLEN_ONLY"], state["verified"]
    hidden = torch.arange(12.0, device=device).view(12, 1)
    done = commit(tree, result, lens, slots, hidden_states=hidden, backend=backend)
    table = slots.view(3, 4).to(torch.int32)
    rows, entries = torch.tensor([2, 0], device=device), torch.tensor([1, 2], device=device)
    return {"committed": done, "slots": cache_locs(table, rows, entries, 2, backend=backend)}


def _mrope(state, backend):
    device = backend.device()
    deltas, rows = torch.tensor([0, -3, 8], device=device), torch.tensor([2, 1], device=device)
    positions = state["tree QLEN_ONLY"].positions
    starts = torch.tensor([0, 5], device=device)
    return {
        "of trees": compute_spec_mrope_positions(deltas, rows, positions, backend=backend),
        "of paths": compute_spec_mrope_positions(
            deltas, rows, positions, starts=starts, backend=backend
        ),
    }


STEPS = [
    _draft,
    _target,
    _tree_in_every_mode,
    _verify_greedy,
    _verify_sampling,
    _verify_chain,
    _commit,
    _mrope,
]


def step(backend):
    """Run STEPS; return all that they gave."""
    state = {}
    for run in STEPS:
        state.update(run(state, backend))
    return list(state.values())


PARTS = {
    "relay": lambda backend: relay(backend, debug=False),
    "relay under debugging": lambda backend: relay(backend, debug=True),
    "graphs": graphs,
    "speculative step": step,
}
