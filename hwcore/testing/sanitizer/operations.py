"""From a torch call to accesses: which tensors, on which stream, and whether the host waits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from hwcore.testing.sanitizer import stacks
from hwcore.testing.sanitizer.schemas import Op, is_mask_index
from hwcore.testing.sanitizer.tracker import DEVICE, HOST, Call

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from hwcore.testing.sanitizer.clocks import Lane
    from hwcore.testing.sanitizer.tracker import Tracker

__all__ = ["enter_call", "enter_host_read", "enter_kernel"]

Accesses = list[tuple[torch.Tensor, bool]]
"""Tensors, and whether each is written."""


def enter_call(
    tracker: Tracker, func: Any, op: Op, args: Any, kwargs: dict[str, Any], result: Any
) -> None:
    """Enter a torch call that has just returned."""
    if op.kind == "record_stream":
        _record_stream(tracker, *args)
        return
    accesses, fresh = _tensors(op, args, kwargs, result)
    if op.kind == "copy":
        _enter_copy(tracker, func, op, args, kwargs, accesses, fresh)
        return
    if op.kind == "resize":
        accesses, fresh = [], []
        if tracker.side(args[0]) == DEVICE:
            lane = tracker.lane(args[0].device)
            with tracker.changing() as found:
                tracker.resized(found, args[0], lane, Call(op.name, stacks.capture()))
        return
    waits = op.reads_host or (op.indexed and is_mask_index(func, args))
    if waits and kwargs.get("output_size") is not None:
        waits = False  # repeat_interleave that is told how many
    _enter(tracker, op, accesses, fresh, waits)


def enter_kernel(
    tracker: Tracker,
    name: str,
    reads: Iterable[torch.Tensor],
    writes: Iterable[torch.Tensor],
    host: bool,
) -> None:
    """Enter accesses that torch does not see."""
    accesses = [*((t, False) for t in reads), *((t, True) for t in writes)]
    if host:
        with tracker.changing() as found:
            for tensor, write in accesses:
                tracker.by_host(found, tensor, write, name, indexed=True)
    else:
        op = Op(name, "plain", indexed=True)
        _enter(tracker, op, accesses, [], waits=False)


def _tensors(
    op: Op, args: Sequence[Any], kwargs: dict[str, Any], result: Any
) -> tuple[Accesses, list[torch.Tensor]]:
    """Return the tensors whose memory an op touches, and those that it made."""
    accesses: Accesses = []
    given = len(args)
    for position, name, write in op.tensors:
        value = args[position] if position < given else kwargs.get(name)
        if isinstance(value, torch.Tensor):
            accesses.append((value, write))
        elif isinstance(value, (list, tuple)):
            accesses.extend((t, write) for t in value if isinstance(t, torch.Tensor))
    fresh: list[torch.Tensor] = []
    if op.fresh:
        results = result if isinstance(result, tuple) else (result,)
        for index in op.fresh:
            value = results[index]
            if isinstance(value, torch.Tensor):
                fresh.append(value)
            elif isinstance(value, (list, tuple)):
                fresh.extend(t for t in value if isinstance(t, torch.Tensor))
    return accesses, fresh


def _enter(
    tracker: Tracker, op: Op, accesses: Accesses, fresh: list[torch.Tensor], waits: bool
) -> None:
    side = tracker.side
    on_device = [(t, write) for t, write in accesses if side(t) == DEVICE]
    made = [t for t in fresh if side(t) == DEVICE]
    if not on_device and not made:
        _on_host(tracker, op, accesses)
        return
    first = on_device[0][0] if on_device else made[0]
    lanes = {first.device: tracker.lane(first.device)}
    call = Call(op.name, stacks.capture(), op.indexed)
    with tracker.changing() as found:
        for tensor, write in on_device:
            tracker.by_stream(found, tensor, _lane(tracker, lanes, tensor), write, call)
        if len(on_device) != len(accesses):
            for tensor, write in accesses:
                if side(tensor) == HOST:
                    tracker.by_host(found, tensor, write, op.name, op.indexed)
        for tensor in made:
            tracker.allocated(tensor, _lane(tracker, lanes, tensor), op.initialises, call)
        if waits:
            tracker.waited_for(lanes[first.device])


def _on_host(tracker: Tracker, op: Op, accesses: Accesses) -> None:
    """Check an op on host memory; most of it was never near a device."""
    near = [(t, write) for t, write in accesses if tracker.find(t) is not None]
    if near:
        with tracker.changing() as found:
            for tensor, write in near:
                tracker.by_host(found, tensor, write, op.name, op.indexed)


def _lane(tracker: Tracker, lanes: dict[torch.device, Lane], tensor: torch.Tensor) -> Lane:
    lane = lanes.get(tensor.device)
    if lane is None:
        lane = lanes[tensor.device] = tracker.lane(tensor.device)
    return lane


# --- Copies ---------------------------------------------------------------------------------------


def _enter_copy(
    tracker: Tracker,
    func: Any,
    op: Op,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    accesses: Accesses,
    fresh: list[torch.Tensor],
) -> None:
    """Enter a copy, one pair of tensors after the other.

    Between host and device, only a copy that is told not to block, from or to pinned memory, is
    still to run when the call returns: its stream then touches the host's memory. Otherwise the
    host memory was touched by the time the call returned; and the host has waited for the stream,
    except where it only had to hand pageable memory over.
    """
    non_blocking = bool(kwargs.get("non_blocking", False))
    if func.overloadpacket is not torch.ops.aten._to_copy and len(args) > 2:
        non_blocking = bool(args[2])
    targets = fresh or [t for t, write in accesses if write]
    sources = [t for t, write in accesses if not write]
    for target, source in zip(targets, sources, strict=True):
        to, of = tracker.side(target), tracker.side(source)
        pair: Accesses = [(source, False)] if fresh else [(source, False), (target, True)]
        if {to, of} == {DEVICE, HOST}:
            _across(tracker, op, source, target, non_blocking)
        elif to == of == DEVICE and source.device != target.device:
            _between_devices(tracker, op, source, target)
        else:
            _enter(tracker, op, pair, [target] if fresh else [], waits=False)


def _across(
    tracker: Tracker, op: Op, source: torch.Tensor, target: torch.Tensor, non_blocking: bool
) -> None:
    """Enter a copy between host and device."""
    up = tracker.side(source) == HOST
    device, host = (target, source) if up else (source, target)
    pinned = tracker.is_host_backend or host.is_pinned()
    lane = tracker.lane(device.device)
    call = Call(op.name, stacks.capture())
    with tracker.changing() as found:
        if up:
            tracker.find_or_begin(target, lane, call)
        tracker.by_stream(found, device, lane, write=up, call=call)
        if non_blocking and pinned:
            history = tracker.find_or_begin(host, None, call)
            if history is not None:
                history.host = True
                tracker.by_stream(found, host, lane, write=not up, call=call)
        elif tracker.is_host_backend or (non_blocking and up):
            # On the host as a device the other side may be host memory as well: no wait is certain.
            tracker.by_host(found, host, not up, op.name)
        else:
            if tracker.find(host) is not None:
                tracker.by_stream(found, host, lane, write=not up, call=call)
            tracker.waited_for(lane)


def _between_devices(tracker: Tracker, op: Op, source: torch.Tensor, target: torch.Tensor) -> None:
    """Enter a copy between devices: torch makes the streams of both wait for each other."""
    ours, theirs = tracker.lane(source.device), tracker.lane(target.device)
    call = Call(op.name, stacks.capture())
    with tracker.changing() as found:
        clocks = tracker.clocks
        clocks.acquire(ours, clocks.release(theirs))
        tracker.by_stream(found, source, ours, write=False, call=call)
        tracker.find_or_begin(target, theirs, call)
        tracker.by_stream(found, target, ours, write=True, call=call)
        clocks.acquire(theirs, clocks.release(ours))


def _record_stream(tracker: Tracker, tensor: torch.Tensor, stream: Any) -> None:
    with tracker.changing():
        history = tracker.find_or_begin(tensor)
        if history is not None:
            history.recorded.add(tracker.clocks.lane(stream))


def enter_host_read(tracker: Tracker, tensor: torch.Tensor, name: str) -> None:
    """Enter a read that no torch call shows: of host memory, or of a device that is the host."""
    _enter(tracker, Op(name, "plain"), [(tensor, False)], [], waits=True)
