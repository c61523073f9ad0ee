"""Errors with one shape: where, what came, what was expected, what to do.

Every class derives from :class:`HwcoreError` and from the builtin that fits, so that callers may
catch either. Messages read ``<part>: <argument> got <value>; expected <condition>. <Fix>.``
"""

from __future__ import annotations

__all__ = [
    "AllocationCancelledError",
    "AllocationTimeoutError",
    "ApiVersionError",
    "ArgumentTypeError",
    "ArgumentValueError",
    "BackendUnavailableError",
    "CapabilityError",
    "CaptureError",
    "ClosedError",
    "ConsumeOnceError",
    "ForkError",
    "HwcoreError",
    "LateWriteError",
    "LeaseError",
    "PeerError",
    "PeerRefusedError",
    "PeerTimeoutError",
    "PluginDefinitionError",
    "PluginError",
    "PluginLoadError",
    "PluginReturnError",
    "ProbeError",
    "RequestError",
    "RequestTimeoutError",
    "SelectionError",
    "SetupError",
    "StaleGraphError",
    "TorchImportError",
    "TransferAbortedError",
    "UnknownBackendError",
    "describe",
    "no_interprocess_events",
    "shown",
]


class HwcoreError(Exception):
    """Base of every error that hwcore raises."""


class ArgumentTypeError(HwcoreError, TypeError):
    """A caller passed a value of the wrong type (dtype, rank or device of a tensor included)."""


class ArgumentValueError(HwcoreError, ValueError):
    """A caller passed a value of the right type that the function cannot take."""


class CapabilityError(HwcoreError, RuntimeError):
    """The device, or its plugin, cannot do what was asked."""


class CaptureError(HwcoreError, RuntimeError):
    """Work that a graph cannot hold was done while capturing, or capture was misused."""


class ClosedError(HwcoreError, RuntimeError):
    """An object was used after it was closed."""


class PeerError(HwcoreError, ConnectionError):
    """Another process did not take part in a collective or a transfer: it is gone, or hangs."""


class PeerTimeoutError(PeerError, TimeoutError):
    """Another process did not answer before the deadline. It may be alive."""


class LateWriteError(PeerTimeoutError):
    """What another process was sent had not landed by the deadline, and may land later.

    Its memory must not be given to others before the writer's engine was closed.
    """


class PeerRefusedError(PeerError, PermissionError):
    """Another process, or this one, did not accept who is at the other end."""


class RequestError(HwcoreError, RuntimeError):
    """A router's request has no result.

    Attributes
    ----------
    request_id : str
    reason : str
        ``busy``, ``duplicate``, ``cancelled``, ``deadline``, ``too large``, ``failed``, ``died`` or
        ``draining``.
    retryable : bool
        Whether the same request may have a result later, as another attempt.
    """

    def __init__(self, message: str, request_id: str, reason: str, retryable: bool) -> None:
        super().__init__(message)
        self.request_id, self.reason, self.retryable = request_id, reason, retryable

    def __reduce__(self) -> tuple[type[RequestError], tuple[str, str, str, bool]]:
        # BaseException pickles `args` alone, which is the message.
        return (type(self), (str(self), self.request_id, self.reason, self.retryable))


class RequestTimeoutError(RequestError, TimeoutError):
    """A router's request had no result by its deadline."""


class LeaseError(HwcoreError, LookupError):
    """A lease of a pool was used that is not, or no longer, one of its leases."""


class AllocationTimeoutError(HwcoreError, TimeoutError):
    """A pool had no room for a request before its deadline."""


class AllocationCancelledError(HwcoreError, RuntimeError):
    """A request that was waiting for room in a pool was cancelled."""


class TransferAbortedError(HwcoreError, RuntimeError):
    """A request whose tensors were being staged or sent was aborted."""


class ConsumeOnceError(HwcoreError, RuntimeError):
    """A row of a relay buffer was not written once and read once, in turn.

    Attributes
    ----------
    buffer : str
        The buffer, such as ``"next_token"``.
    row : int
        The row at fault; of several at once the one that was found first.
    iteration : int
        Number of ``resolve`` calls up to then.
    kind : str
        What happened, such as ``"read before it was written"``.
    """

    def __init__(self, buffer: str, row: int, iteration: int, kind: str, fix: str) -> None:
        super().__init__(
            f"FutureMap: row {row} of `{buffer}` was {kind}, in iteration {iteration}; expected "
            f"one stash and one resolve of a row in turn. {fix}."
        )
        self.buffer = buffer
        self.row = row
        self.iteration = iteration
        self.kind = kind
        self._fix = fix

    def __reduce__(self) -> tuple[type[ConsumeOnceError], tuple[str, int, int, str, str]]:
        # BaseException pickles `args` alone, which is the message.
        return (type(self), (self.buffer, self.row, self.iteration, self.kind, self._fix))


class StaleGraphError(CaptureError):
    """Memory that captured graphs address has moved; a replay would use what is there now."""


class TorchImportError(HwcoreError, ImportError):
    """``import torch`` failed when the selected backend needed it."""


class SelectionError(HwcoreError, RuntimeError):
    """No backend, or more than one, answers to what was asked for."""


class UnknownBackendError(SelectionError, LookupError):
    """A backend was named that no installed distribution provides."""


class BackendUnavailableError(SelectionError):
    """A backend was named whose probe says that this machine cannot run it."""


class ForkError(HwcoreError, RuntimeError):
    """The process was forked from one that already held a live device context."""


class PluginError(HwcoreError):
    """A plugin broke its contract. The attributes say which plugin and which hook.

    Attributes
    ----------
    plugin : str
        The backend's name.
    hook : str or None
        The hook at fault, where there is one.
    """

    def __init__(self, message: str, plugin: str = "", hook: str | None = None) -> None:
        super().__init__(message)
        self.plugin = plugin
        self.hook = hook

    def __reduce__(self) -> tuple[type[PluginError], tuple[str, str, str | None]]:
        # BaseException pickles `args` alone, which would drop the attributes.
        return (type(self), (str(self), self.plugin, self.hook))


class PluginLoadError(PluginError, ImportError):
    """A plugin's entry point could not be imported, or names something that is not there."""


class PluginDefinitionError(PluginError, TypeError):
    """A plugin lacks a required hook, or defines one that the contract does not have."""


class PluginReturnError(PluginError, ValueError):
    """A hook returned what its specification does not allow."""


class ApiVersionError(PluginError, RuntimeError):
    """A plugin was written for another version of the hook contract."""


class ProbeError(PluginError, RuntimeError):
    """A plugin's ``probe()`` raised, crashed the process or hung."""


class SetupError(PluginError, RuntimeError):
    """A plugin's ``setup()``, or a hook called while activating it, raised."""


def shown(value: object, limit: int = 200) -> str:
    """Return a short ``repr`` of a value with its type, safe on objects whose repr raises."""
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001 - a broken repr must not hide the error being reported
        text = "<unprintable>"
    if len(text) > limit:
        text = text[: limit - 1] + "…"
    return f"{text} ({type(value).__name__})"


def describe(where: str, what: str, got: object, expected: str, fix: str) -> str:
    """Return a message in the one shape that hwcore's errors have.

    Parameters
    ----------
    where : str
        The function, part or plugin that speaks.
    what : str
        The argument, field or hook at fault.
    got : object
        The offending value; a ``str`` is shown as it stands if it is wrapped by the caller.
    expected : str
        The condition that the value misses.
    fix : str
        An imperative sentence without its full stop.
    """
    return f"{where}: {what} got {shown(got)}; expected {expected}. {fix}."


def no_interprocess_events(device_type: str) -> CapabilityError:
    """Return what a device says whose events no other process can open."""
    message = (
        f"create_event: `interprocess` got True; expected False, for events of `{device_type}` "
        f"cannot be shared between processes. Wait for the event and send a message instead, or "
        f"look for `interprocess_events` in backend_info().capabilities."
    )
    return CapabilityError(message)
