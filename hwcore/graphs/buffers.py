"""Static inputs of graphs: one memory for all buckets, filled in one call, padding kept clean."""

from __future__ import annotations

import collections.abc
import math
from operator import itemgetter
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import torch

import hwcore
from hwcore.errors import ArgumentTypeError, ArgumentValueError, HwcoreError, describe
from hwcore.graphs.rows import Rows, copy_group, copy_runs
from hwcore.graphs.slots import Bucket, Slot, check_buckets, check_slots

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from hwcore.backend import Backend

__all__ = ["Copies", "GraphBuffers"]

_ALIGNMENT = 256  # bytes: what vectorised kernels and copy engines ask for at most
_LARGEST_ITEM = 16  # bytes, of complex128

_data_ptr = torch.Tensor.data_ptr
Copies: TypeAlias = tuple[torch.Tensor, ...] | list[tuple[torch.Tensor, torch.Tensor]]
"""Inputs in the order of the slots, where all can be copied at once; else (to, from)."""

# Private by its name alone: torch's optimizers stand on it, and no public call copies many.
_copy_all = torch._foreach_copy_


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
        ordered = sorted(check_slots(slots).items(), key=lambda item: copy_group(item[1]))
        self.slots = MappingProxyType(dict(ordered))
        self.buckets = check_buckets(buckets)
        hw = backend or hwcore.current_backend()
        fills = {name: _LARGEST_ITEM * n for n, name in enumerate(self.slots)}
        size_bytes = _aligned(_LARGEST_ITEM * len(self.slots))
        offsets = {}
        for name, slot in self.slots.items():
            offsets[name] = size_bytes
            size_bytes += _aligned(max(slot.size_bytes(bucket) for bucket in self.buckets))
        # Outside of inference mode, whose tensors count no writes and take none after it.
        with torch.inference_mode(False):
            self.memory = torch.empty(size_bytes, dtype=torch.uint8, device=device or hw.device())
            self._views = {
                bucket: MappingProxyType(
                    {
                        name: self._view(offsets[name], slot.dtype, slot.shape_for(*bucket))
                        for name, slot in self.slots.items()
                    }
                )
                for bucket in self.buckets
            }
            # Each slot's fill as a scalar on the device: what padding is copied from, in one call.
            self._fills = {
                name: self._view(fills[name], slot.dtype, torch.Size())
                for name, slot in self.slots.items()
            }
            for views in (self._fills, *self._views.values()):
                for name, view in views.items():
                    view.fill_(self.slots[name].fill)
        self.device = self.memory.device
        self._addresses = range(self.memory.data_ptr(), self.memory.data_ptr() + size_bytes)
        names = tuple(self.slots)
        self._in_order = itemgetter(*names) if len(names) > 1 else lambda given: (given[names[0]],)
        self._fused = copy_runs(list(self.slots.values()), self.device)
        self._non_blocking = hw.host_memory_policy().copies_ordered_with_kernels
        self._rows: dict[tuple[Bucket, int], Rows] = {}
        self._filled: Rows | None = None

    def views(self, bucket: Bucket) -> Mapping[str, torch.Tensor]:
        """Return every slot as a graph of ``bucket`` sees it: contiguous, padding included."""
        return self._views[self._known(bucket)]

    def real(self, bucket: Bucket, batch_size: int) -> Mapping[str, torch.Tensor]:
        """Return views of the real requests of every slot, to be written in place.

        Ask for them anew for each batch: what may have been written through them is not trusted to
        be padding afterwards. Whoever writes waits for the last replay himself.

        Parameters
        ----------
        bucket : (int, int)
        batch_size : int
            In [0, ``bucket[0]``].
        """
        self.spoil()
        return MappingProxyType(self.rows(bucket, batch_size).real)

    def rows(self, bucket: Bucket, batch_size: int) -> Rows:
        """Return views of the real and of the padded part for a batch. Kept, and cheap.

        For :meth:`check` and :meth:`write`; see :meth:`real` for writing in place.

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
                rows = Rows(bucket, batch_size, self.slots, views, self._fills)
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
            addresses = list(map(_data_ptr, given)) if usual else ()
        except (KeyError, AttributeError, TypeError, RuntimeError):
            usual = False
        if usual:
            memory = self._addresses
            for address in addresses:
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
        if rows.padding and not rows.is_padded_after(before):
            _copy_all(rows.padding, rows.fills)
        self._filled = rows
        return unfinished

    def for_eager(
        self, batch_size: int, tokens_per_request: int, inputs: Mapping[str, torch.Tensor]
    ) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
        """Copy inputs to the device, unpadded, for a batch that no bucket takes.

        Returns
        -------
        copies : dict of str to Tensor
            Like the static buffers they are the function's to write to.
        unfinished : list of Tensor
            As of :meth:`write`.

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
        copies = {
            name: given.detach().to(self.device, non_blocking=self._non_blocking, copy=True)
            for name, given in inputs.items()
        }
        on_host = [given for given in inputs.values() if given.device != self.device]
        return copies, on_host if self._non_blocking else []

    def spoil(self) -> None:
        """Take the padding as written by somebody else: the next batch writes it anew."""
        self._filled = None

    def release(self) -> None:
        """Let go of the memory; views that were handed out keep it."""
        self.memory = self.memory.new_empty(0)
        self._views.clear()
        self._rows.clear()
        self._fills.clear()
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
                fix = "Clone it, or write it into buffers.real(...)"
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
        if given.layout is not torch.strided:
            fix = "Convert it with to_dense()"
            _refuse(name, given.layout, "a tensor of torch.strided", fix, ArgumentTypeError)
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

    def _view(self, offset: int, dtype: torch.dtype, shape: torch.Size) -> torch.Tensor:
        part = self.memory[offset : offset + math.prod(shape) * dtype.itemsize]
        return part.view(dtype).view(shape)


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // _ALIGNMENT) * _ALIGNMENT


def _refuse(
    name: str,
    got: object,
    expected: str,
    fix: str,
    kind: type[HwcoreError] = ArgumentValueError,
) -> NoReturn:
    raise kind(describe("GraphBuffers", f"input `{name}`", got, expected, fix))
