"""Static inputs of graphs: one memory for all buckets, filled in one call, padding kept clean."""

from __future__ import annotations

import collections.abc
import itertools
import math
from operator import attrgetter, itemgetter
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import torch

import hwcore
from hwcore.errors import ArgumentTypeError, ArgumentValueError, HwcoreError, describe
from hwcore.graphs.slots import Bucket, Slot, check_bucket

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from hwcore.backend import Backend

__all__ = ["Copies", "GraphBuffers", "Rows"]

_ALIGNMENT = 256  # bytes: what vectorised kernels and copy engines ask for at most

# What an input must have in common with its slot; the four in one call.
_form = attrgetter("dtype", "shape", "device", "requires_grad")
_data_ptr = torch.Tensor.data_ptr
Copies: TypeAlias = tuple[torch.Tensor, ...] | list[tuple[torch.Tensor, torch.Tensor]]
"""Inputs in the order of the slots, where all can be copied at once; else (to, from)."""

# Private by its name alone: torch's optimizers stand on it, and no public call copies many.
_copy_all = torch._foreach_copy_


class Rows:
    """The real and the padded part of every slot, for one batch size in one bucket.

    Attributes
    ----------
    bucket : Bucket
    batch_size : int
    real : dict of str to Tensor
        Views of the first ``batch_size`` requests.
    padding : list of (Tensor, number)
        Views of the rest, with what they are to hold; empty where nothing is padded.
    """

    __slots__ = ("_forms", "batch_size", "bucket", "padding", "real", "targets")

    def __init__(
        self,
        bucket: Bucket,
        batch_size: int,
        slots: Mapping[str, Slot],
        views: Mapping[str, torch.Tensor],
    ) -> None:
        self.bucket, self.batch_size = bucket, batch_size
        self.real: dict[str, torch.Tensor] = {}
        self.padding: list[tuple[torch.Tensor, complex]] = []
        for name, slot in slots.items():
            view, axis = views[name], slot.axis
            count = slot.shape_for(batch_size, bucket[1])[axis]
            self.real[name] = view.narrow(axis, 0, count)
            if padded := view.shape[axis] - count:
                self.padding.append((view.narrow(axis, count, padded), slot.fill))
        self.targets = list(self.real.values())
        self._forms = [_form(target) for target in self.targets]

    def fit(self, inputs: Sequence[Any]) -> bool:
        """Say whether inputs have the form of the slots, in the order of the slots."""
        return [*map(_form, inputs)] == self._forms


class GraphBuffers:
    """Named static inputs, which graphs of several buckets share.

    Every slot has the memory of its largest bucket. A smaller bucket sees a contiguous prefix of
    it, in its own shape: two buckets' views overlap, and hold one batch at a time.

    All work runs on the current stream and none of it waits for the host, but for a blocking copy
    of a host input where ``host_memory_policy()`` does not say ``copies_ordered_with_kernels``.
    The caller orders streams, and calls from one thread at a time;
    :class:`~hwcore.graphs.GraphRunner` does both.

    Parameters
    ----------
    slots : Mapping of str to Slot
        By the names that the captured function takes.
    buckets : iterable of (int, int)
        Batch size and tokens per request of every graph.
    backend : Backend, optional
        By default the process's own.
    device : torch.device, optional
        By default the backend's current one.

    Attributes
    ----------
    slots : Mapping of str to Slot
    buckets : tuple of (int, int)
        Largest first: by tokens, then by batch size.
    device : torch.device
    memory : Tensor, uint8
        What all slots lie in.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        If there is no slot or no bucket, one is malformed or there twice, or a ``fill`` does not
        fit its dtype.
    """

    def __init__(
        self,
        slots: Mapping[str, Slot],
        buckets: Iterable[Bucket],
        backend: Backend | None = None,
        device: torch.device | None = None,
    ) -> None:
        # By dtype, so that what one call can copy lies side by side.
        ordered = sorted(_checked_slots(slots).items(), key=lambda item: _group(item[1]))
        self.slots = MappingProxyType(dict(ordered))
        self.buckets = _checked_buckets(buckets)
        hw = backend or hwcore.current_backend()
        offsets, size_bytes = {}, 0
        for name, slot in self.slots.items():
            offsets[name] = size_bytes
            largest = max(slot.size_bytes(bucket) for bucket in self.buckets)
            size_bytes += -(-largest // _ALIGNMENT) * _ALIGNMENT
        # Made outside of inference mode, whose tensors could not be told from written ones, nor be
        # written outside of it.
        with torch.inference_mode(False):
            self.memory = torch.empty(size_bytes, dtype=torch.uint8, device=device or hw.device())
            self._views = {
                bucket: MappingProxyType(
                    {
                        name: self._view(slot, bucket, offsets[name])
                        for name, slot in self.slots.items()
                    }
                )
                for bucket in self.buckets
            }
            for views in self._views.values():
                for name, view in views.items():
                    view.fill_(self.slots[name].fill)
        self.device = self.memory.device
        self._addresses = range(self.memory.data_ptr(), self.memory.data_ptr() + size_bytes)
        names = tuple(self.slots)
        self._in_order = itemgetter(*names) if len(names) > 1 else lambda given: (given[names[0]],)
        self._fused = _fused(list(self.slots.values()), self.device)
        self._non_blocking = hw.host_memory_policy().copies_ordered_with_kernels
        self._rows: dict[tuple[Bucket, int], Rows] = {}
        self._filled: Rows | None = None

    def views(self, bucket: Bucket) -> Mapping[str, torch.Tensor]:
        """Return every slot as a graph of ``bucket`` sees it: contiguous, padding included."""
        return self._views[self._known(bucket)]

    def rows(self, bucket: Bucket, batch_size: int) -> Rows:
        """Return views of the real and of the padded part for a batch. Kept, and cheap.

        Parameters
        ----------
        bucket : (int, int)
        batch_size : int
            In [0, ``bucket[0]``].
        """
        rows = self._rows.get((bucket, batch_size))
        if rows is None:
            views = self._views[self._known(bucket)]
            if not 0 <= batch_size <= bucket[0]:
                expected, fix = f"a number in [0, {bucket[0]}]", "Take a larger bucket"
                raise ArgumentValueError(
                    describe("GraphBuffers.rows", "`batch_size`", batch_size, expected, fix)
                )
            with torch.inference_mode(False):
                rows = Rows(bucket, batch_size, self.slots, views)
            self._rows[bucket, batch_size] = rows
        return rows

    def check(self, rows: Rows, inputs: Mapping[str, torch.Tensor]) -> Copies:
        """Return what :meth:`write` has to copy.

        Parameters
        ----------
        rows : Rows
            Of this object.
        inputs : Mapping of str to Tensor
            One for each slot, of its dtype and of the real rows' shape, strided in any way; on the
            buffers' device or on the host. One that *is* the slot's real part, in address and
            strides, is in place already and not copied. A slot that is left out keeps its
            contents, for the caller to write later.

        Raises
        ------
        ArgumentTypeError, ArgumentValueError
            If a name is not a slot's, a dtype, shape or device has drifted, or an input overlaps
            the slots' memory in another way than to be in place.
        """
        try:
            given = self._in_order(inputs)
            usual = len(given) == len(inputs) and rows.fit(given)
        except (KeyError, AttributeError, TypeError):
            usual = False
        if usual:
            memory = self._addresses
            for address in map(_data_ptr, given):
                if address in memory:
                    break
            else:
                return given
        return self._examined(rows, inputs)

    def write(self, rows: Rows, copies: Copies) -> list[torch.Tensor]:
        """Copy inputs into the slots, and make what lies behind them padding.

        Padding that is still what it should be is not written again: that of the last batch, if
        this one has the same bucket and is no smaller.

        Parameters
        ----------
        rows : Rows
        copies : Copies
            What :meth:`check` returned for these rows.

        Returns
        -------
        unfinished : list of Tensor
            Host inputs whose copy may be queued still: they must not change before it has run, nor
            be freed unless ``host_memory_policy()`` says ``reuse_waits_for_copy``.
        """
        before, self._filled = self._filled, None  # should a copy fail
        unfinished = []
        if isinstance(copies, tuple):
            for part in self._fused:
                _copy_all(rows.targets[part], copies[part])
        else:
            for to, given in copies:
                to.copy_(given, non_blocking=self._non_blocking)
                if given.device != self.device and self._non_blocking:
                    unfinished.append(given)
        if before is not rows and (
            before is None or before.bucket != rows.bucket or before.batch_size > rows.batch_size
        ):
            for view, fill in rows.padding:
                view.fill_(fill)
        self._filled = rows
        return unfinished

    def for_eager(
        self, batch_size: int, tokens_per_request: int, inputs: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Return inputs on the device, unpadded, for a batch that no bucket takes.

        Raises
        ------
        ArgumentTypeError, ArgumentValueError
            As :meth:`check`, and if one is left out.
        """
        self._check_mapping(inputs)
        for name in self.slots:
            if name not in inputs:
                _refuse(name, "nothing", "a tensor, for fn takes it", "Pass it")
        for name, given in inputs.items():
            slot = self._slot(name)
            self._check_form(name, given, slot, slot.shape_for(batch_size, tokens_per_request))
        return {
            name: given.to(self.device, non_blocking=self._non_blocking)
            for name, given in inputs.items()
        }

    def spoil(self) -> None:
        """Take the padding as written by somebody else: the next batch writes it anew."""
        self._filled = None

    def release(self) -> None:
        """Let go of the memory; views that were handed out keep it."""
        self.memory = self.memory.new_empty(0)
        self._views.clear()
        self._rows.clear()
        self._filled = None

    # --- Checks ---

    def _examined(self, rows: Rows, inputs: Mapping[str, torch.Tensor]) -> Copies:
        """Check one input after the other, and return those to be copied with where to."""
        self._check_mapping(inputs)
        copies = []
        for name, given in inputs.items():
            slot = self._slot(name)
            target = rows.real[name]
            self._check_form(name, given, slot, target.shape)
            if given.numel() and given.data_ptr() in self._addresses:
                if given.data_ptr() == target.data_ptr() and given.stride() == target.stride():
                    continue
                expected = "memory of its own, or exactly the slot's real rows"
                fix = "Clone it, or write it into buffers.rows(...).real"
                _refuse(name, "a view of the static buffers", expected, fix)
            copies.append((target, given.detach()))
        return copies

    def _slot(self, name: str) -> Slot:
        if name not in self.slots:
            _refuse(name, "a value", f"one of {', '.join(self.slots)}", "Leave it out")
        return self.slots[name]

    def _check_form(self, name: str, given: Any, slot: Slot, shape: torch.Size) -> None:
        if not isinstance(given, torch.Tensor):
            _refuse(name, given, "a tensor", "Pass one", ArgumentTypeError)
        if given.dtype is not slot.dtype:
            expected, fix = f"{slot.dtype}, the slot's", "Convert it, or make the slot so"
            _refuse(name, given.dtype, expected, fix, ArgumentTypeError)
        if given.shape != shape:
            expected, fix = f"{list(shape)} for this batch", "Pass the real rows, without padding"
            _refuse(name, list(given.shape), expected, fix)
        if given.device != self.device and given.device.type != "cpu":
            expected = f"a tensor on {self.device} or on the host"
            _refuse(name, given.device, expected, "Move it there first", ArgumentTypeError)

    def _check_mapping(self, inputs: object) -> None:
        if not isinstance(inputs, collections.abc.Mapping):
            fix = "Pass tensors by the slots' names"
            raise ArgumentTypeError(describe("GraphBuffers", "`inputs`", inputs, "a mapping", fix))

    # --- Memory ---

    def _known(self, bucket: Bucket) -> Bucket:
        if bucket not in self._views:
            known = ", ".join(map(str, self.buckets))
            fix = "Name it when the buffers are made"
            raise ArgumentValueError(
                describe("GraphBuffers", "`bucket`", bucket, f"one of {known}", fix)
            )
        return bucket

    def _view(self, slot: Slot, bucket: Bucket, offset: int) -> torch.Tensor:
        shape = slot.shape_for(*bucket)
        part = self.memory[offset : offset + math.prod(shape) * slot.dtype.itemsize]
        # `.data` counts writes by itself: that is how a slot that the graph writes is found.
        return part.view(slot.dtype).view(shape).data


def _group(slot: Slot) -> tuple[bool, str]:
    """Return what slots that one call can copy have in common."""
    # Real rows behind the first dimension are strided, which no fused kernel takes.
    return slot.axis > 0, str(slot.dtype)


def _fused(slots: Sequence[Slot], device: torch.device) -> list[slice]:
    """Return which runs of slots are copied by one call each.

    On the host that is all of them; on a device torch has one kernel for many tensors of one dtype,
    and copies one after the other where they differ.
    """
    if device.type == "cpu":
        return [slice(0, len(slots))]
    starts = [n for n, slot in enumerate(slots) if not n or _group(slot) != _group(slots[n - 1])]
    return [slice(a, b) for a, b in itertools.pairwise([*starts, len(slots)])]


def _checked_slots(slots: Mapping[str, Slot]) -> dict[str, Slot]:
    where, expected = "GraphBuffers", "at least one Slot by its name, an identifier"
    fix = "Pass {'input_ids': Slot(torch.int64, (TOKENS,)), ...}"
    if not isinstance(slots, collections.abc.Mapping):
        raise ArgumentTypeError(describe(where, "`slots`", slots, expected, fix))
    for name, slot in slots.items():
        if not isinstance(slot, Slot) or not isinstance(name, str):
            raise ArgumentTypeError(describe(where, "`slots`", {name: slot}, expected, fix))
    if not slots or not all(map(str.isidentifier, slots)):
        raise ArgumentValueError(describe(where, "`slots`", list(slots), expected, fix))
    return dict(slots)


def _checked_buckets(buckets: Iterable[Bucket]) -> tuple[Bucket, ...]:
    checked = [check_bucket("GraphBuffers", bucket) for bucket in buckets]
    if not checked or len(set(checked)) < len(checked):
        expected, fix = "at least one bucket, each once", "Pass each that is to have a graph"
        raise ArgumentValueError(describe("GraphBuffers", "`buckets`", checked, expected, fix))
    return tuple(sorted(checked, key=lambda bucket: (bucket[0] * bucket[1], bucket), reverse=True))


def _refuse(
    name: str,
    got: object,
    expected: str,
    fix: str,
    kind: type[HwcoreError] = ArgumentValueError,
) -> NoReturn:
    raise kind(describe("GraphBuffers", f"input `{name}`", got, expected, fix))
