"""The graphs of all buckets: captured together, found by batch, released together."""

from __future__ import annotations

import bisect
import contextlib
import logging
from typing import TYPE_CHECKING, Any

import torch

from hwcore.errors import CaptureError
from hwcore.graphs import budget
from hwcore.graphs.addresses import Addresses
from hwcore.graphs.captured import Captured, agree
from hwcore.graphs.prepared import Verdict
from hwcore.graphs.progress import progress_bar

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from hwcore.backend import Backend
    from hwcore.graphs.buffers import GraphBuffers
    from hwcore.graphs.slots import Bucket
    from hwcore.types import Stream

__all__ = ["GraphSet"]

_log = logging.getLogger("hwcore")


class GraphSet:
    """A graph for each bucket of some buffers; all of them, or none.

    Parameters are those of :class:`~hwcore.graphs.GraphRunner`.

    Attributes
    ----------
    graphs : dict of Bucket to Captured
    static : Addresses or None
        Where the static tensors were at capture; None where there are none to look after.
    """

    def __init__(
        self,
        hw: Backend,
        fn: Callable[..., Any],
        buffers: GraphBuffers,
        warm_ups: int,
        capture_budget: int | None,
        static: Mapping[str, Any],
        progress: bool | None,
    ) -> None:
        self._hw, self._fn, self._buffers = hw, fn, buffers
        self._warm_ups = warm_ups
        self._budget = capture_budget
        self._static = static
        self._progress = progress
        self._reserved: budget.Reservation | None = None
        self.graphs: dict[Bucket, Captured] = {}
        self.static: Addresses | None = None
        self._batch_sizes: dict[int, list[int]] = {}
        for tokens_per_request, batch_size in sorted(bucket[::-1] for bucket in buffers.buckets):
            self._batch_sizes.setdefault(tokens_per_request, []).append(batch_size)

    def find(self, batch_size: int, tokens_per_request: int) -> Verdict:
        """Return the smallest bucket that takes a batch, or why there is none."""
        if not self.graphs:
            return Verdict(None, "not captured", "nothing was captured yet; call capture()")
        sizes = self._batch_sizes.get(tokens_per_request)
        if sizes is None:
            known = ", ".join(map(str, self._batch_sizes))
            reason = f"{tokens_per_request} tokens per request have no bucket, only {known} have"
            return Verdict(None, "tokens per request", reason)
        index = bisect.bisect_left(sizes, batch_size)
        if index == len(sizes):
            reason = (
                f"a batch of {batch_size} requests is larger than the largest bucket for "
                f"{tokens_per_request} tokens per request, {sizes[-1]}"
            )
            return Verdict(None, "batch size", reason)
        return Verdict((sizes[index], tokens_per_request))

    def capture(self) -> None:
        """Capture every bucket, largest first, in one memory pool; see ``GraphRunner.capture``."""
        buckets = self._buffers.buckets
        self._reserved = budget.reserve(self._hw, len(buckets), self._budget, self)
        try:
            addresses = Addresses(self._static)
            self._capture_all()
            addresses.check("GraphRunner.capture", "Move it before the capture, or never")
        except BaseException:
            # Warm-ups may be queued still; and what a device says of them is the lesser news.
            with contextlib.suppress(Exception):
                self._hw.synchronize(self._buffers.device)
            self.release()
            raise
        finally:
            self._buffers.spoil()  # by a function that writes into its inputs
        self.static = addresses if self._static else None

    def release(self) -> None:
        """Let go of all graphs. Their last replay has finished, as the caller knows."""
        self.graphs = {}
        self.static = None
        if self._reserved is not None:
            self._reserved.release()

    def _capture_all(self) -> None:
        hw, device = self._hw, self._buffers.device
        hw.synchronize(device)  # what the function reads may have been written by any stream
        pool, stream = hw.graph_pool(), hw.create_stream(device)
        free = hw.memory_info(device.index).free_bytes

        def used_bytes() -> int:
            return max(0, free - hw.memory_info(device.index).free_bytes)

        buckets = self._buffers.buckets
        with progress_bar(len(buckets), self._progress, used_bytes) as move:
            # Largest first: what it frees in the pool is large enough for each that follows.
            for done, bucket in enumerate(buckets):
                move(done, str(bucket))
                try:
                    with torch.no_grad():
                        self.graphs[bucket] = self._capture_one(bucket, pool, stream)
                except torch.OutOfMemoryError as error:
                    raise self._out_of_memory(bucket, done, used_bytes, error) from error
                except Exception as error:
                    message = (
                        f"GraphRunner.capture: bucket {bucket} got {error!r}; expected fn to run "
                        f"on it and to be captured. Correct that, or leave the bucket out; all "
                        f"graphs were released."
                    )
                    raise CaptureError(message) from error
            move(len(buckets), "")
        agree(list(self.graphs.values()))
        size = used_bytes() / 2**20
        _log.info("%d graphs captured on %s, %.0f MiB used", len(buckets), device, size)

    def _out_of_memory(
        self,
        bucket: Bucket,
        done: int,
        used_bytes: Callable[[], int],
        error: torch.OutOfMemoryError,
    ) -> CaptureError:
        """Return the error that says how much memory the buckets took, up to the one that failed.

        Larger buckets come first and share their pool, so that a later one needs little more.
        """
        device = self._buffers.device
        buckets = self._buffers.buckets
        inputs = self._buffers.memory.nbytes
        try:
            memory, used = self._hw.memory_info(device.index), used_bytes()
        except Exception as unknown:  # noqa: BLE001 - it would hide what is wrong
            left = f"what they took and what is free is not known: {unknown!r}"
        else:
            left = (
                f"capturing took {used / 2**20:.0f} MiB; {memory.free_bytes / 2**20:.0f} MiB of "
                f"{memory.total_bytes / 2**20:.0f} MiB are free"
            )
        message = (
            f"GraphRunner.capture: bucket {bucket} got no memory on {device}: {error}; expected "
            f"enough for {len(buckets)} buckets. {done} were captured; the inputs of all take "
            f"{inputs / 2**20:.0f} MiB; {left}. Leave out the largest batch sizes, or make other "
            f"pools (a KV cache) smaller; all graphs were released."
        )
        return CaptureError(message)

    def _capture_one(self, bucket: Bucket, pool: Any, stream: Stream) -> Captured:
        """Warm a bucket up and capture it, each time on nothing but padding."""
        hw, buffers = self._hw, self._buffers
        buffers.spoil()
        buffers.write(buffers.rows(bucket, 0), [])
        padding = buffers.memory.clone()
        hw.wait_stream(stream, hw.current_stream(buffers.device))
        written = False

        def restored() -> bool:
            """Make the inputs padding again; say whether they were something else. Waits."""
            hw.synchronize_stream(stream)
            changed = not torch.equal(buffers.memory, padding)
            if changed:
                buffers.memory.copy_(padding)
            return changed

        with hw.stream_context(stream):
            for _ in range(self._warm_ups):
                self._fn(**buffers.views(bucket))
                written |= restored()
        hw.synchronize_stream(stream)
        captured = Captured(hw, self._fn, buffers, bucket, pool, stream)
        with hw.stream_context(stream):
            written |= restored()
        hw.synchronize_stream(stream)
        # Kernels write what torch does not count, and torch counts what leaves no other value.
        captured.writes_inputs |= written
        return captured
