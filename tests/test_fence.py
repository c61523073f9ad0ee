"""StreamFence: readers side by side, a writer alone, on any streams."""

import contextlib
import threading

import pytest
import torch

import hwcore
from hwcore.errors import ArgumentValueError, CaptureError
from hwcore.fence import StreamFence
from hwcore.testing.sanitizer import Sanitizer


@pytest.fixture
def streams(hw):
    return hw.current_stream(), hw.create_stream(), hw.create_stream()


@pytest.fixture
def shared(hw):
    memory = torch.zeros(4, device=hw.device())
    hw.synchronize()
    return memory


@pytest.mark.usefixtures("in_any_order", "watched")
class TestOrder:
    def test_a_read_comes_after_another_streams_write(self, hw, streams, shared):
        fence, (_, one, two) = StreamFence(hw), streams
        with hw.stream_context(one), fence.writing():
            shared.fill_(1)
        with hw.stream_context(two), fence.reading():
            copy = shared.clone()
            assert copy.tolist() == [1] * 4

    def test_a_write_comes_after_the_reads_of_all_streams(self, hw, streams, shared):
        fence, (main, one, two) = StreamFence(hw), streams
        copies = []
        for stream in (main, one, two):
            with hw.stream_context(stream), fence.reading():
                copies.append(shared.clone())
        with fence.writing():
            shared.fill_(1)
        hw.synchronize()
        assert [copy.tolist() for copy in copies] == [[0] * 4] * 3

    def test_a_write_comes_after_another_streams_write(self, hw, streams, shared):
        fence, (_, one, two) = StreamFence(hw), streams
        for number, stream in enumerate((one, two, one, two), 1):
            with hw.stream_context(stream), fence.writing():
                shared.mul_(10).add_(number)
        hw.synchronize()
        assert shared.tolist() == [1234] * 4

    def test_reads_of_before_a_write_stay_waited_for_after_it(self, hw, streams, shared):
        fence, (main, one, two) = StreamFence(hw), streams
        with hw.stream_context(one), fence.reading():
            copy = shared.clone()
        with hw.stream_context(two), fence.writing():
            shared[:2].fill_(1)
        with hw.stream_context(main), fence.writing():
            shared[2:].fill_(2)
        hw.synchronize()
        assert copy.tolist() == [0] * 4

    def test_a_block_that_raises_is_waited_for_like_any_other(self, hw, streams, shared):
        fence, (_, one, two) = StreamFence(hw), streams
        with contextlib.suppress(KeyError), hw.stream_context(one), fence.writing():
            shared.fill_(1)
            raise KeyError
        with hw.stream_context(two), fence.reading():
            assert shared.clone().tolist() == [1] * 4

    def test_threads_take_turns(self, hw, shared):
        fence, errors = StreamFence(hw), []

        def add():
            try:
                stream = hw.create_stream()
                for _ in range(20):
                    with hw.stream_context(stream), fence.writing():
                        shared.add_(1)
            except Exception as error:  # noqa: BLE001
                errors.append(error)

        threads = [threading.Thread(target=add) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        hw.synchronize()
        assert errors == []
        assert shared.tolist() == [80] * 4


def test_readers_do_not_wait_for_each_other(hw, streams, shared, late):
    if hw.info.name != "sim":
        pytest.skip("only a simulated device tells what has run")
    from hwcore_sim import device

    fence, (_, one, two) = StreamFence(hw), streams
    ran = []
    with hw.stream_context(one), fence.reading():
        device.launch_host_function(lambda: ran.append("one"))
    with hw.stream_context(two), fence.reading():
        device.launch_host_function(lambda: ran.append("two"))
    hw.synchronize_stream(two)
    assert ran == ["two"]
    hw.synchronize()


def test_a_stream_waits_for_the_block_and_not_for_what_came_after(hw, streams, shared, late):
    if hw.info.name != "sim":
        pytest.skip("only a simulated device tells what has run")
    from hwcore_sim import device

    fence, (_, one, two) = StreamFence(hw), streams
    ran = []
    with hw.stream_context(one):
        with fence.writing():
            device.launch_host_function(lambda: ran.append("block"))
        device.launch_host_function(lambda: ran.append("after"))
    with hw.stream_context(two), fence.reading():
        pass
    hw.synchronize_stream(two)
    assert ran == ["block"]
    hw.synchronize()


@pytest.fixture
def waits(hw):
    """The streams that were made to wait for an event, one entry a wait."""
    seen = []

    class Wrapper:
        @hwcore.hookimpl(wrapper=True)
        def wait_event(self, stream):
            seen.append(stream)
            return (yield)

    wrapper = Wrapper()
    hw.register(wrapper)
    yield seen
    hw.unregister(wrapper)


def test_on_one_stream_nothing_is_waited_for(hw, waits):
    fence = StreamFence(hw)
    for _ in range(3):
        with fence.writing():
            pass
        with fence.reading():
            pass
    assert waits == []


def test_nothing_is_waited_for_twice(hw, streams, waits):
    fence, (main, one, two) = StreamFence(hw), streams
    with hw.stream_context(one), fence.reading():
        pass
    with hw.stream_context(two), fence.writing():
        pass
    assert waits == [two]
    with hw.stream_context(main), fence.writing():
        pass
    assert waits == [two, main], "who waits for the write waits for the read before it"


def test_events_of_streams_that_are_gone_are_let_go_of(hw):
    fence = StreamFence(hw)
    for _ in range(300):
        with hw.stream_context(hw.create_stream()), fence.writing():
            pass
        with hw.stream_context(hw.create_stream()), fence.reading():
            pass
    assert len(fence._events) <= 65
    assert len(fence._reads) == 1


@pytest.mark.usefixtures("in_any_order", "watched")
def test_memory_that_is_freed_is_kept_until_all_streams_are_done(hw, streams):
    _, one, _ = streams
    shared = torch.ones(4, device=hw.device())
    fence = StreamFence(hw, memory=[shared])
    with fence.writing():
        shared.add_(1)
    with hw.stream_context(one), fence.reading():
        copy = shared + 1
    del shared, fence
    filler = torch.full((4,), -9.0, device=hw.device())  # may be given the same memory
    hw.wait_stream(hw.current_stream(), one)
    assert copy.tolist() == [3] * 4
    assert filler.tolist() == [-9] * 4
    hw.synchronize()


def test_a_capture_is_no_place_for_a_block(hw):
    fence = StreamFence(hw)

    def step():
        with fence.writing():
            pass

    with pytest.raises(CaptureError, match="StreamFence: a block was entered inside a graph captu"):
        hw.graph_capture(hw.create_graph(), step)
    step()


def test_without_the_fence_it_is_a_race(hw, streams, shared):
    _, one, two = streams
    with Sanitizer(hw, on_race="collect") as sanitizer:
        with hw.stream_context(one):
            shared.fill_(1)
        with hw.stream_context(two):
            shared.clone()
        hw.synchronize()
    assert [race.kind for race in sanitizer.races] == ["read after write"]


@pytest.mark.parametrize("outer", ["reading", "writing"])
@pytest.mark.parametrize("inner", ["reading", "writing"])
def test_a_block_inside_another_is_refused_and_the_fence_works_on(hw, outer, inner):
    fence = StreamFence(hw)
    message = "a block was entered inside another of the same fence"
    with getattr(fence, outer)():  # noqa: SIM117
        with pytest.raises(ArgumentValueError, match=message), getattr(fence, inner)():
            pass
    with getattr(fence, inner)():
        pass
