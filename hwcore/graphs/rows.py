"""The real and the padded part of static inputs, and which of them one call can copy."""

from __future__ import annotations

import itertools
from operator import attrgetter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from hwcore.graphs.slots import Bucket, Slot

__all__ = ["Rows", "copy_group", "copy_runs"]

# What an input must have in common with its slot; the four in one call.
_form = attrgetter("dtype", "shape", "device", "requires_grad")


class Rows:
    """The real and the padded part of every slot, for one batch size in one bucket.

    Attributes
    ----------
    bucket : Bucket
    batch_size : int
    real : dict of str to Tensor
        Views of the first ``batch_size`` requests.
    targets : list of Tensor
        The same in the order of the slots.
    padding : list of Tensor
        Views of the rest; empty where nothing is padded.
    fills : list of Tensor
        What each of ``padding`` is to hold, expanded to its shape.
    """

    __slots__ = ("_forms", "batch_size", "bucket", "fills", "padding", "real", "targets")

    def __init__(
        self,
        bucket: Bucket,
        batch_size: int,
        slots: Mapping[str, Slot],
        views: Mapping[str, torch.Tensor],
        fills: Mapping[str, torch.Tensor],
    ) -> None:
        self.bucket, self.batch_size = bucket, batch_size
        self.real: dict[str, torch.Tensor] = {}
        self.padding: list[torch.Tensor] = []
        self.fills: list[torch.Tensor] = []
        for name, slot in slots.items():
            view, axis = views[name], slot.axis
            count = slot.shape_for(batch_size, bucket[1])[axis]
            self.real[name] = view.narrow(axis, 0, count)
            if padded := view.shape[axis] - count:
                self.padding.append(view.narrow(axis, count, padded))
                self.fills.append(fills[name].expand_as(self.padding[-1]))
        self.targets = list(self.real.values())
        self._forms = [_form(target) for target in self.targets]

    def fit(self, inputs: Sequence[Any]) -> bool:
        """Say whether inputs have the form of the slots, in the order of the slots."""
        return [*map(_form, inputs)] == self._forms

    def is_padded_after(self, before: Rows | None) -> bool:
        """Say whether the padding is in place where those rows, and their padding, were written."""
        return before is self or (
            before is not None
            and before.bucket == self.bucket
            and before.batch_size <= self.batch_size
        )


def copy_group(slot: Slot) -> tuple[bool, str]:
    """Return what slots that one call can copy have in common."""
    # Real rows behind the first dimension are strided, which no fused kernel takes.
    return slot.axis > 0, str(slot.dtype)


def copy_runs(slots: Sequence[Slot], device: torch.device) -> list[slice]:
    """Return which slots, of those in the order of their groups, are copied by one call each.

    On the host that is all of them; on a device torch has one kernel for many tensors of one dtype,
    and copies one after the other where they differ.
    """
    if device.type == "cpu":
        return [slice(0, len(slots))]
    lengths = [len(list(run)) for _, run in itertools.groupby(slots, copy_group)]
    ends = [0, *itertools.accumulate(lengths)]
    return [slice(start, end) for start, end in itertools.pairwise(ends)]
