"""The hooks that are torch's generic ones, on the simulated device: there a missing wait shows.

The conformance kit asks them all that it asks of a device. What calls ``torch.cuda`` itself is in
``test_hooks.py``; nothing here was run on a GPU.
"""

from __future__ import annotations

import pytest

import hwcore
from hwcore.device_module import NativeGraphHooks
from hwcore.hookspecs import HOOKS
from hwcore.testing.conformance import run
from hwcore.types import Availability, BackendInfo, CompilePolicy

from .conftest import GPUS

GROUPS = (
    "identity or memory or streams or waiting or ordering or overlap or random_numbers or graph"
)
LEFT_OUT = (
    # A subclass of torch.Event, such as torch.sim's, is refused by torch as the later event.
    "elapsed_time or "
    # The simulated device's events have no handle.
    "for_other_processes or "
    # These call torch.cuda.
    "through_its_registration"
)
CAPABILITIES = {
    "async_streams",
    "stream_priorities",
    "event_timing",
    "blocking_events",
    "graphs",
    "pinned_memory",
    "float64",
    "float8",
    "multi_device",
}


@pytest.fixture(scope="module")
def sim():
    """The simulated device; its streams are again as they were after it."""
    from hwcore_sim import device
    from hwcore_sim.device.raw import SimRawAccess

    stalled = []

    class Raw(SimRawAccess):
        def stall(self, stream):
            stalled.append(stream)
            super().stall(stream)

    hwcore.use("sim")
    yield Raw()
    for stream in stalled:
        device.set_drain_policy(None, stream)


class SimGraph:
    """The simulated device's graph, in the steps that a GPU's has."""

    def begin(self, pool):
        from hwcore_sim.device.registration import native, stream_key

        self.native = native().Graph(pool)
        self.native.begin(*stream_key("begin", hwcore.current_backend().current_stream()))

    def replay(self):
        self.native.replay()


class SimCaptures:
    """Captures of the simulated device; see ``hwcore.graphs.native_captures.Captures``."""

    def __init__(self):
        self._stream = None

    def create(self):
        return SimGraph()

    def pool(self):
        from hwcore_sim.device.registration import native

        return native().Pool()

    def stream(self):
        self._stream = self._stream or hwcore.current_backend().create_stream()
        return self._stream

    def context(self, stream):
        return hwcore.current_backend().stream_context(stream)

    def prepare(self):
        hwcore.current_backend().synchronize()

    def begin(self, graph, pool):
        graph.begin(pool)

    def end(self, graph):
        if graph.native.fault:  # a GPU says so at the end; this device does at the call as well
            message = f"the capture is broken: {graph.native.fault}"
            raise RuntimeError(message)
        graph.native.end()

    def is_capturing(self):
        from hwcore_sim import device

        return device.is_capturing()

    def discard(self, graph, pool):
        graph.native.abort()
        graph.native.close()


def plugin_on_sim(gpu):
    """The plugin for the simulated device, less what it claims for a GPU alone."""

    class OnSim(gpu.plugin):
        @hwcore.hookimpl
        def backend_info(self):
            return BackendInfo(
                name=gpu.name,
                device_type="sim",
                vendor="Test",
                api_version="1.0",
                capabilities=frozenset(CAPABILITIES),
            )

        @hwcore.hookimpl
        def probe(self):
            return Availability(ok=True)

        @hwcore.hookimpl
        def setup(self):
            super().setup()
            self._captures = SimCaptures()

        # What Triton compiles runs on a GPU alone, also where it is installed.
        @hwcore.hookimpl
        def kernels(self):
            return {}

        @hwcore.hookimpl
        def compile_policy(self, request):
            return CompilePolicy(enabled=False, reason="there is no GPU")

    return OnSim("sim")


def on_sim(gpu):
    return hwcore.Backend(plugin_on_sim(gpu))


def where_hooks_ran(backend, plugin, report):
    """Hooks by what they ran on; the GPU itself is nowhere among it."""
    stands_in = vars(type(plugin)).keys()  # what the test's own class answers instead
    called = {hook for test in report.tests if test.outcome == "passed" for hook in test.calls}
    found = {"the simulated device": [], "its graphs in place of the GPU's": [], "fakes alone": []}
    for hook, source in backend.hook_sources().items():
        if hook in called and hook not in stands_in:
            simulated = hook in vars(NativeGraphHooks)
            where = "its graphs in place of the GPU's" if simulated else "the simulated device"
            found[where].append(hook)
        elif source == "plugin":
            found["fakes alone"].append(hook)
    return found


def test_the_generic_hooks_conform(sim, gpu, capsys):
    plugin = plugin_on_sim(gpu)
    backend = hwcore.Backend(plugin)
    report = run(backend, raw=sim, keyword=f"({GROUPS}) and not ({LEFT_OUT})")
    assert [test.message for test in report.tests if test.outcome == "failed"] == []
    assert sum(test.outcome == "passed" for test in report.tests) > 60
    ran = where_hooks_ran(backend, plugin, report)
    assert {"create_stream", "record_event", "wait_stream"} <= set(ran["the simulated device"])
    # These call torch.cuda, or are answered for by what stands in for the plugin.
    assert {"probe", "register_host_memory", "kernels"} <= set(ran["fakes alone"])
    with capsys.disabled():
        print(f"\nhwcore-{gpu.name}, not run on the device: all {len(HOOKS)} hooks. Of them ran on")
        for where, hooks in ran.items():
            print(f"  {where}: {', '.join(hooks)}")
        others = HOOKS.keys() - {hook for hooks in ran.values() for hook in hooks}
        print(f"  nothing, as defaults that were not called: {', '.join(sorted(others)) or 'none'}")


@pytest.mark.parametrize("policy", ["device", "pending"])
def test_with_either_policy_hips_waits_order_and_the_host_goes_on(sim, policy, monkeypatch):
    monkeypatch.setenv("HWCORE_HIP_EVENT_WAIT", policy)
    report = run(on_sim(GPUS["hip"]), raw=sim, keyword="ordering or waiting")
    assert [test.message for test in report.tests if test.outcome == "failed"] == []


def test_on_hip_without_triton_sampling_samples(sim):
    """The portable reference runs then, which never falls to the likeliest token."""
    report = run(on_sim(GPUS["hip"]), raw=sim, keyword="sampling")
    outcomes = [test.outcome for test in report.tests if test.group == "sampling"]
    assert outcomes == ["passed"] * 4


def test_with_the_hosts_wait_the_kit_says_that_the_host_does_not_go_on(sim, monkeypatch):
    monkeypatch.setenv("HWCORE_HIP_EVENT_WAIT", "host")
    report = run(on_sim(GPUS["hip"]), raw=sim, keyword="ordering or waiting")
    failed = {test.hook for test in report.tests if test.outcome == "failed"}
    assert failed == {"wait_event", "wait_stream"}
