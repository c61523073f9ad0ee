"""The contract: every hook that a backend may implement, in one file.

A plugin decorates functions of these names with :data:`hookimpl`. It may leave out arguments that
it has no use for, and every hook that is not marked *required*: the default then runs, and only
then. An implementation that returns None has still been the one that ran.

A :class:`~hwcore.backend.Backend` resolves each hook once, when the plugin is activated, and
offers it as a plain attribute of the same name with the signature below, so that a call costs
what a call of the plugin's own function costs. Returns are checked at that time
(:mod:`hwcore.validation`), not at every call.

Order of calls: ``backend_info`` and ``probe`` first, in a process without torch; then ``setup``,
once; any other hook only after that. "Current stream" is the calling thread's. Unless a hook says
otherwise it may be called from any thread, must not block the host, and must not raise for any
argument that its specification allows.
"""

# Every hook is `firstresult`: one plugin answers. Parameter defaults are for callers; pluggy is
# shown the same functions without them (see `_spec`), so that they mean one thing everywhere.
# The bodies are empty, for the docstrings are the specification:
# mypy: disable-error-code="empty-body"
from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, TypeVar

import pluggy

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractContextManager

    import torch

    from hwcore.types import (
        Availability,
        BackendInfo,
        CompilePolicy,
        CompileRequest,
        Event,
        HostMemoryPolicy,
        HostRegistration,
        MemoryInfo,
        PlanStreamPolicy,
        ReplayBatch,
        Stream,
        TransferEngineSpec,
    )

__all__ = ["API_VERSION", "HOOKS", "PROJECT", "REQUIRED_HOOKS", "HookSpecs", "hookimpl"]

PROJECT = "hwcore"

API_VERSION = "1.0"
"""Version of this contract. Minor: hooks or fields added. Major: any other change."""

hookimpl = pluggy.HookimplMarker(PROJECT)
"""Decorator for a plugin's implementation of a hook."""

_F = TypeVar("_F", bound="Callable[..., Any]")
_mark = pluggy.HookspecMarker(PROJECT)

HOOKS: dict[str, inspect.Signature] = {}
"""Hook name to its signature without ``self``, in the order of this file."""

REQUIRED_HOOKS = ("backend_info", "probe")


def _spec(function: _F) -> _F:
    """Enter a function in the contract and hide its defaults from pluggy."""
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())[1:]
    HOOKS[function.__name__] = signature.replace(parameters=parameters)
    function.__defaults__ = None
    return _mark(function, firstresult=True)


class HookSpecs:
    """Every hook. The groups follow the life of a backend: found, set up, used, compiled, moved."""

    # --- Who the backend is -------------------------------------------------------------------

    @_spec
    def backend_info(self) -> BackendInfo:
        """Return the backend's name, device type, contract version, rank and abilities.

        *Required.* Called first, several times, before torch may be imported: it is what
        discovery, version check and ranking stand on, so it must not look at the hardware.
        """

    @_spec
    def probe(self) -> Availability:
        """Say whether this machine can run the backend; if not, why, and what to do.

        *Required.* Called in a child process in which importing torch fails, within 2 seconds.
        Look at package metadata, device nodes, driver files and ``dlopen``. Hardware that is not
        there is an answer, not an exception: raising, hanging or crashing counts as a broken
        plugin and stops the user's program, by name.

        Reason: importing a vendor's library to find out whether it works breaks ``import torch``
        for the whole process where it does not.
        """

    @_spec
    def setup(self) -> None:
        """Import the vendor's library and do what must happen once per process.

        Called once, when the backend is first bound, with torch imported and before any hook but
        ``backend_info`` and ``probe``. torch's own loading of device extensions may have been
        off, so import here what the device needs. Must not create a device context.

        Default: nothing.
        """

    # --- Devices ------------------------------------------------------------------------------

    @_spec
    def device_string(self, index: int | None = None) -> str:
        """Return the string that torch takes for device ``index``, or for the current one.

        Default: ``f"{device_type}:{index}"``, and ``device_type`` alone for None.

        Reason: shared code that spells a device out works on one.
        """

    @_spec
    def device_count(self) -> int:
        """Return how many devices this process sees, at least 1. Creates no device context.

        Default: the torch device module's.
        """

    @_spec
    def is_initialized(self) -> bool:
        """Say whether this process holds a live device context.

        Called just before a fork (a child of a live context gets an error naming ``spawn``) and
        at activation (checks that would create a context wait until the caller does).

        Default: the torch device module's; True where it has none.
        """

    @_spec
    def set_device(self, index: int) -> None:
        """Make device ``index`` the calling thread's current device.

        Default: the torch device module's.
        """

    @_spec
    def memory_info(self, index: int | None = None) -> MemoryInfo:
        """Return free and total bytes of device ``index``, or of the current one.

        Called when pools are sized, not per step.

        Default: the torch device module's ``mem_get_info``.
        """

    @_spec
    def manual_seed(self, seed: int) -> None:
        """Seed the default generators of the host and of all devices.

        Default: ``torch.manual_seed``, which seeds both.
        """

    @_spec
    def generator(self, index: int | None = None) -> torch.Generator:
        """Return a new, unseeded generator for tensors on device ``index``.

        Default: ``torch.Generator(device_string(index))``.
        """

    @_spec
    def synchronize(self, device: torch.device | None = None) -> None:
        """Block the host until all work on ``device`` (None: the current one) has finished.

        Default: the torch device module's.
        """

    # --- Streams and events -------------------------------------------------------------------
    # The core orders streams through these hooks alone, never by a stream's own methods: that is
    # how a device's wait policy and the race sanitizer see every edge.

    @_spec
    def create_stream(self, device: torch.device | None = None, priority: int = 0) -> Stream:
        """Return a new stream on ``device`` (None: the current one).

        Lower ``priority`` runs first; a device without priorities ignores it.

        Default: ``torch.Stream``.
        """

    @_spec
    def create_event(
        self,
        device: torch.device | None = None,
        enable_timing: bool = False,
        blocking: bool = False,
        interprocess: bool = False,
    ) -> Event:
        """Return a new event, not yet recorded.

        ``enable_timing``: ``elapsed_time`` works. ``blocking``: the host sleeps in
        ``synchronize_event`` rather than spin. ``interprocess``: ``ipc_handle()`` gives what
        another process makes the same event from, by the class method ``from_ipc_handle``; where
        the device has none, CapabilityError.

        Default: ``torch.Event``, which has no such handle.
        """

    @_spec
    def current_stream(self, device: torch.device | None = None) -> Stream:
        """Return the calling thread's current stream on ``device`` (None: the current device).

        Called per step. Default: ``torch.accelerator.current_stream``.
        """

    @_spec
    def stream_context(self, stream: Stream) -> AbstractContextManager[Any]:
        """Return a context in which ``stream`` is current, and its device the current device.

        On leaving, by an exception too, both are as before. Default: the stream itself.
        """

    @_spec
    def record_event(self, event: Event, stream: Stream | None = None) -> None:
        """Record ``event`` in ``stream`` (None: the current one). The host does not wait.

        Default: ``event.record(stream)``.
        """

    @_spec
    def wait_event(self, event: Event, stream: Stream | None = None) -> None:
        """Make later work in ``stream`` (None: the current one) wait for ``event``.

        The host does not wait. An event that was never recorded is waited for by nobody.

        Default: ``event.wait(stream)``. Reason: on some devices the direct wait is slow enough to
        cost time per output token, and its plugin waits in another way.
        """

    @_spec
    def wait_stream(self, waiter: Stream, producer: Stream) -> None:
        """Make later work in ``waiter`` wait for the work now in ``producer``.

        Default: ``waiter.wait_stream(producer)``.
        """

    @_spec
    def synchronize_stream(self, stream: Stream) -> None:
        """Block the host until the work now in ``stream`` has finished.

        Default: ``stream.synchronize()``.
        """

    @_spec
    def synchronize_event(self, event: Event) -> None:
        """Block the host until ``event`` has been reached; at once if it was never recorded.

        Default: ``event.synchronize()``.
        """

    @_spec
    def query_event(self, event: Event) -> bool:
        """Say without waiting whether ``event`` has been reached; True if never recorded.

        Default: ``event.query()``.
        """

    @_spec
    def record_stream(self, tensor: torch.Tensor, stream: Stream) -> None:
        """Keep the memory of ``tensor`` from reuse until work now in ``stream`` has finished.

        Called when a tensor made on one stream is handed to another.

        Default: ``tensor.record_stream(stream)``. Reason: torch refuses it for host tensors, so
        that without a hook every call needs a guard.
        """

    # --- Compilation and operators ------------------------------------------------------------

    @_spec
    def compile_policy(self, request: CompileRequest) -> CompilePolicy:
        """Decide whether and how a function is compiled.

        Called once per function that :func:`hwcore.compile` wraps, at its first call.

        Default: disabled, with a reason. Reason: a compiler that does not know the device fails
        far from its cause, inside the first step served.
        """

    @_spec
    def needs_cpu_fallback(self, tensor: torch.Tensor, purpose: str) -> bool:
        """Say whether ``tensor`` must be copied to the CPU before it is used for ``purpose``.

        ``purpose`` is ``"serialize"`` (its bytes are read by the host), ``"numpy"``, or the name
        of an operator that the device may lack, such as ``"topk"``; ``"scatter"`` stands for the
        one that works in place as well. The core asks about an operator once, with any tensor of
        the device. After True it runs that one on the CPU, and the host waits for it each time.

        Default: for ``"serialize"`` and ``"numpy"`` any tensor that is not on the CPU; for an
        operator, False.
        """

    @_spec
    def kernels(self) -> Mapping[str, Callable[..., Any]]:
        """Return the device's own kernels by the core's names for the operations.

        Called once. What is not in the mapping runs the portable reference.

        Default: none.
        """

    # --- Host memory --------------------------------------------------------------------------

    @_spec
    def pin_memory(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a page-locked copy of a CPU tensor, or the tensor itself if it is so already.

        Default: ``tensor.pin_memory()``.
        """

    @_spec
    def register_host_memory(self, buffer: memoryview) -> HostRegistration | None:
        """Page-lock existing host memory for the device until the registration is closed.

        ``buffer`` is writable and contiguous. None: the device has no such thing, and copies
        go through memory that is not page-locked.

        Default: None. Reason: shared-memory pools are mapped, not allocated by torch.
        """

    @_spec
    def host_memory_policy(self) -> HostMemoryPolicy:
        """Say what the core may assume of host memory and of copies.

        Called once. Default: nothing may be assumed. Reason: a device was seen to reuse a pinned
        block before the copy that read it had run.
        """

    # --- Graphs -------------------------------------------------------------------------------

    @_spec
    def create_graph(self) -> Any:
        """Return a new, empty graph, to be filled by ``graph_capture``.

        Default: a :class:`~hwcore.graphs.tape.Tape`.
        """

    @_spec
    def graph_pool(self) -> Any:
        """Return a handle of memory that several graphs may share, or None.

        Default: None.
        """

    @_spec
    def graph_capture(
        self, graph: Any, fn: Callable[[], Any], pool: Any = None, stream: Stream | None = None
    ) -> Any:
        """Capture the device work of ``fn()`` in ``graph`` and return the outputs of ``fn``.

        ``fn`` runs once. Its outputs keep their addresses: replays write into them. On an
        exception, that of ``fn`` or the device's, the stream is as before and ``graph`` is empty.

        Default: the tape, which also does the work once (quirk ``capture_executes``).
        """

    @_spec
    def is_capturing(self) -> bool:
        """Say whether the calling thread's current stream is being captured.

        Default: the tape's.
        """

    @_spec
    def graph_replay(
        self,
        graph: Any,
        buffers: Mapping[str, torch.Tensor] | None = None,
        batch: ReplayBatch | None = None,
    ) -> None:
        """Run a captured graph on the current stream.

        ``buffers`` are the graph's static inputs by name, already filled. A device whose graphs
        hold host values updates them here from ``batch``; one that does not trust what a plan
        stream wrote copies ``batch.recomputed`` into ``buffers`` first.

        Default: the graph's own ``replay()``.
        """

    @_spec
    def plan_stream_policy(self) -> PlanStreamPolicy:
        """Say whether the next step may be prepared on a side stream.

        Called once. The user's switch decides over ``enabled``, but not where the device cannot.

        Default: enabled, nothing to recompute.
        """

    # --- Other processes ----------------------------------------------------------------------

    @_spec
    def distributed_backend(self) -> str:
        """Return the ``torch.distributed`` backend for tensors of this device.

        Default: an error. Reason: falling to one that copies through the host works, slowly, and
        nobody finds out.
        """

    @_spec
    def transfer_engines(self) -> Sequence[TransferEngineSpec]:
        """Return the engines that can move this device's tensors, best first.

        Called once per transfer manager. Default: shared memory, then Mooncake over TCP; both in
        host memory.
        """
