"""The CPU as a device: inert streams and events with the surface of real ones, memory, graphs."""

from __future__ import annotations

import pathlib
import threading
import time
import types

import pytest
import torch

import hwcore
from hwcore import cpu
from hwcore.cpu import CpuEvent, CpuStream
from hwcore.errors import ArgumentTypeError, ArgumentValueError

# What torch's classes have and ours deliberately lack.
LEFT_OUT = {
    CpuStream: {
        "device_index": "torch's own number for `device.index`",
        "device_type": "torch's own number for `device.type`",
        "is_capturing": "the hook of that name answers for the calling thread",
        "native_handle": "the address of a device's queue, and there is none",
    },
    CpuEvent: {
        "event_id": "the address of a device's event, and there is none",
        "from_ipc_handle": "events of another process: there is nothing to wait for",
        "ipc_handle": "events of another process: there is nothing to wait for",
    },
}


@pytest.fixture
def host():
    """The CPU backend, whichever backend the run is for."""
    return hwcore.load_backend("cpu")


def public(kind):
    return {name for name in dir(kind) if not name.startswith("_")}


# --- Streams --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ours", "torchs"), [(CpuStream, torch.Stream), (CpuEvent, torch.Event)])
def test_the_surface_is_torchs(host, ours, torchs):
    made = host.create_stream() if ours is CpuStream else host.create_event()
    assert public(torchs) - public(made) == set(LEFT_OUT[ours]) & public(torchs)
    assert not public(made) & set(LEFT_OUT[ours])


def test_streams_are_equal_to_themselves_alone(host):
    one, two = host.create_stream(), host.create_stream()
    assert one == one
    assert one != two
    assert one != 3
    assert len({one, two, one}) == 2
    assert host.current_stream() == host.current_stream()
    assert repr(one) != repr(two)


def test_streams_keep_device_and_priority(host):
    stream = host.create_stream(priority=-1)
    assert stream.device == torch.device("cpu") == host.create_event().device
    assert stream.priority == -1


def test_contexts_nest_and_restore(host):
    before = host.current_stream()
    one, two = host.create_stream(), host.create_stream()
    with host.stream_context(one):
        assert host.current_stream() == one
        with host.stream_context(two), host.stream_context(one):
            assert host.current_stream() == one
        with two as entered:
            assert entered == two == host.current_stream()
        assert host.current_stream() == one
        with pytest.raises(OSError, match="inside"), host.stream_context(two):  # noqa: PT012
            assert host.current_stream() == two
            msg = "inside"
            raise OSError(msg)
        assert host.current_stream() == one
    assert host.current_stream() == before


def test_each_thread_has_its_own_current_stream(host):
    stream, seen = host.create_stream(), []
    before = host.current_stream()

    def look():
        seen.append(host.current_stream())
        with host.stream_context(host.create_stream()) as own:
            seen.append(host.current_stream() == own)

    with host.stream_context(stream):
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        assert host.current_stream() == stream
    assert seen == [before, True]


def test_nothing_waits(host):
    stream, event = host.create_stream(), host.create_event(blocking=True)
    never = host.create_event()
    with host.stream_context(stream):
        host.record_event(event)
    host.wait_event(event, stream)
    host.wait_event(never)
    host.wait_stream(stream, host.current_stream())
    host.synchronize_stream(stream)
    host.synchronize_event(never)
    host.synchronize()
    host.synchronize(torch.device("cpu"))
    assert host.query_event(event) is True
    assert host.query_event(never) is True
    assert stream.query() is True


def test_a_streams_own_methods_work_like_torchs(host):
    stream = host.create_stream()
    event = stream.record_event()
    assert isinstance(event, CpuEvent)
    assert stream.record_event(event) is event
    stream.wait_event(event)
    stream.wait_stream(host.current_stream())
    stream.synchronize()
    event.record()
    event.wait()
    event.wait(stream)
    event.synchronize()
    assert event.query() is True


# --- Events ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["hook", "method", "stream"])
def test_elapsed_time_is_in_milliseconds(host, way):
    def record(event):
        if way == "hook":
            host.record_event(event)
        elif way == "method":
            event.record(host.current_stream())
        else:
            host.current_stream().record_event(event)

    start, end = (host.create_event(enable_timing=True) for _ in range(2))
    began = time.perf_counter()
    record(start)
    time.sleep(0.02)
    record(end)
    outer = (time.perf_counter() - began) * 1e3
    assert 20 <= start.elapsed_time(end) <= outer
    assert end.elapsed_time(start) == -start.elapsed_time(end)
    first = start.elapsed_time(end)
    record(end)
    assert start.elapsed_time(end) > first, "recording again moves an event"


def test_elapsed_time_needs_timed_and_recorded_events(host):
    good, never = host.create_event(enable_timing=True), host.create_event(enable_timing=True)
    untimed = host.create_event()
    for event in (good, untimed):
        host.record_event(event)
    expected = r"expected an event made with enable_timing=True and recorded. Make it with create"
    for start, end, who in (
        (untimed, good, "this event"),
        (never, good, "this event"),
        (good, untimed, "`end_event`"),
        (good, never, "`end_event`"),
    ):
        with pytest.raises(ArgumentValueError, match=f"elapsed_time: {who} got .*{expected}"):
            start.elapsed_time(end)
    with pytest.raises(ArgumentTypeError, match=r"`end_event` got 3 \(int\); expected an event of"):
        good.elapsed_time(3)


# --- Memory, random numbers, devices --------------------------------------------------------------


def test_tensors_need_no_guard(host):
    tensor = torch.arange(3)
    assert host.pin_memory(tensor) is tensor
    assert host.record_stream(tensor, host.create_stream()) is None
    for purpose in ("serialize", "numpy", "topk"):
        assert host.needs_cpu_fallback(tensor, purpose) is False
    assert host.register_host_memory(memoryview(bytearray(8))) is None
    assert not host.host_memory_policy().can_pin


def test_the_device_has_no_index(host):
    assert host.device_string() == host.device_string(0) == "cpu"
    assert host.device(0) == torch.device("cpu")
    assert host.device_count() == 1
    assert host.set_device(0) is None
    assert host.is_initialized() is False
    assert host.distributed_backend() == "gloo"


def test_memory_is_what_the_machine_has(host):
    memory = host.memory_info()
    assert 0 < memory.free_bytes <= memory.total_bytes
    # MemTotal leaves out what the kernel took at boot, and nothing else.
    lines = dict(line.split(":") for line in pathlib.Path("/proc/meminfo").read_text().splitlines())
    assert memory.total_bytes <= int(lines["MemTotal"].split()[0]) * 1024


STATISTICS = "anon 400000\ninactive_file 100000\nslab 1\n"


@pytest.mark.parametrize(
    ("limit", "used", "statistics", "free", "total"),
    [
        ("1000000\n", "500000\n", STATISTICS, 600_000, 1_000_000),  # 100 000 of it file cache
        ("1000000\n", "1400000\n", STATISTICS, 0, 1_000_000),
        ("1000000\n", "500000\n", "anon 400000\n", 500_000, 1_000_000),
        ("max\n", "400000\n", STATISTICS, 8192, None),
        (None, None, None, 8192, None),
    ],
)
def test_memory_is_bounded_by_the_control_group(
    monkeypatch, tmp_path, limit, used, statistics, free, total
):
    real = pathlib.Path
    group = tmp_path / "sys/fs/cgroup"
    files = {"memory.max": limit, "memory.current": used, "memory.stat": statistics}
    for name, text in files.items():
        if text:
            group.mkdir(parents=True, exist_ok=True)
            (group / name).write_text(text)
    (tmp_path / "proc").mkdir()
    available = 8192 if total is None else 10**9
    (tmp_path / "proc/meminfo").write_text(f"MemFree: 1 kB\nMemAvailable: {available // 1024} kB\n")
    fake = types.SimpleNamespace(Path=lambda path: real(str(tmp_path) + path))
    monkeypatch.setattr(cpu, "pathlib", fake)
    memory = cpu.host_memory()
    assert memory.free_bytes == free
    if total:
        assert memory.total_bytes == total
    else:
        assert memory.total_bytes > 2**20


def test_a_seeded_generator_repeats_itself(hw):
    def draw(seed):
        generator = hw.generator()
        generator.manual_seed(seed)
        return torch.rand(8, generator=generator, device=hw.device()).tolist()

    assert draw(1) == draw(1) != draw(2)
    assert hw.generator() is not hw.generator()


def test_manual_seed_seeds_the_default_generators(hw):
    def draw(seed):
        hw.manual_seed(seed)
        return torch.rand(8, device=hw.device()).tolist(), torch.rand(8).tolist()

    assert draw(1) == draw(1) != draw(2)


# --- Graphs ---------------------------------------------------------------------------------------


def test_a_graph_replays_into_the_same_addresses(hw):
    x = torch.arange(4.0, device=hw.device())
    graph = hw.create_graph()
    assert not hw.is_capturing()
    seen = []

    def step():
        seen.append(hw.is_capturing())
        return x * 2 + 1

    out = hw.graph_capture(graph, step, hw.graph_pool(), hw.create_stream())
    address = out.data_ptr()
    assert seen == [True]
    assert not hw.is_capturing()
    for value in (3.0, -1.0):
        x.fill_(value)
        assert hw.graph_replay(graph) is None
        hw.synchronize()
        assert out.tolist() == [value * 2 + 1] * 4
        assert out.data_ptr() == address
    hw.graph_replay(graph, {"x": x}, None)
    assert seen == [True], "the function itself does not run again"


def test_a_host_read_while_capturing_is_an_error_that_names_the_line(host):
    x = torch.arange(4.0)
    graph, before = host.create_graph(), host.current_stream()
    with pytest.raises(hwcore.HwcoreError, match=r"test_cpu\.py:\d+: `.*x\.sum\(\)\.item"):
        host.graph_capture(graph, lambda: x.sum().item(), stream=host.create_stream())
    assert not host.is_capturing()
    assert host.current_stream() == before
    out = host.graph_capture(graph, lambda: x + 1)
    x.zero_()
    host.graph_replay(graph)
    assert out.tolist() == [1.0] * 4


def test_a_graph_is_captured_on_the_stream_that_is_given(host):
    stream = host.create_stream()
    seen = []
    host.graph_capture(
        host.create_graph(), lambda: seen.append(host.current_stream()), None, stream
    )
    assert seen == [stream]
