"""Control over what a real device leaves no control over: when work runs, and what memory holds."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch

from hwcore.errors import ArgumentTypeError, ArgumentValueError, describe
from hwcore_sim.device.registration import (
    device_index,
    device_type,
    native,
    parse_policy,
    started_drain,
    stream_key,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hwcore.types import Stream

__all__ = [
    "drain_policy",
    "get_drain_policy",
    "get_pinned_reuse",
    "host_waits",
    "launch_host_function",
    "memory_stats",
    "peek",
    "pending",
    "pinned_reuse",
    "reset",
    "set_drain_policy",
    "set_memory_capacity",
    "set_pinned_reuse",
]

_device_policy: str | None = None
_stream_policies: dict[tuple[int, int], str] = {}


def set_drain_policy(policy: str | None, stream: Stream | None = None) -> None:
    """Say when queued work runs, from now on.

    Parameters
    ----------
    policy : str or None
        ``"lazy"``: only when something waits for it. ``"eager"``: when it is submitted; what is
        queued now runs at once. ``"random:SEED"``: after each submission perhaps some items of
        some stream, the same for the same seed and program. None, with ``stream``: that stream
        follows the device again.
    stream : torch.Stream, optional
        Only for this stream. Without, for all streams of all devices that have no policy of
        their own.

    Raises
    ------
    ArgumentValueError, ArgumentTypeError
        If there is no such policy, or ``random`` is asked of one stream.
    """
    global _device_policy
    if stream is None:
        native().set_policy(*parse_policy(policy))
        _device_policy = policy
        return
    key = stream_key("set_drain_policy", stream)
    if policy is None:
        native().set_stream_policy(*key, None)
        _stream_policies.pop(key, None)
        return
    name, _ = parse_policy(policy)
    if name == "random":
        expected = '"lazy", "eager" or None for one stream: a random order is one of several'
        fix = "Set it for the device"
        raise ArgumentValueError(describe("drain policy", "`policy`", policy, expected, fix))
    native().set_stream_policy(*key, policy)
    _stream_policies[key] = policy


def get_drain_policy(stream: Stream | None = None) -> str:
    """Return the drain policy of the devices, or the one that a stream follows."""
    if stream is not None:
        key = stream_key("get_drain_policy", stream)
        native().stream_policy(*key)  # raises for a stream from before a reset
        if key in _stream_policies:
            return _stream_policies[key]
    return started_drain() if _device_policy is None else _device_policy


@contextlib.contextmanager
def drain_policy(policy: str, stream: Stream | None = None) -> Iterator[None]:
    """Set a drain policy for a while; as :func:`set_drain_policy`, undone at the end."""
    before: str | None = get_drain_policy()
    if stream is not None:
        before = _stream_policies.get(stream_key("drain_policy", stream))
    set_drain_policy(policy, stream)
    try:
        yield
    finally:
        set_drain_policy(before, stream)


def pending(stream: Stream | None = None) -> int:
    """Return how many pieces of work are queued: of one stream, or of all streams and devices."""
    if stream is None:
        return int(native().pending())
    return int(native().stream_pending(*stream_key("pending", stream)))


@contextlib.contextmanager
def host_waits() -> Iterator[list[str]]:
    """Watch for a while what the host waits for: where a real device would have stalled it.

    Yields a list that is filled at the end, with one entry a wait, in order, of any thread: of a
    stream, an event or a device, of a blocking copy, of a value read or needed on the host. Asking
    whether something is done is no wait; neither is what a drain policy runs early. On a stream
    that is ``"eager"``, what would wait for a value finds it there, and is not seen.
    """
    waits: list[str] = []
    start = native().begin_wait_watch()
    try:
        yield waits
    finally:
        waits.extend(native().end_wait_watch(start))


def launch_host_function(fn: Callable[[], Any], stream: Stream | None = None) -> None:
    """Queue a Python function on a stream (None: the current one), like any device work.

    What it raises surfaces at the next synchronisation of the stream.
    """
    if not callable(fn):
        expected, fix = "a callable without arguments", "Pass a function"
        raise ArgumentTypeError(describe("launch_host_function", "`fn`", fn, expected, fix))
    if stream is None:
        stream = torch.accelerator.current_stream()
    native().launch(*stream_key("launch_host_function", stream), fn)


def reset(index: int | None = None) -> None:
    """Drop the queues and pending errors of a device (None: the current one).

    Its streams and events from before raise a named error when used; tensors, new streams and
    the default stream work. The calling thread's current stream becomes the default stream.
    """
    index = device_index("reset", index)
    native().reset(index)
    for key in [key for key in _stream_policies if key[0] == index]:
        del _stream_policies[key]


def peek(tensor: torch.Tensor) -> torch.Tensor:
    """Return a CPU copy of what a tensor's memory holds now, running nothing that is queued."""
    if not isinstance(tensor, torch.Tensor) or tensor.device.type != device_type():
        expected = f"a tensor on `{device_type()}`"
        raise ArgumentTypeError(
            describe("peek", "`tensor`", tensor, expected, "Pass one of that device")
        )
    copy: torch.Tensor = native().peek(tensor)
    return copy


def memory_stats(index: int | None = None) -> dict[str, int]:
    """Return the allocator's statistics for a device, under the names of torch.accelerator."""
    return dict(torch.accelerator.memory_stats(device_index("memory_stats", index)))


def set_memory_capacity(size_bytes: int, index: int | None = None) -> None:
    """Say how much memory a device has. What is allocated stays, even beyond it."""
    if isinstance(size_bytes, bool) or not isinstance(size_bytes, int) or size_bytes < 0:
        expected, fix = "a number of bytes ≥ 0", "Pass one"
        raise ArgumentValueError(
            describe("set_memory_capacity", "`size_bytes`", size_bytes, expected, fix)
        )
    native().set_capacity(device_index("set_memory_capacity", index), size_bytes)


def set_pinned_reuse(policy: str) -> None:
    """Say when the pinned allocator hands a freed block out again.

    ``"safe"``: once the copies that read or write it have run. ``"early"``: at once, as a
    vendor's allocator was seen to do (vllm-ascend 15719): a copy that was queued before then
    reads what the block's next owner wrote.
    """
    if policy not in ("safe", "early"):
        expected, fix = '"safe" or "early"', "Pass one of them"
        raise ArgumentValueError(describe("set_pinned_reuse", "`policy`", policy, expected, fix))
    native().set_pinned_reuse(policy == "early")


def get_pinned_reuse() -> str:
    """Return when pinned blocks are reused: ``"safe"`` or ``"early"``."""
    return "early" if native().pinned_reuse_is_early() else "safe"


@contextlib.contextmanager
def pinned_reuse(policy: str) -> Iterator[None]:
    """Set when pinned blocks are reused for a while; as :func:`set_pinned_reuse`."""
    before = get_pinned_reuse()
    set_pinned_reuse(policy)
    try:
        yield
    finally:
        set_pinned_reuse(before)
