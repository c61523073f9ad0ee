"""Whatever a hook returns wrong is refused when the plugin is bound, with hook, value and fix."""

from __future__ import annotations

import dataclasses
import types

import pytest
import torch

from hwcore.discovery import BUILTIN
from hwcore.errors import PluginReturnError
from hwcore.types import (
    Availability,
    BackendInfo,
    CompilePolicy,
    HostMemoryPolicy,
    MemoryInfo,
    PlanStreamPolicy,
    TransferEngineSpec,
)
from hwcore.validation import Validator

from ._plugins import INFO, answers, live_backend, refused

GOOD = {
    BackendInfo: INFO,
    Availability: {"ok": False, "reason": "no card", "fix": "Buy one"},
    MemoryInfo: {"free_bytes": 1, "total_bytes": 2},
    CompilePolicy: {"enabled": True},
    HostMemoryPolicy: {},
    PlanStreamPolicy: {},
    TransferEngineSpec: {"name": "shm", "protocol": "memfd"},
}
HOOK = {
    BackendInfo: "backend_info",
    Availability: "probe",
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
    Availability: {
        "ok": NOT_BOOL,
        "reason": [(None, "expected `str`"), (b"x", "expected `str`")],
        "fix": [(None, "expected `str`"), (3, "expected `str`")],
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


def ask(hook, value):
    """Have a hook's answer checked: probe()'s in the way of the child process that asks it."""
    if hook == "probe":
        Validator(BUILTIN, {"probe": lambda: value}).availability()
    else:
        live_backend(**{hook: answers(value)})


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
        ask(hook, answer)
    message = str(caught.value)
    assert f"{hook}() field `{field}` got {value!r} ({type(value).__name__}); " in message
    assert expected in message
    assert f" {kind.__name__} with such a `{field}`. " in message
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
    with pytest.raises(
        PluginReturnError, match=rf"{hook}\(\) got .*; expected an? [A-Z]\w+\. Retu"
    ):
        ask(hook, value)


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
    info = BackendInfo(**{**INFO, "quirks": frozenset()})
    parts = ("expected index 0, or the quirk `unindexed_device` in backend_info(). Put the index",)
    hooks = {"backend_info": answers(info), "device_string": answers(value)}
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


def test_a_list_for_a_frozenset_is_refused():
    policy = PlanStreamPolicy(recompute_after_join=["mrope_positions"])
    refused(
        "plan_stream_policy",
        "field `recompute_after_join` got ['mrope_positions'] (list)",
        "expected a frozenset",
        plan_stream_policy=answers(policy),
    )


def test_a_value_that_looks_like_a_message_does_not_confuse():
    info = BackendInfo(**{**INFO, "capabilities": frozenset({"x - at y"})})
    refused("backend_info", "field `capabilities`", "values among", backend_info=answers(info))
