"""What the hooks speak in: frozen dataclasses, closed lists, and the shape of streams and events.

The annotations are the validation: whatever a hook returns is checked against them once, when the
plugin is activated (see :mod:`hwcore.validation`). Torch is imported for type checkers alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

from msgspec import Meta

if TYPE_CHECKING:
    from types import TracebackType

    import torch

__all__ = [
    "Availability",
    "BackendInfo",
    "Capability",
    "CompilePolicy",
    "CompileRequest",
    "Event",
    "HostMemoryPolicy",
    "HostRegistration",
    "MemoryInfo",
    "PlanStreamPolicy",
    "Quirk",
    "ReplayBatch",
    "Stream",
    "TransferEngineSpec",
]

Capability = Literal[
    "async_streams",  # work on two streams can run at the same time
    "stream_priorities",
    "event_timing",
    "blocking_events",  # synchronize_event can sleep instead of spinning
    "interprocess_events",  # an event can be opened in another process, by its handle
    "graphs",
    "pinned_memory",
    "host_registration",
    "compile",
    "triton",  # the device runs the Triton kernels of the core
    "float64",
    "float8",
    "multi_device",
    "device_direct_transfer",  # a transfer engine may read device memory without the host
]
"""What a device may be able to do. What a plugin does not list is skipped in conformance runs."""

Quirk = Literal[
    "unindexed_device",  # device_string(index) has no index
    "capture_executes",  # graph_capture also does the work once; a device only records it
    "capture_stream_limit",  # graphs beyond a bounded number of capture streams fail
    "fork_unsafe",  # a forked child cannot use the device even before it is initialised
]
"""How a device may differ without lacking anything. A quirk adapts a conformance test."""

Text = Annotated[str, Meta(min_length=1)]
Bytes = Annotated[int, Meta(ge=0)]


@dataclasses.dataclass(frozen=True)
class BackendInfo:
    """Who a backend is. Returned by ``backend_info``.

    Attributes
    ----------
    name : str
        The backend's name; equal to the name of its entry point.
    device_type : str
        The device type that torch knows, the part of a device string before the colon.
    vendor : str
        Who makes the device, for people to read.
    api_version : str
        ``"major.minor"`` of the hook contract that the plugin was written for.
    priority : int
        Rank in automatic selection, in [0, 1000]; the highest available one is taken.
    automatic : bool
        False: selected by name only.
    capabilities : frozenset of Capability
    quirks : frozenset of Quirk
    """

    name: Annotated[str, Meta(pattern=r"^[a-z][a-z0-9_-]*$")]
    device_type: Annotated[str, Meta(pattern=r"^[a-z][a-z0-9_]*$")]
    vendor: Text
    api_version: Annotated[str, Meta(pattern=r"^\d+\.\d+$")]
    priority: Annotated[int, Meta(ge=0, le=1000)] = 100
    automatic: bool = True
    capabilities: frozenset[Capability] = frozenset()
    quirks: frozenset[Quirk] = frozenset()


@dataclasses.dataclass(frozen=True)
class Availability:
    """Whether this machine can run a backend. Returned by ``probe``.

    Attributes
    ----------
    ok : bool
    reason : str
        Why not; required where ``ok`` is False.
    fix : str
        What the user can do about it, an imperative sentence; required where ``ok`` is False.
    """

    ok: bool
    reason: str = ""
    fix: str = ""


@dataclasses.dataclass(frozen=True)
class MemoryInfo:
    """Memory of one device, in bytes, as the whole machine sees it; ``free <= total``."""

    free_bytes: Bytes
    total_bytes: Bytes


@dataclasses.dataclass(frozen=True)
class CompileRequest:
    """What :func:`hwcore.compile` asks a backend about.

    Attributes
    ----------
    name : str
        Qualified name of the function or module, so that a policy can decide for some alone.
    dynamic, fullgraph, mode
        The caller's own arguments, as :func:`torch.compile` takes them.
    """

    name: str
    dynamic: bool | None = None
    fullgraph: bool = False
    mode: str | None = None


@dataclasses.dataclass(frozen=True)
class CompilePolicy:
    """A backend's answer to a :class:`CompileRequest`.

    Attributes
    ----------
    enabled : bool
        False: the plain function runs, and ``reason`` is logged once.
    backend : str
        The compiler that :func:`torch.compile` is given.
    mode, dynamic
        Where not None they win over the caller's: the device knows what it can take.
    reason : str
        Required where ``enabled`` is False.
    """

    enabled: bool
    backend: Text = "inductor"
    mode: str | None = None
    dynamic: bool | None = None
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class HostMemoryPolicy:
    """What the core may assume of host memory. Whatever is False, the core waits for itself.

    Attributes
    ----------
    can_pin : bool
        ``pin_memory`` returns page-locked memory.
    reuse_waits_for_copy : bool
        The pinned allocator hands a block out again only after copies that read it have run.
    copies_ordered_with_kernels : bool
        A host-to-device copy on a stream is ordered with the kernels of that stream.
    """

    can_pin: bool = False
    reuse_waits_for_copy: bool = False
    copies_ordered_with_kernels: bool = False


@dataclasses.dataclass(frozen=True)
class PlanStreamPolicy:
    """Whether step n+1 may be prepared on a side stream, and what must be computed again.

    Attributes
    ----------
    enabled : bool
    recompute_after_join : frozenset of str
        Names of tensors that are not trusted across the join and are recomputed on the main
        stream.
    reason : str
        Required where ``enabled`` is False.
    """

    enabled: bool = True
    recompute_after_join: frozenset[Text] = frozenset()
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class TransferEngineSpec:
    """One way to move tensors between the roles of a disaggregated pipeline.

    Attributes
    ----------
    name : str
        The engine, such as ``"shm"`` or ``"mooncake"``.
    protocol : str
        The engine's own name for its transport, such as ``"memfd"`` or ``"tcp"``.
    memory : {"host", "device"}
        Where the engine reads from and writes to.
    package : str or None
        What to ``pip install`` where the engine is not part of the core.
    options : Mapping
        Passed to the engine as they are.
    """

    name: Text
    protocol: Text
    memory: Literal["host", "device"] = "host"
    package: str | None = None
    options: Mapping[str, str | int | float | bool] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class ReplayBatch:
    """What a backend is told about the batch whose graph it replays.

    Attributes
    ----------
    bucket : (int, int)
        Padded batch size and tokens per request that the graph was captured for.
    seq_lens : tuple of int
        Host copy of the real requests' sequence lengths, in tokens: before the step's own.
    padded_seq_lens : tuple of int
        The same with the padding rows; ``len(padded_seq_lens) == bucket[0]``.
    attention : str
        The attention kind, for a device whose graph update differs by kind.
    plan_stream_active : bool
        The inputs were prepared on a side stream.
    recomputed : Mapping of str to Tensor
        Tensors recomputed after the join, by the names of :class:`PlanStreamPolicy`, each of the
        shape that the graph's buffer has, padding included.
    """

    bucket: tuple[int, int]
    seq_lens: tuple[int, ...]
    padded_seq_lens: tuple[int, ...]
    attention: str = ""
    plan_stream_active: bool = False
    recomputed: Mapping[str, torch.Tensor] = dataclasses.field(default_factory=dict)


class Stream(Protocol):
    """A queue of device work: :class:`torch.Stream`, or an object with the same methods."""

    @property
    def device(self) -> torch.device: ...
    def query(self) -> bool: ...
    def synchronize(self) -> None: ...
    def record_event(self, event: Any = None) -> Any: ...
    def wait_event(self, event: Any) -> None: ...
    def wait_stream(self, stream: Any) -> None: ...
    def __enter__(self) -> Any: ...
    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> Any: ...


class Event(Protocol):
    """A point in a stream: :class:`torch.Event`, or an object with the same methods."""

    def record(self, stream: Any = None) -> None: ...
    def wait(self, stream: Any = None) -> None: ...
    def query(self) -> bool: ...
    def synchronize(self) -> None: ...
    def elapsed_time(self, end_event: Any) -> float:
        """Return the time to a later event, in milliseconds."""
        ...


class HostRegistration(Protocol):
    """Host memory made known to a device, until closed."""

    def close(self) -> None: ...
