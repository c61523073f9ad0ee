"""Checks on what hooks return, made once when a plugin is activated.

Types and ranges come from the annotations in :mod:`hwcore.types`; this module adds the conditions
that span fields, and a short self-check of the stream and event factories.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    NoReturn,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
)

import msgspec

from hwcore.discovery import NEWER_CONTRACT
from hwcore.errors import ApiVersionError, PluginReturnError, ProbeError, SetupError, describe
from hwcore.hookspecs import API_VERSION
from hwcore.types import (
    Availability,
    BackendInfo,
    CompilePolicy,
    CompileRequest,
    Event,
    HostMemoryPolicy,
    MemoryInfo,
    PlanStreamPolicy,
    Stream,
    TransferEngineSpec,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from hwcore.discovery import Origin

__all__ = ["DEVICE_HOOKS", "Validator"]

DEVICE_HOOKS = ("create_stream", "create_event", "current_stream", "memory_info", "generator")
"""Hooks whose check would create a device context, which takes memory and forbids forking."""

_T = TypeVar("_T")
_CONTEXT = ("__enter__", "__exit__")


class Validator:
    """Calls a plugin's hooks and checks their answers; its errors name plugin, hook and fix.

    Parameters
    ----------
    origin : Origin
        Whom the errors name.
    hooks : Mapping of str to callable
        Hook name to what implements it.

    Raises
    ------
    ApiVersionError
        From :meth:`info`, if the plugin was written for another contract.
    PluginReturnError
        From every method, if a hook returned what its specification does not allow.
    ProbeError
        From :meth:`availability`, if ``probe()`` raised.
    SetupError
        From every other method, if a hook raised.
    """

    def __init__(self, origin: Origin, hooks: Mapping[str, Callable[..., Any]]) -> None:
        self._origin = origin
        self._hooks = hooks

    # --- What each hook must return ---

    def info(self) -> BackendInfo:
        """Return the checked ``backend_info()``.

        The contract version is compared first: under another one the fields may mean anything.
        """
        answer = self._call("backend_info")
        self._check_api_version(getattr(answer, "api_version", API_VERSION))
        info = self._dataclass("backend_info", answer, BackendInfo)
        if info.name != self._origin.name:
            expected = f"the entry point's name `{self._origin.name}`"
            self._fail("backend_info", "field `name`", info.name, expected, "Make the two equal")
        return info

    def availability(self) -> Availability:
        """Return the checked answer of ``probe()``."""
        try:
            answer = self._hooks["probe"]()
        except Exception as error:
            message = f"{self._origin}: probe() raised {error!r}. {self._origin.way_past}."
            raise ProbeError(message, self._origin.name, "probe") from error
        found = self._dataclass("probe", answer, Availability)
        if not found.ok:
            self._require_text("probe", "field `reason`", found.reason)
            self._require_text("probe", "field `fix`", found.fix)
        return found

    def host_hooks(self, info: BackendInfo, optional: frozenset[str]) -> None:
        """Check every return that can be had without creating a device context.

        ``optional`` are the hooks that the plugin itself implements; the default of
        ``distributed_backend`` is an error and is not asked.
        """
        import torch

        for index in (None, 0):
            self._check_device_string(info, index)
        count = self._call("device_count")
        if type(count) is not int or count < 1:
            expected = "an int of at least 1, since probe() said that the device is available"
            self._fail("device_count", "", count, expected, "Let probe() say what is missing")
        for hook in ("is_initialized", "is_capturing"):
            self._expect(hook, self._call(hook), bool)
        for purpose in ("serialize", "numpy", "topk"):
            answer = self._call("needs_cpu_fallback", torch.zeros(1), purpose)
            self._expect("needs_cpu_fallback", answer, bool)

        self.compile_policy(self._call("compile_policy", CompileRequest(name="hwcore.validation")))
        plan_policy = self._dataclass(
            "plan_stream_policy", self._call("plan_stream_policy"), PlanStreamPolicy
        )
        if not plan_policy.enabled:
            self._require_text("plan_stream_policy", "field `reason`", plan_policy.reason)
        self._dataclass("host_memory_policy", self._call("host_memory_policy"), HostMemoryPolicy)
        self._check_kernels()
        self._check_transfer_engines()
        if "distributed_backend" in optional:
            name = self._expect("distributed_backend", self._call("distributed_backend"), str)
            self._require_text("distributed_backend", "", name)

    def compile_policy(self, answer: object) -> CompilePolicy:
        """Return a checked policy; an answer may differ from function to function."""
        policy = self._dataclass("compile_policy", answer, CompilePolicy)
        if not policy.enabled:
            self._require_text("compile_policy", "field `reason`", policy.reason)
        return policy

    def device_hooks(self, info: BackendInfo) -> None:
        """Check what touches the device: memory, generator, a round through streams and events."""
        import torch

        memory = self._dataclass("memory_info", self._call("memory_info", None), MemoryInfo)
        if memory.free_bytes > memory.total_bytes:
            self._fail("memory_info", "", memory, "free_bytes <= total_bytes", "Swap the two")
        generator = self._expect("generator", self._call("generator", None), torch.Generator)
        self._expect_device("generator", info, generator.device)

        before = self._expect_stream("current_stream", info, self._call("current_stream", None))
        stream = self._expect_stream("create_stream", info, self._call("create_stream", None, 0))
        event = self._call("create_event", None, False, False)
        self._expect_protocol("create_event", event, Event)
        context = self._context(stream)
        self._run("stream_context", context.__enter__)
        try:
            self._expect_current("inside stream_context()", stream)
            self._call("record_event", event, None)
        finally:
            self._run("stream_context", context.__exit__, None, None, None)
        self._expect_current("after stream_context()", before)
        self._call("wait_event", event, before)
        self._call("wait_stream", before, stream)
        self._call("synchronize_stream", stream)
        self._call("synchronize_event", event)
        if (reached := self._call("query_event", event)) is not True:
            expected = "True after synchronize_event()"
            self._fail("query_event", "", reached, expected, "Let synchronize_event() wait")

    # --- Single hooks ---

    def _check_api_version(self, version: object) -> None:
        match = re.fullmatch(r"(\d+)\.(\d+)", version) if isinstance(version, str) else None
        core = tuple(int(part) for part in API_VERSION.split("."))
        if match is None:
            expected = f'"major.minor", such as "{API_VERSION}"'
            fix = "Return the version of the contract that the plugin was written for"
        else:
            plugin = tuple(int(part) for part in match.groups())
            if plugin[0] == core[0] and plugin[1] <= core[1]:
                return
            expected = f"{core[0]}.x with x <= {core[1]}: this hwcore's contract is {API_VERSION}"
            newer = "hwcore" if plugin > core else self._origin.distribution
            fix = f"Run `pip install -U {newer}`"
        what = "backend_info() field `api_version`"
        message = describe(str(self._origin), what, version, expected, self._fix(fix))
        raise ApiVersionError(message, self._origin.name, "backend_info")

    def _check_device_string(self, info: BackendInfo, index: int | None) -> None:
        import torch

        text = self._call("device_string", index)
        try:
            device = torch.device(text) if isinstance(text, str) else None
        except RuntimeError:
            device = None
        what = f"for index {index}"
        if device is None or device.type != info.device_type:
            expected = f"a string that torch parses as a device of type `{info.device_type}`"
            fix = "Return one, and make backend_info().device_type the same"
            self._fail("device_string", what, text, expected, fix)
        elif index is not None and device.index != index and "unindexed_device" not in info.quirks:
            expected = f"index {index}, or the quirk `unindexed_device` in backend_info()"
            self._fail("device_string", what, text, expected, "Put the index in")

    def _check_kernels(self) -> None:
        kernels = self._call("kernels")
        if not isinstance(kernels, Mapping) or not all(
            isinstance(name, str) and callable(kernel) for name, kernel in kernels.items()
        ):
            expected = "a mapping of operation names to callables"
            self._fail("kernels", "", kernels, expected, "Return {} for none")

    def _check_transfer_engines(self) -> None:
        engines = self._call("transfer_engines")
        if not isinstance(engines, Sequence) or isinstance(engines, str):
            expected = "a sequence of TransferEngineSpec"
            self._fail("transfer_engines", "", engines, expected, "Return () for none")
        for engine in engines:
            self._dataclass("transfer_engines", engine, TransferEngineSpec)

    def _context(self, stream: Stream) -> Any:
        context = self._call("stream_context", stream)
        if not hasattr(context, "__enter__") or not hasattr(context, "__exit__"):
            self._fail("stream_context", "", context, "a context manager", "Return one")
        return context

    def _expect_current(self, when: str, expected: Stream) -> None:
        if (got := self._call("current_stream", None)) != expected:
            fix = "Let stream_context set the stream on entering, and the former one on leaving"
            self._fail("current_stream", when, got, f"{expected!r}", fix)

    def _expect_stream(self, hook: str, info: BackendInfo, value: Any) -> Stream:
        self._expect_protocol(hook, value, Stream)
        self._expect_device(hook, info, value.device)
        stream: Stream = value
        return stream

    # --- Kinds of check ---

    def _call(self, hook: str, *arguments: object) -> Any:
        return self._run(hook, self._hooks[hook], *arguments)

    def _run(self, hook: str, function: Callable[..., Any], *arguments: object) -> Any:
        try:
            return function(*arguments)
        except (Exception, SystemExit) as error:
            newer = hook == "backend_info" and isinstance(error, TypeError)
            message = (
                f"{self._origin}: {hook}() raised {error!r} while the plugin was activated"
                f"{f'; {NEWER_CONTRACT}' if newer else ''}. {self._origin.way_past}."
            )
            raise SetupError(message, self._origin.name, hook) from error

    def _expect(self, hook: str, value: Any, kind: type[_T]) -> _T:
        if not isinstance(value, kind):
            self._fail(hook, "", value, _a(kind), f"Return {_a(kind)}")
        return value

    def _expect_protocol(self, hook: str, value: object, kind: type[Any]) -> None:
        methods = [name for name in vars(kind) if not name.startswith("_") or name in _CONTEXT]
        missing = [name for name in methods if not hasattr(value, name)]
        if missing:
            expected = f"an object that also has {', '.join(missing)}"
            self._fail(hook, "", value, expected, f"Return {_a(kind)} as in hwcore.types")

    def _expect_device(self, hook: str, info: BackendInfo, device: object) -> None:
        if getattr(device, "type", None) != info.device_type:
            expected = f"a device of type `{info.device_type}`"
            self._fail(hook, "attribute `device`", device, expected, "Make it there")

    def _require_text(self, hook: str, what: str, text: str) -> None:
        if not text.strip():
            expected = "text that tells the user why"
            self._fail(hook, what, text, expected, "Say it")

    def _dataclass(self, hook: str, value: object, kind: type[_T]) -> _T:
        """Return ``value`` checked field by field against the annotations of its class."""
        self._expect(hook, value, kind)
        annotations = get_type_hints(kind, include_extras=True)
        fields = {name: getattr(value, name) for name in annotations}
        try:
            converted = msgspec.convert(fields, kind)
        except msgspec.ValidationError as error:
            # "<condition> - at `$.field[0]`", or "... - at `key` in `$.field`" for a mapping's key
            condition, _, path = str(error).rpartition(" - at ")
            field = re.split(r"\W", path.partition("$.")[2], maxsplit=1)[0]
            expected = _expectation(condition, annotations[field])
            fix = f"Return {_a(kind)} with such a `{field}`"
            self._fail(hook, f"field `{field}`", fields[field], expected, fix)
        for field, got in fields.items():
            if getattr(converted, field) != got:  # taken for a set, but callers get what it is
                fix = f"Return {_a(kind)} with a frozenset"
                self._fail(hook, f"field `{field}`", got, "a frozenset", fix)
        return converted

    def _fail(self, hook: str, what: str, got: object, expected: str, fix: str) -> NoReturn:
        message = describe(
            str(self._origin), f"{hook}() {what}".rstrip(), got, expected, self._fix(fix)
        )
        raise PluginReturnError(message, self._origin.name, hook)

    def _fix(self, fix: str) -> str:
        return f"{fix}. {self._origin.way_past}"


def _a(kind: type[Any]) -> str:
    article = "an" if kind.__name__[0] in "AEIOU" else "a"
    return f"{article} {kind.__name__}"


def _expectation(condition: str, annotation: Any) -> str:
    """Turn msgspec's message into what was expected; closed lists are spelt out."""
    if condition.startswith("Expected "):
        return condition.removeprefix("Expected ").partition(", got ")[0]
    while get_origin(annotation) is not Literal:
        annotation = get_args(annotation)[0]
    return f"values among {', '.join(get_args(annotation))}"
