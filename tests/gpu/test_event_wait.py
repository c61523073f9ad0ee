"""How a stream waits on AMD GPUs: never less than was asked for."""

from __future__ import annotations

import types

import pytest

from hwcore.errors import ArgumentValueError
from hwcore_hip import event_wait

from .conftest import GPUS


class Waited:
    """An event, or a stream, that has been reached or not."""

    def __init__(self, reached):
        self.reached, self.calls = reached, []

    def query(self):
        self.calls.append("query")
        return self.reached

    def synchronize(self):
        self.calls.append("synchronize")

    def wait(self, stream):
        self.calls.append("wait")

    def wait_stream(self, producer):
        self.calls.append("wait_stream")


@pytest.fixture(params=["hip"])
def gpu(request):
    return GPUS[request.param]


@pytest.mark.parametrize(
    ("policy", "reached", "expected"),
    [
        ("device", True, ["wait"]),
        ("device", False, ["wait"]),
        ("pending", True, ["query"]),
        ("pending", False, ["query", "wait"]),
        ("host", False, ["synchronize"]),
    ],
)
def test_each_policy_leaves_an_order(plugin, policy, reached, expected):
    plugin._event_wait = policy
    event, producer, waiter = Waited(reached), Waited(reached), Waited(False)
    plugin.wait_event(event)
    plugin.wait_stream(waiter, producer)
    assert event.calls == expected
    assert producer.calls + waiter.calls == [
        {"wait": "wait_stream"}.get(call, call) for call in expected
    ]


@pytest.mark.parametrize("policy", ["pending", "host"])
def test_in_a_capture_the_device_waits_on_whatever_stream(plugin, policy):
    plugin._event_wait = policy
    event, seen = Waited(True), []

    def forks():
        # A side stream takes part in no capture before it has waited.
        seen.append(plugin.is_capturing())
        plugin.wait_event(event, "side")

    plugin.graph_capture(plugin.create_graph(), forks)
    assert (seen, event.calls) == ([False], ["wait"])


def test_so_it_does_in_a_capture_that_no_hook_began(plugin, fake):
    plugin._event_wait = "pending"
    fake.answers["is_current_stream_capturing"] = lambda: True
    event = Waited(True)
    plugin.wait_event(event)
    assert event.calls == ["wait"]


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("gfx942:sramecc+:xnack-", ["query"]),
        ("gfx950:sramecc+:xnack-", ["query"]),
        ("gfx90a:sramecc+:xnack-", ["wait"]),
        ("gfx1100", ["wait"]),
    ],
)
def test_the_gpu_decides_at_the_first_wait(plugin, fake, architecture, expected):
    properties = types.SimpleNamespace(gcnArchName=architecture)
    fake.answers["get_device_properties"] = lambda device: properties
    event = Waited(True)
    plugin.wait_event(event)
    plugin.wait_event(event)
    assert event.calls == expected * 2
    assert len(fake.named("get_device_properties")) == 1


def test_the_variable_decides_over_the_gpu(gpu, fake, monkeypatch):
    monkeypatch.setenv(event_wait.VARIABLE, "host")
    plugin = gpu.plugin()
    plugin.setup()
    event = Waited(False)
    plugin.wait_event(event)
    assert event.calls == ["synchronize"]


def test_a_policy_that_does_not_exist_is_refused_at_set_up(gpu, fake, monkeypatch):
    monkeypatch.setenv(event_wait.VARIABLE, "spin")
    expected = "expected one of device, pending, host"
    with pytest.raises(ArgumentValueError, match=expected):
        gpu.plugin().setup()
