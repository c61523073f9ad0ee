"""The hooks that are torch's generic ones, on the simulated device: there a missing wait shows.

The conformance kit asks them all that it asks of a device. What calls ``torch.cuda`` itself is in
``test_hooks.py``; nothing here was run on a GPU.
"""

from __future__ import annotations

import pytest

import hwcore
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


def on_sim(gpu):
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

    return hwcore.Backend(OnSim("sim"))


def test_the_generic_hooks_conform(sim, gpu):
    report = run(on_sim(gpu), raw=sim, keyword=f"({GROUPS}) and not ({LEFT_OUT})")
    assert [test.message for test in report.tests if test.outcome == "failed"] == []
    assert sum(test.outcome == "passed" for test in report.tests) > 60


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
