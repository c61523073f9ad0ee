"""The hooks that call ``torch.cuda``, on a stand-in that holds each call to its signature."""

from __future__ import annotations

import inspect
import logging
import subprocess
import sys

import pytest
import torch

import hwcore
from hwcore import device_module
from hwcore.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    CapabilityError,
    CaptureError,
    SetupError,
)
from hwcore.types import CompileRequest

from ._torch_cuda import FakeCuda, declared, recorded
from .conftest import pretend

# --- Set-up ---------------------------------------------------------------------------------------


def test_importing_the_plugin_imports_no_torch(gpu):
    code = f"import sys, {gpu.plugin.__module__}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_on_a_torch_for_another_device_setup_names_the_one_to_install(gpu, monkeypatch):
    monkeypatch.setattr(torch.version, gpu.toolkit, None)
    index = {"cuda": "cu130", "hip": "rocm7.0"}[gpu.name]
    with pytest.raises(SetupError) as caught:
        hwcore.Backend(gpu.plugin())
    assert isinstance(caught.value.__cause__, CapabilityError)
    assert f"torch {torch.__version__}, whose torch.version.{gpu.toolkit} is None" in str(
        caught.value
    )
    assert f"--index-url https://download.pytorch.org/whl/{index}`" in str(caught.value)


def test_a_device_that_vanished_since_the_probe_is_named(gpu, monkeypatch):
    pretend(gpu, monkeypatch, FakeCuda(device_count=lambda: 0))
    with pytest.raises(CapabilityError) as caught:
        gpu.plugin().setup()
    assert "got 0 devices from torch.cuda.device_count()" in str(caught.value)
    assert {"cuda": "`nvidia-smi`", "hip": "`rocminfo`"}[gpu.name] in str(caught.value)


def test_set_up_asks_for_nothing_that_makes_a_context(gpu, fake):
    gpu.plugin().setup()
    assert [name for name, _, _ in fake.calls] == ["device_count"]


def test_hwcore_accepts_the_plugin(gpu, fake):
    backend = hwcore.Backend(gpu.plugin())
    assert (backend.info.name, backend.info.device_type) == (gpu.name, "cuda")
    assert backend.device(1) == torch.device("cuda:1")
    assert backend.distributed_backend() == "nccl"
    assert [engine.memory for engine in backend.transfer_engines()] == ["host", "host"]


def test_the_stand_in_refuses_what_torch_does_not_have():
    fake = FakeCuda()
    with pytest.raises(AttributeError):
        fake.current_streams()
    with pytest.raises(TypeError):
        fake.mem_get_info(0, 1)
    with pytest.raises(TypeError):
        fake.CUDAGraph().capture_begin(mempool=None)


# --- Devices --------------------------------------------------------------------------------------


@pytest.mark.parametrize("hook", ["device_string", "set_device", "memory_info", "generator"])
@pytest.mark.parametrize("index", [2, -1])
def test_an_index_without_a_device_is_named(plugin, hook, index):
    message = rf"`index` got {index} \(int\); expected an index from 0 to 1: torch sees 2 devices"
    with pytest.raises(ArgumentValueError, match=message):
        getattr(plugin, hook)(index)


@pytest.mark.parametrize("hook", ["create_stream", "create_event"])
@pytest.mark.parametrize("device", ["cuda:2", "cpu"])
def test_so_is_a_device_that_is_not_there(plugin, hook, device):
    with pytest.raises(ArgumentValueError):
        getattr(plugin, hook)(torch.device(device))


def test_memory_is_the_devices(plugin, fake):
    assert plugin.memory_info(1) == hwcore.types.MemoryInfo(free_bytes=3, total_bytes=4)
    assert fake.named("mem_get_info") == [((1,), {})]


# --- Streams and events ---------------------------------------------------------------------------


def test_streams_and_events_are_of_the_devices_own_classes(plugin, fake):
    assert plugin.create_stream(torch.device("cuda:1"), -1) == "a Stream"
    assert plugin.create_event(enable_timing=True, blocking=True) == "a Event"
    assert fake.named("Stream") == [((torch.device("cuda:1"), -1), {})]
    asked = {"enable_timing": True, "blocking": True, "interprocess": False}
    assert fake.named("Event") == [((), asked)]
    assert plugin.current_stream() == "the current stream"


def test_an_event_for_other_processes_is_the_devices(plugin, fake):
    plugin.create_event(interprocess=True)
    assert fake.named("Event")[0][1]["interprocess"]
    assert "interprocess_events" in plugin.backend_info().capabilities


def test_and_cannot_be_timed(plugin, fake):
    with pytest.raises(ArgumentValueError, match="runtimes have none that does both"):
        plugin.create_event(enable_timing=True, interprocess=True)
    assert fake.named("Event") == []


def test_an_event_of_another_device_is_named(plugin):
    class Event:
        device = torch.device("cuda:0")

        def record(self, stream):
            message = "Event device 0 does not match recording stream's device 1."
            raise RuntimeError(message)

    class Stream:
        device = torch.device("cuda:1")

    with pytest.raises(
        ArgumentValueError, match="expected an event of cuda:1, where the stream is"
    ):
        plugin.record_event(Event(), Stream())
    Stream.device = Event.device
    with pytest.raises(RuntimeError, match="does not match"):
        plugin.record_event(Event(), Stream())


# --- Compilation and kernels ----------------------------------------------------------------------


def test_functions_are_compiled_by_inductor_where_triton_is_installed(plugin, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    policy = plugin.compile_policy(CompileRequest("f"))
    assert (policy.enabled, policy.backend) == (True, "inductor")


def test_and_otherwise_they_are_not_and_the_reason_is_given(plugin, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    policy = plugin.compile_policy(CompileRequest("f"))
    assert not policy.enabled
    assert "`pip install triton`" in policy.reason


@pytest.fixture
def triton(monkeypatch):
    """Put something in place of the core's Triton kernels."""
    device_module.triton_kernels.cache_clear()
    yield lambda kernels: monkeypatch.setattr("importlib.import_module", kernels)
    device_module.triton_kernels.cache_clear()


def test_the_kernels_are_the_cores_triton_kernels(plugin, triton):
    class Package:
        @staticmethod
        def kernels():
            return {"gather_rows": len}

    triton(lambda name: {"hwcore.kernels.triton": Package}[name])
    assert plugin.kernels() == {"gather_rows": len}


@pytest.mark.parametrize("error", [ImportError("no such"), CapabilityError("no such")])
def test_without_triton_there_are_none_which_is_said_once(plugin, gpu, triton, error, caplog):
    def fails(name):
        raise error

    triton(fails)
    with caplog.at_level(logging.WARNING, "hwcore"):
        assert plugin.kernels() == plugin.kernels() == {}
    said = f"backend {gpu.name} runs the portable kernels, not the Triton ones: no such"
    assert [record.getMessage() for record in caplog.records] == [said]


# --- Host memory ----------------------------------------------------------------------------------


class Runtime:
    """The runtime's two functions; their arguments are as torch's own tests pass them."""

    def __init__(self, code=0):
        self.code, self.registered = code, []

    def cudaHostRegister(self, address, size_bytes, flags):
        if self.code == 0:
            self.registered.append((address, size_bytes, flags))
        return self.code

    def cudaHostUnregister(self, address):
        self.registered = [entry for entry in self.registered if entry[0] != address]
        return 0


@pytest.fixture
def runtime(fake):
    def check(res):
        if res:
            message = f"part or all of the requested memory range is already mapped ({res})"
            raise RuntimeError(message)

    made = Runtime()
    fake.answers.update(cudart=lambda: made, check_error=check)
    return made


def test_host_memory_is_registered_with_the_driver_until_closed(plugin, runtime):
    buffer = bytearray(64)
    registration = plugin.register_host_memory(memoryview(buffer))
    assert runtime.registered == [(registration.address, 64, 1)]
    registration.close()
    registration.close()
    assert runtime.registered == []


def test_what_the_driver_refuses_is_named_and_no_later_kernel_reports_it(
    plugin, runtime, monkeypatch
):
    kernels = []
    monkeypatch.setattr(torch, "zeros", lambda size, device: kernels.append(device))
    runtime.code = 712
    with pytest.raises(CapabilityError) as caught:
        plugin.register_host_memory(memoryview(bytearray(64)))
    assert "register_host_memory: the driver said `part or all" in str(caught.value)
    assert "(712)` of 64 bytes" in str(caught.value)
    assert kernels == ["cuda"]  # it takes the pending code


@pytest.mark.parametrize(
    ("buffer", "error"),
    [
        (bytearray(8), ArgumentTypeError),
        (memoryview(b"read-only"), ArgumentValueError),
        (memoryview(bytearray(8))[::2], ArgumentValueError),
        (memoryview(bytearray()), ArgumentValueError),
    ],
)
def test_memory_that_cannot_be_registered_is_refused(plugin, runtime, buffer, error):
    with pytest.raises(error, match="register_host_memory: `buffer` got"):
        plugin.register_host_memory(buffer)
    assert runtime.registered == []


# --- Graphs ---------------------------------------------------------------------------------------


@pytest.fixture
def pools(monkeypatch):
    """What is told to torch's allocator about pools."""
    calls = []
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        function = recorded(name, declared(name), lambda *_: None, calls)
        monkeypatch.setattr(torch._C, name, function)
    return calls


def test_a_capture_runs_on_its_stream_with_its_pool_and_replays(plugin, fake, pools):
    graph, seen = plugin.create_graph(), []
    out = plugin.graph_capture(graph, lambda: seen.append(fake.current) or "out", (0, 9), "side")
    assert (out, seen, fake.current) == ("out", ["side"], "the current stream")
    assert fake.named("capture_begin") == [
        ((), {"pool": (0, 9), "capture_error_mode": "thread_local"})
    ]
    assert graph.replay() == "out"
    assert [name for name, _, _ in fake.calls[-2:]] == ["capture_end", "replay"]
    graph.close()
    assert fake.calls[-1] == ("reset", (), {})
    assert pools == []  # torch itself gives back the pool of a graph that was captured


def test_without_a_stream_one_is_kept_and_without_a_pool_the_graph_has_its_own(plugin, fake):
    for _ in range(2):
        plugin.graph_capture(plugin.create_graph(), lambda: None)
    assert len(fake.named("Stream")) == 1
    assert fake.named("graph_pool_handle") == [((), {})] * 2
    assert [kwargs["pool"] for _, kwargs in fake.named("capture_begin")] == [(0, 7)] * 2


def test_a_function_that_fails_leaves_an_empty_graph_and_the_stream_as_before(plugin, fake, pools):
    graph = plugin.create_graph()
    with pytest.raises(ZeroDivisionError):
        plugin.graph_capture(graph, lambda: 1 / 0)
    assert fake.current == "the current stream"
    assert [name for name, _, _ in fake.calls[-3:]] == ["capture_end", "pool", "reset"]
    assert pools == []
    assert plugin.graph_capture(graph, lambda: "again") == "again"


def test_a_capture_that_the_device_broke_gives_its_pool_back(plugin, fake, pools):
    def reads_a_value():
        fake.graphs[-1].broken = "operation failed due to a previous error during capture"
        message = "operation not permitted when stream is capturing"
        raise RuntimeError(message)

    graph = plugin.create_graph()
    with pytest.raises(CaptureError, match="fn broke the capture: operation not permitted"):
        plugin.graph_capture(graph, reads_a_value, (0, 9))
    assert fake.current == "the current stream"
    assert pools == [
        ("_cuda_endAllocateToPool", (0, (0, 9)), {}),
        ("_cuda_releasePool", (0, (0, 9)), {}),
    ]
    assert fake.calls[-1] == ("reset", (), {})
    assert plugin.graph_capture(graph, lambda: "again") == "again"


def test_a_capture_that_never_began_has_no_share_of_a_pool_to_give_back(
    plugin, fake, pools, monkeypatch
):
    def not_recording(device, pool):
        message = "endAllocatePool: not currently recording to mempool_id"
        raise RuntimeError(message)

    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", not_recording)

    def refused(**arguments):
        message = "CUDA graphs must be captured on a non-default stream."
        raise RuntimeError(message)

    made = fake.CUDAGraph()
    made._capture_begin = refused
    fake.answers["CUDAGraph"] = lambda: made
    with pytest.raises(CaptureError, match="the device began no capture: CUDA graphs must be"):
        plugin.graph_capture(plugin.create_graph(), lambda: None, (0, 9))
    assert pools == []
    assert fake.current == "the current stream"


def test_whether_a_capture_is_on_is_asked_of_torch(plugin, fake):
    fake.answers["is_current_stream_capturing"] = lambda: True
    assert plugin.is_capturing() is True


def test_the_two_plugins_answer_the_same_hooks_but_for_how_hip_waits():
    from hwcore.binding import hook_functions

    from .conftest import GPUS

    hooks = {name: set(hook_functions(gpu.plugin(), name)) for name, gpu in GPUS.items()}
    assert hooks["hip"] - hooks["cuda"] == {"wait_event", "wait_stream"}
    assert hooks["cuda"] <= hooks["hip"]


def test_each_plugin_is_small_and_has_the_same_files(gpu):
    import pathlib

    folder = pathlib.Path(inspect.getfile(gpu.plugin)).parent
    files = {file.name: len(file.read_text().splitlines()) for file in folder.glob("*.py")}
    shared = {"__init__.py", "graphs.py", "plugin.py", "probe.py", "torch_build.py"}
    assert set(files) - {"event_wait.py"} == shared
    assert max(files.values()) <= 250
