"""A small decode step, its inputs, and runners of it."""

from __future__ import annotations

import torch

from hwcore.graphs import BATCH, TOKENS, TOKENS_PER_REQUEST, GraphRunner, Slot

BUCKETS = [(1, 1), (2, 1), (4, 1), (8, 1), (1, 3), (4, 3)]
SLOTS = {
    "input_ids": Slot(torch.int64, (TOKENS,)),
    "rows": Slot(torch.int64, (BATCH,), fill=0),  # row 0 is nobody's
    "mrope_positions": Slot(torch.int64, (3, TOKENS), fill=-1),
    "scores": Slot(torch.float32, (BATCH, TOKENS_PER_REQUEST), fill=0.5),
}


class Step:
    """A function of every slot that also writes a cache: tokens seen, by row."""

    def __init__(self, device, rows=16):
        self.cache = torch.zeros(rows, dtype=torch.int64, device=device)
        self.weight = torch.arange(1.0, 4.0, device=device)
        self.calls = []

    def __call__(self, input_ids, rows, mrope_positions, scores):
        self.calls.append((rows.shape[0], scores.shape[1]))
        self.cache.index_put_((rows,), (scores * 2).sum(1).to(torch.int64), accumulate=True)
        hidden = (input_ids + mrope_positions.sum(0)).to(torch.float32)
        return {"logits": hidden[:, None] * self.weight, "best": [scores.sum(1), None, 7]}


def inputs(batch_size, width=1, device="cpu", seed=0):
    """Return inputs of a batch; rows are 1 and up."""
    generator = torch.Generator().manual_seed(seed)
    tokens = batch_size * width

    def ints(*shape):
        return torch.randint(0, 1000, shape, generator=generator)

    made = {
        "input_ids": ints(tokens),
        "rows": torch.arange(1, batch_size + 1),
        "mrope_positions": ints(3, tokens),
        "scores": ints(batch_size, width).to(torch.float32),
    }
    return {name: tensor.to(device) for name, tensor in made.items()}


def lens(batch_size):
    return tuple(range(10, 10 + batch_size))


def same(got, expected):
    """Assert that outputs of a step are equal, to the bit, in the same containers."""
    assert isinstance(got, dict)
    assert got.keys() == expected.keys()
    assert torch.equal(got["logits"].cpu(), expected["logits"].cpu())
    assert torch.equal(got["best"][0].cpu(), expected["best"][0].cpu())
    assert got["best"][1:] == expected["best"][1:] == [None, 7]


def runner_of(hw, fn=None, slots=SLOTS, buckets=BUCKETS, **arguments):
    """Return a runner that has captured."""
    runner = GraphRunner(fn or Step(hw.device()), slots, buckets, backend=hw, **arguments)
    runner.capture()
    return runner


def simple(hw, buckets=((4, 1),), **arguments):
    """Return a runner of one slot, `x` [batch] float32, that doubles it."""
    slots = {"x": Slot(torch.float32, (BATCH,), fill=100.0)}
    return runner_of(hw, lambda x: x * 2, slots, buckets, **arguments)
