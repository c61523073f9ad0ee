"""Capturing, and comparing replays with eager."""

import torch
from torch.utils._pytree import tree_leaves

from hwcore.graphs.tape import Tape

MODES = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


def captured(fn, mode=torch.no_grad):
    tape = Tape()
    with mode():
        outputs = tape.capture(fn)
    return tape, outputs


def assert_replays_like_eager(fn, change, *, mode=torch.no_grad, rounds=3):
    """Capture, then compare replays with eager runs of fn on inputs changed each round."""
    tape, outputs = captured(fn, mode)
    for _ in range(rounds):
        change()
        tape.replay()
        got = [leaf.clone() for leaf in tree_leaves(outputs)]
        with mode():
            expected = tree_leaves(fn())
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b)
