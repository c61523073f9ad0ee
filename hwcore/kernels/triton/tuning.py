"""How large the pieces are that the kernels work in: the only figures that depend on a device."""

from __future__ import annotations

import dataclasses

__all__ = ["TUNED", "Tuning", "splits_of_a_row"]


@dataclasses.dataclass(frozen=True)
class Tuning:
    """The pieces of one kernel.

    Attributes
    ----------
    block : int
        Elements that a program works on at a time; a power of two. 0: as many as the nodes of a
        tree, or the steps of a path.
    num_warps : int
    measured : str
        On which device these figures were found to be the best; none yet.
    """

    block: int
    num_warps: int
    measured: str = "not measured"


TUNED = {
    "gather_rows": Tuning(block=1024, num_warps=4),
    "assert_and_invalidate": Tuning(block=1024, num_warps=4),
    "commit_paths": Tuning(block=0, num_warps=1),
    "move_kv": Tuning(block=512, num_warps=4),
    "mrope_positions": Tuning(block=256, num_warps=4),
    "build_tree": Tuning(block=0, num_warps=1),
    "verify_tree_greedy": Tuning(block=4096, num_warps=8),
    "verify_tree_sampling": Tuning(block=4096, num_warps=8),
}

_PROGRAMS = 128
"""Programs that a device needs in order to be busy; not measured."""

_LEAST = 8192
"""Tokens of a row below which splitting it further is not worth it; not measured."""


def splits_of_a_row(batch: int, vocab: int) -> int:
    """Return by how many programs a row of logits is read, a power of two.

    One program cannot read a long row as fast as the device's memory gives it. Where there are few
    requests, several share a row: then a level of the walk takes two launches, and otherwise one
    launch takes all levels.
    """
    wanted = min(_PROGRAMS // max(1, batch), vocab // _LEAST)
    return 1 << max(0, wanted.bit_length() - 1)
