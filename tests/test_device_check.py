"""What touches the device is checked before it is first used, and named where it is wrong."""

from __future__ import annotations

import contextlib
import types

import pytest
import torch

import hwcore
from hwcore.cpu import CpuEvent, CpuStream
from hwcore.errors import CapabilityError, PluginError, SetupError
from hwcore.hookspecs import HOOKS
from hwcore.types import MemoryInfo
from hwcore.validation import DEVICE_HOOKS

from ._plugins import Acme, Minimal, answers, live_backend, refused

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
    refused(
        hook, "got 3 (int)", expected, "Return a Stream as in hwcore.types", **{hook: answers(3)}
    )


def test_a_stream_of_another_device():
    stream = CpuStream(torch.device("meta"))
    got = "attribute `device` got device(type='meta') (device); expected a device of type `cpu`"
    refused("create_stream", got, create_stream=answers(stream))


def test_an_event_that_lacks_methods():
    event = types.SimpleNamespace(record=print, wait=print, query=print)
    expected = "synchronize, elapsed_time. Return an Event as in hwcore.types"
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
        live_backend(**{hook: raises})
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
        live_backend(stream_context=raises)


def test_the_default_of_a_hook_that_needs_a_plugin_says_so():
    hw = hwcore.Backend(Minimal())
    with pytest.raises(CapabilityError) as caught:
        hw.distributed_backend()
    assert "backend `acme`: distributed_backend() has no default" in str(caught.value)
    assert "Implement the hook in the plugin" in str(caught.value)


# --- What is right --------------------------------------------------------------------------------


def test_the_plugin_that_the_cases_start_from_is_right():
    hw = live_backend()
    assert hw.info.name == "acme"
    for hook in DEVICE_HOOKS:
        assert callable(getattr(hw, hook))
    assert isinstance(hw.create_event(), CpuEvent)
    assert live_backend(kernels={"topk": torch.topk}, transfer_engines=()).kernels() == {
        "topk": torch.topk
    }


# --- When the device is checked -------------------------------------------------------------------


class Counted(Acme):
    """Counts how often memory is asked for: only the check of the device does that here."""

    def __init__(self, live):
        self.live = live
        self.asked = 0
        self.fails = False

    @hwcore.hookimpl
    def is_initialized(self):
        return self.live

    @hwcore.hookimpl
    def memory_info(self):
        self.asked += 1
        return None if self.fails else super().memory_info()


def test_a_live_device_is_checked_at_once():
    plugin = Counted(live=True)
    hw = hwcore.Backend(plugin)
    assert plugin.asked == 1
    hw.create_stream()
    hw.current_stream()
    assert plugin.asked == 1


@pytest.mark.parametrize("hook", ["create_stream", "create_event", "current_stream", "generator"])
def test_a_device_that_is_not_live_is_checked_at_its_first_use_and_then_no_more(hook):
    plugin = Counted(live=False)
    hw = hwcore.Backend(plugin)
    hw.device_string()
    hw.graph_pool()
    assert plugin.asked == 0
    for _ in range(3):
        getattr(hw, hook)()
        assert plugin.asked == 1
    assert hw.current_stream.__func__ is Acme.current_stream, "no guard is left behind"


def test_a_check_that_fails_is_made_again_at_the_next_use():
    plugin = Counted(live=False)
    plugin.fails = True
    hw = hwcore.Backend(plugin)
    for calls in (1, 2, 3):
        with pytest.raises(hwcore.HwcoreError, match=r"memory_info\(\) got None"):
            hw.create_stream()
        assert plugin.asked == calls
    plugin.fails = False
    hw.create_stream()
    assert plugin.asked == 4
    hw.create_event()
    assert plugin.asked == 4


def test_a_hook_may_call_its_backend_while_the_device_is_checked():
    class Plugin(Acme):
        @hwcore.hookimpl
        def stream_context(self, stream):
            assert self.backend.current_stream() is not None
            return contextlib.nullcontext() if stream is None else stream

    plugin = Plugin()
    plugin.backend = hwcore.Backend(plugin)
    assert plugin.backend.create_stream() is not None
