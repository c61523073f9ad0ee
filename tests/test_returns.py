"""Whatever a hook returns wrong is refused when the plugin is bound, with hook, value and fix."""

from __future__ import annotations

import contextlib
import dataclasses
import types

import pytest
import torch

import hwcore
from hwcore.cpu import CpuEvent, CpuPlugin, CpuStream
from hwcore.errors import CapabilityError, PluginError, PluginReturnError, SetupError
from hwcore.hookspecs import HOOKS
from hwcore.types import (
    Availability,
    BackendInfo,
    CompilePolicy,
    HostMemoryPolicy,
    MemoryInfo,
    PlanStreamPolicy,
    TransferEngineSpec,
)
from hwcore.validation import DEVICE_HOOKS

GOOD = {
    BackendInfo: {
        "name": "acme",
        "device_type": "cpu",
        "vendor": "Test",
        "api_version": "1.0",
        "quirks": frozenset({"unindexed_device"}),
    },
    Availability: {"ok": False, "reason": "no card", "fix": "Buy one"},
    MemoryInfo: {"free_bytes": 1, "total_bytes": 2},
    CompilePolicy: {"enabled": True},
    HostMemoryPolicy: {},
    PlanStreamPolicy: {},
    TransferEngineSpec: {"name": "shm", "protocol": "memfd"},
}
HOOK = {
    BackendInfo: "backend_info",
    MemoryInfo: "memory_info",
    CompilePolicy: "compile_policy",
    HostMemoryPolicy: "host_memory_policy",
    PlanStreamPolicy: "plan_stream_policy",
    TransferEngineSpec: "transfer_engines",
}
NOT_BOOL = [(1, "expected `bool`"), (None, "expected `bool`"), ("yes", "expected `bool`")]
NOT_TEXT = [(None, "expected `str`"), (3, "expected `str`"), ("", "expected `str` of length >= 1")]
NOT_NAMES = [("mrope", "expected `array`"), ({1}, "expected `str`"), (None, "expected `array`")]
MODES = [(3, "expected `str | null`"), (b"x", "expected `str | null`")]
WRONG = {
    BackendInfo: {
        "name": [("Acme", "matching regex"), ("", "matching regex"), (None, "expected `str`")],
        "device_type": [("cpu:0", "matching regex"), (torch.device("cpu"), "expected `str`")],
        "vendor": NOT_TEXT,
        "priority": [
            (-1, "expected `int` >= 0"),
            (1001, "expected `int` <= 1000"),
            (True, "expected `int`"),
            (1.0, "expected `int`"),
            ("1", "expected `int`"),
        ],
        "automatic": NOT_BOOL,
        "capabilities": [
            (frozenset({"telepathy"}), "expected values among async_streams, stream_priorities"),
            ("graphs", "expected `array`"),
            (None, "expected `array`"),
        ],
        "quirks": [(frozenset({"loud"}), "expected values among unindexed_device, capture")],
    },
    MemoryInfo: {
        "free_bytes": [(-1, "expected `int` >= 0"), (1.5, "expected `int`"), (None, "`int`")],
        "total_bytes": [(-1, "expected `int` >= 0"), (True, "expected `int`"), ("2", "`int`")],
    },
    CompilePolicy: {
        "enabled": NOT_BOOL,
        "backend": NOT_TEXT,
        "mode": MODES,
        "dynamic": [(1, "expected `bool | null`"), ("yes", "expected `bool | null`")],
        "reason": [(None, "expected `str`")],
    },
    HostMemoryPolicy: {
        "can_pin": NOT_BOOL,
        "reuse_waits_for_copy": NOT_BOOL,
        "copies_ordered_with_kernels": NOT_BOOL,
    },
    PlanStreamPolicy: {
        "enabled": NOT_BOOL,
        "recompute_after_join": [*NOT_NAMES, ({""}, "of length >= 1")],
        "reason": [(None, "expected `str`")],
    },
    TransferEngineSpec: {
        "name": NOT_TEXT,
        "protocol": NOT_TEXT,
        "memory": [("disk", "expected values among host, device"), (None, "expected")],
        "package": [(3, "expected `str | null`")],
        "options": [
            (3, "expected `object`"),
            ({"a": None}, "expected `bool | int | float | str`"),
            ({1: "a"}, "expected `str`"),
        ],
    },
}


def backend(live=True, **hooks):
    """Bind the CPU under another name, with some hooks answering something else."""

    def implement(hook, answer):
        function = answer if callable(answer) else lambda self: answer
        namespace[hook] = hwcore.hookimpl(function)

    namespace = {}
    implement("backend_info", BackendInfo(**GOOD[BackendInfo]))
    implement("is_initialized", live)
    for hook, answer in hooks.items():
        implement(hook, answer)
    return hwcore.Backend(type("Acme", (CpuPlugin,), namespace)())


def answers(value):
    return lambda self: value


def refused(hook, got, *parts, kind=PluginReturnError, where="", **hooks):
    with pytest.raises(kind) as caught:
        backend(**hooks)
    message = str(caught.value)
    assert message.startswith(f"plugin `acme` (Acme passed as an object): {hook}() {where}")
    for part in (got, *parts, " Fix the plugin."):
        assert part in message
    assert caught.value.plugin == "acme"
    assert caught.value.hook == hook
    return message


# --- Fields ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "field", "value", "expected"),
    [
        pytest.param(kind, field, value, expected, id=f"{kind.__name__}.{field}-{value!r}")
        for kind, fields in WRONG.items()
        for field, cases in fields.items()
        for value, expected in cases
    ],
)
def test_field(kind, field, value, expected):
    answer = kind(**{**GOOD[kind], field: value})
    if kind is TransferEngineSpec:
        answer = (answer,)
    hook = HOOK[kind]
    with pytest.raises(PluginReturnError) as caught:
        backend(**{hook: answers(answer)})
    message = str(caught.value)
    assert f"{hook}() field `{field}` got {value!r} ({type(value).__name__}); " in message
    assert expected in message
    assert f"Return a {kind.__name__} with such a `{field}`. " in message
    assert caught.value.hook == hook


def test_every_field_that_a_hook_returns_is_wrong_once():
    for kind, fields in WRONG.items():
        checked = {field.name for field in dataclasses.fields(kind)} - {"api_version"}
        assert checked == set(fields), "api_version: see test_broken_plugins.py"


@pytest.mark.parametrize("hook", HOOK.values())
@pytest.mark.parametrize("value", [None, {}, types.SimpleNamespace()], ids=repr)
def test_something_else_than_the_dataclass(hook, value):
    if hook == "transfer_engines":
        value = [value]
    with pytest.raises(PluginReturnError, match=rf"{hook}\(\) got .*; expected a [A-Z]\w+\. Retu"):
        backend(**{hook: answers(value)})


@pytest.mark.parametrize(
    ("hook", "policy"),
    [
        ("compile_policy", CompilePolicy(enabled=False)),
        ("compile_policy", CompilePolicy(enabled=False, reason=" ")),
        ("plan_stream_policy", PlanStreamPolicy(enabled=False)),
    ],
)
def test_a_policy_that_says_no_gives_a_reason(hook, policy):
    got = f"field `reason` got {policy.reason!r} (str); expected text that tells the user why"
    refused(hook, got, **{hook: answers(policy)})


# --- Hooks that need no device --------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, torch.device("cpu"), "gpu", "", "cuda", "meta:0"])
def test_device_string_of_another_device(value):
    expected = "expected a string that torch parses as a device of type `cpu`"
    refused(
        "device_string", f"for index None got {value!r}", expected, device_string=answers(value)
    )


@pytest.mark.parametrize("value", ["cpu", "cpu:1"])
def test_device_string_without_the_index(value):
    info = BackendInfo(**{**GOOD[BackendInfo], "quirks": frozenset()})
    parts = ("expected index 0, or the quirk `unindexed_device` in backend_info(). Put the index",)
    hooks = {"backend_info": info, "device_string": answers(value)}
    refused("device_string", f"for index 0 got '{value}' (str)", *parts, **hooks)


@pytest.mark.parametrize("value", [0, -1, True, 1.0, None, "1"])
def test_device_count(value):
    expected = "expected an int of at least 1, since probe() said that the device is available"
    refused("device_count", f"got {value!r}", expected, device_count=answers(value))


@pytest.mark.parametrize("hook", ["is_initialized", "is_capturing", "needs_cpu_fallback"])
@pytest.mark.parametrize("value", [0, None, "no"])
def test_a_question_is_answered_by_a_bool(hook, value):
    refused(hook, f"got {value!r}", "expected a bool. Return a bool", **{hook: answers(value)})


@pytest.mark.parametrize("value", [None, ["topk"], {"topk": 3}, {3: len}], ids=repr)
def test_kernels(value):
    expected = "expected a mapping of operation names to callables. Return {} for none"
    refused("kernels", f"got {value!r}", expected, kernels=answers(value))


@pytest.mark.parametrize("value", [None, "shm", {"shm"}, 3], ids=repr)
def test_transfer_engines(value):
    expected = "expected a sequence of TransferEngineSpec. Return () for none"
    refused("transfer_engines", f"got {value!r}", expected, transfer_engines=answers(value))


@pytest.mark.parametrize("value", ["", " ", None, 3])
def test_distributed_backend(value):
    expected = "expected text" if isinstance(value, str) else "expected a str"
    refused("distributed_backend", f"got {value!r}", expected, distributed_backend=answers(value))


# --- Hooks that need the device -------------------------------------------------------------------


def test_memory_that_is_more_free_than_there_is():
    swapped = MemoryInfo(free_bytes=2, total_bytes=1)
    parts = ("expected free_bytes <= total_bytes. Swap the two",)
    refused("memory_info", f"got {swapped!r}", *parts, memory_info=answers(swapped))


@pytest.mark.parametrize("value", [None, 0, torch.Generator], ids=repr)
def test_generator(value):
    refused("generator", "got ", "expected a Generator", generator=answers(value))


@pytest.mark.parametrize("hook", ["create_stream", "current_stream"])
def test_a_stream_that_is_none(hook):
    expected = "query, synchronize, record_event, wait_event, wait_stream"
    refused(hook, "got 3 (int)", expected, "Return a hwcore.types.Stream", **{hook: answers(3)})


def test_a_stream_of_another_device():
    stream = CpuStream(torch.device("meta"))
    got = "attribute `device` got device(type='meta') (device); expected a device of type `cpu`"
    refused("create_stream", got, create_stream=answers(stream))


def test_an_event_that_lacks_methods():
    event = types.SimpleNamespace(record=print, wait=print, query=print)
    expected = "synchronize, elapsed_time. Return a hwcore.types.Event"
    refused("create_event", "got namespace(", expected, create_event=answers(event))


def test_a_stream_context_that_is_none():
    parts = ("expected a context manager",)
    refused("stream_context", "got None (NoneType)", *parts, stream_context=answers(None))


def test_a_current_stream_that_ignores_the_context():
    only = CpuStream(torch.device("cpu"))
    fix = "Let stream_context set the stream on entering"
    where = "inside stream_context() got <hwcore CpuStream"
    refused("current_stream", where, fix, current_stream=answers(only))
    refused("current_stream", where, fix, stream_context=lambda self: contextlib.nullcontext())


def test_a_stream_context_that_does_not_restore():
    @contextlib.contextmanager
    def stays(self, stream):
        stream.__enter__()
        yield

    parts = ("after stream_context() got <hwcore CpuStream", "the former one on leaving")
    refused("current_stream", *parts, stream_context=stays)
    CpuStream(torch.device("cpu")).__exit__(None, None, None)  # put that right


@pytest.mark.parametrize("value", [False, None, 1])
def test_an_event_that_is_not_reached_after_waiting_for_it(value):
    expected = "expected True after synchronize_event(). Let synchronize_event() wait"
    refused("query_event", f"got {value!r}", expected, query_event=answers(value))


# --- Hooks that raise -----------------------------------------------------------------------------

# The others are called for a purpose only, never to see what they answer.
CHECKED = [
    hook
    for hook in HOOKS
    if hook
    not in (
        *("setup", "probe", "set_device", "manual_seed", "synchronize", "record_stream"),
        *("pin_memory", "register_host_memory"),
        *("create_graph", "graph_pool", "graph_capture", "graph_replay"),
    )
]


@pytest.mark.parametrize("hook", CHECKED)
def test_a_hook_that_raises_is_named(hook):
    def raises(self):
        msg = "lost the bus"
        raise OSError(msg)

    with pytest.raises(SetupError) as caught:
        backend(**{hook: raises})
    message = f"{hook}() raised OSError('lost the bus') while the plugin was activated."
    assert message in str(caught.value)
    assert str(caught.value).endswith(" Fix the plugin.")
    assert caught.value.hook == hook
    assert isinstance(caught.value.__cause__, OSError)


def test_a_stream_context_that_raises_as_it_is_entered_is_named():
    @contextlib.contextmanager
    def raises(self, stream):
        msg = "lost the bus"
        raise OSError(msg)
        yield

    with pytest.raises(PluginError, match=r"stream_context.*lost the bus"):
        backend(stream_context=raises)


def test_the_default_of_a_hook_that_needs_a_plugin_says_so():
    class Bare:
        @hwcore.hookimpl
        def backend_info(self):
            return BackendInfo(**GOOD[BackendInfo])

        @hwcore.hookimpl
        def probe(self):
            return Availability(ok=True)

        @hwcore.hookimpl
        def is_initialized(self):
            return False

    hw = hwcore.Backend(Bare())
    with pytest.raises(CapabilityError) as caught:
        hw.distributed_backend()
    assert "backend `acme`: distributed_backend() has no default" in str(caught.value)
    assert "Implement the hook in the plugin" in str(caught.value)


# --- What is right --------------------------------------------------------------------------------


def test_the_plugin_that_the_cases_start_from_is_right():
    hw = backend()
    assert hw.info.name == "acme"
    for hook in DEVICE_HOOKS:
        assert callable(getattr(hw, hook))
    assert isinstance(hw.create_event(), CpuEvent)
    assert backend(kernels={"topk": torch.topk}, transfer_engines=()).kernels() == {
        "topk": torch.topk
    }
