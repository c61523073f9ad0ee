"""GraphRunner between streams: every order of the device gives the right value, no host waits.

Each program is run under every drain policy of the simulated device and under the sanitizer, and
once more with the runner's waits taken out, to see that both notice.
"""

from __future__ import annotations

import contextlib
import gc
import threading
import types

import pytest
import torch

import hwcore
from hwcore.errors import ArgumentValueError
from hwcore.fence import StreamFence
from hwcore.testing.sanitizer import Sanitizer

from ._steps import inputs, lens, runner_of, simple

POLICIES = ["lazy", "eager", "random:1", "random:2", "random:3"]


def draining(hw, policy):
    if hw.info.name != "sim":  # elsewhere work runs when it does
        return contextlib.nullcontext()
    from hwcore_sim import device

    return device.drain_policy(policy)


# --- Programs: (outputs of the first batch, of the second) ----------------------------------------


def prepared_while_the_last_batch_runs(hw, runner, one, two):
    main, plan = hw.current_stream(), hw.create_stream()
    first = runner.prepare({"x": one}, lens(3))
    hw.synchronize_stream(main)
    kept = runner.replay(first).clone()
    with hw.stream_context(plan):
        second = runner.prepare({"x": two}, lens(3))
        hw.synchronize_stream(plan)  # the plan's host part needs its results
    return kept.tolist(), runner.replay(second).tolist()


def prepared_on_the_side(hw, runner, one, two):
    plan, kept = hw.create_stream(), []
    for x in (one, two):
        with hw.stream_context(plan):
            prepared = runner.prepare({"x": x}, lens(3))
        kept.append(runner.replay(prepared).tolist())
    return tuple(kept)


def replayed_on_two_streams(hw, runner, one, two):
    left, right, kept = hw.create_stream(), hw.create_stream(), []
    for stream, x in ((left, one), (right, two)):
        prepared = runner.prepare({"x": x}, lens(3))
        with hw.stream_context(stream):
            kept.append(runner.replay(prepared).clone())
        if stream is left:
            hw.wait_stream(right, left)  # the clone is this program's own use of the outputs
    hw.synchronize_stream(right)
    hw.synchronize_stream(left)
    return tuple(t.tolist() for t in kept)


def prepared_twice_on_two_streams(hw, runner, one, two):
    left, right = hw.create_stream(), hw.create_stream()
    with hw.stream_context(left):
        runner.prepare({"x": one}, lens(3))
    with hw.stream_context(right):
        prepared = runner.prepare({"x": two}, lens(3))
        hw.synchronize_stream(right)
    hw.synchronize_stream(left)
    return [2.0, 4.0, 6.0], runner.replay(prepared).tolist()


def recomputed_on_the_main_stream(hw, runner, one, two):
    plan, kept = hw.create_stream(), []
    for x in (one, two):
        with hw.stream_context(plan):
            prepared = runner.prepare({"x": x + 7}, lens(3))
        kept.append(runner.replay(prepared, {"x": x}).tolist())
    return tuple(kept)


PROGRAMS = [
    prepared_while_the_last_batch_runs,
    prepared_on_the_side,
    replayed_on_two_streams,
    prepared_twice_on_two_streams,
    recomputed_on_the_main_stream,
]
RIGHT = ([2.0, 4.0, 6.0], [20.0, 40.0, 60.0])


def run(hw, program):
    one = torch.tensor([1.0, 2.0, 3.0], device=hw.device())
    two = one * 10
    with simple(hw) as runner:
        return program(hw, runner, one, two)


@pytest.fixture
def without_waits(monkeypatch):
    """Take the runner's waits out."""
    monkeypatch.setattr(StreamFence, "begin_write", lambda fence, stream: None)


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("policy", POLICIES)
def test_it_is_right_in_any_order(hw, program, policy):
    with draining(hw, policy):
        assert run(hw, program) == RIGHT


@pytest.mark.parametrize("program", PROGRAMS[:-1])  # the last makes good what came too late
def test_without_its_waits_it_would_be_wrong_where_streams_run_late(hw, program, without_waits):
    with draining(hw, "lazy"):
        assert (run(hw, program) == RIGHT) is (hw.info.name != "sim")


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("policy", ["lazy", "eager"])
def test_the_sanitizer_finds_no_race(hw, program, policy):
    with draining(hw, policy), Sanitizer(hw, on_race="collect") as sanitizer:
        assert run(hw, program) == RIGHT
    assert sanitizer.races == []


@pytest.mark.parametrize("program", PROGRAMS)
def test_without_its_waits_the_sanitizer_reports_it_everywhere(hw, program, without_waits):
    with draining(hw, "eager"), Sanitizer(hw, on_race="collect") as sanitizer:
        run(hw, program)
        races = sanitizer.take()
        hw.synchronize()
    assert races


def test_a_consumer_on_another_stream_that_nobody_waits_for_is_reported(hw):
    """The caller is to order it, as the class says: the runner does not see it."""
    side = hw.create_stream()
    with Sanitizer(hw, on_race="collect") as sanitizer, simple(hw) as runner:
        x = torch.ones(3, device=hw.device())
        out = runner.run({"x": x}, lens(3))
        hw.wait_stream(side, hw.current_stream())
        with hw.stream_context(side):
            kept = out.clone()
        runner.run({"x": x}, lens(3))
        races = sanitizer.take()
        hw.synchronize()
        del kept
    assert [race.kind for race in races] == ["write after read"]


# --- The host -------------------------------------------------------------------------------------


@contextlib.contextmanager
def no_synchronisation(hw):
    """Fail where a hook would make the host wait."""

    def refuse():
        pytest.fail("the host waits")
        yield

    hooks = ("synchronize", "synchronize_stream", "synchronize_event")
    wrappers = types.SimpleNamespace(
        **{hook: hwcore.hookimpl(wrapper=True)(refuse) for hook in hooks}
    )
    hw.register(wrappers)
    try:
        yield
    finally:
        hw.unregister(wrappers)


@pytest.mark.parametrize("where", ["device", "host", "pinned"])
def test_the_host_waits_in_neither_prepare_nor_replay(hw, where):
    plan = hw.create_stream()
    given = inputs(3, 1, hw.device() if where == "device" else "cpu")
    if where == "pinned":
        given = {name: hw.pin_memory(tensor) for name, tensor in given.items()}
    with runner_of(hw) as runner, draining(hw, "lazy"):
        ran = []
        if hw.info.name == "sim":
            from hwcore_sim import device

            for stream in (plan, hw.current_stream()):
                device.launch_host_function(lambda: ran.append(1), stream)
        with no_synchronisation(hw):
            for _ in range(3):
                with hw.stream_context(plan):
                    prepared = runner.prepare(given, lens(3))
                runner.replay(prepared)
        assert ran == []
        hw.synchronize()
        assert len(ran) == (2 if hw.info.name == "sim" else 0)


def test_on_one_stream_nothing_waits_for_an_event(hw):
    waits = []

    def noted():
        waits.append(1)
        return (yield)

    wrappers = types.SimpleNamespace(wait_event=hwcore.hookimpl(wrapper=True)(noted))
    with simple(hw) as runner:
        hw.register(wrappers)
        try:
            for _ in range(3):
                runner.run({"x": torch.ones(3, device=hw.device())}, lens(3))
            assert waits == []
            with hw.stream_context(hw.create_stream()):
                runner.run({"x": torch.ones(3, device=hw.device())}, lens(3))
            assert waits == [1]
        finally:
            hw.unregister(wrappers)


@pytest.mark.parametrize("way", ["eagerly", "recomputed"])
def test_a_pinned_input_may_be_dropped_whatever_way_it_went(hw, way):
    def pinned(value, size):
        return hw.pin_memory(torch.full((size,), value))

    policy = contextlib.nullcontext()
    if hw.info.name == "sim":
        from hwcore_sim import device

        policy = device.pinned_reuse("early")
    with policy, simple(hw) as runner, draining(hw, "lazy"):
        for value in (1.0, 2.0, 3.0):
            if way == "eagerly":
                size = 6
                out = runner.run({"x": pinned(value, size)}, lens(size), or_eager=True)
            else:
                size = 3
                prepared = runner.prepare({}, lens(size))
                out = runner.replay(prepared, recomputed={"x": pinned(value, size)})
            other = pinned(99.0, size)  # from the block of the input, were it free
            assert out.tolist() == [2 * value] * size
            del other


@pytest.mark.parametrize("reuse", ["safe", "early"])
def test_a_pinned_input_may_be_dropped_at_once(hw, reuse):
    def pinned(value):
        return hw.pin_memory(torch.full((3,), value))

    if hw.info.name == "sim":
        from hwcore_sim import device

        policy = device.pinned_reuse(reuse)
    else:
        policy = contextlib.nullcontext()
    with policy, simple(hw) as runner, draining(hw, "lazy"):
        for value in (1.0, 2.0, 3.0):
            prepared = runner.prepare({"x": pinned(value)}, lens(3))
            other = pinned(99.0)  # from the block of the input, were it free
            assert runner.replay(prepared).tolist() == [2 * value] * 3
            del other
        # What has been copied is let go of with the next that is kept.
        assert len(runner._host_inputs) == (1 if hw.info.name == "sim" and reuse == "early" else 0)
    assert len(runner._host_inputs) == 0


def test_host_inputs_are_copied_at_once_where_copies_are_not_ordered(hw, monkeypatch):
    """`copies_ordered_with_kernels` False: the runner waits itself."""
    with simple(hw) as runner, draining(hw, "lazy"):
        monkeypatch.setattr(runner.buffers, "_non_blocking", False)
        x = hw.pin_memory(torch.ones(3))
        prepared = runner.prepare({"x": x}, lens(3))
        x.fill_(50.0)  # would be copied, had the copy not run yet
        assert runner.replay(prepared).tolist() == [2, 2, 2]


# --- Threads and ends -----------------------------------------------------------------------------


def test_one_thread_prepares_and_another_replays(hw):
    with simple(hw) as runner:
        handed, results = [], []
        ready, free = threading.Semaphore(0), threading.Semaphore(1)

        def plan():
            with hw.stream_context(hw.create_stream()):
                for value in range(5):
                    x = torch.full((3,), float(value), device=hw.device())
                    assert free.acquire(timeout=20)
                    handed.append(runner.prepare({"x": x}, lens(3)))
                    ready.release()

        thread = threading.Thread(target=plan)
        thread.start()
        for _ in range(5):
            assert ready.acquire(timeout=20)
            results.append(runner.replay(handed.pop()).tolist()[0])
            free.release()
        thread.join()
        assert results == [0, 2, 4, 6, 8]


@pytest.mark.parametrize("first", ["prepare", "replay"])
@pytest.mark.parametrize("second", ["prepare", "replay"])
def test_a_call_waits_until_that_of_another_thread_is_done(hw, first, second):
    inside, go_on, order = threading.Event(), threading.Event(), []

    class Slow:
        """Holds the first call up where it marks its end."""

        @hwcore.hookimpl(wrapper=True)
        def record_event(self):
            result = yield
            if threading.current_thread().name == "first" and not inside.is_set():
                inside.set()
                assert go_on.wait(30)
                order.append("first")
            return result

    with simple(hw) as runner:
        x = {"x": torch.ones(3, device=hw.device())}
        prepared = runner.prepare(x, lens(3))

        def call(what):
            if what == "prepare":
                runner.prepare(x, lens(3))
            else:
                with contextlib.suppress(ArgumentValueError):  # replayed by the first
                    runner.replay(prepared)
            order.append(what) if threading.current_thread().name == "second" else None

        slow = Slow()
        hw.register(slow)
        try:
            threads = [
                threading.Thread(target=call, args=(what,), name=name)
                for what, name in ((first, "first"), (second, "second"))
            ]
            threads[0].start()
            assert inside.wait(30)
            threads[1].start()
            threads[1].join(0.2)
            assert order == []
        finally:
            go_on.set()
            for thread in threads:
                thread.join()
            hw.unregister(slow)
        assert order == ["first", second]


def test_threads_that_do_not_agree_get_an_error_and_no_wrong_value(hw):
    """Several threads run batches without taking turns: each call is whole."""
    failures = []
    with simple(hw) as runner:

        def work(value):
            with hw.stream_context(hw.create_stream()):
                x = torch.full((3,), value, device=hw.device())
                for _ in range(20):
                    with runner._lock:  # outputs hold until the next replay, whoever makes it
                        got = runner.run({"x": x}, lens(3)).tolist()
                    if got != [2 * value] * 3:
                        failures.append((value, got))

        threads = [threading.Thread(target=work, args=(float(n),)) for n in range(1, 4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []


def test_buffers_of_a_dropped_runner_stay_for_the_streams_that_use_them(hw):
    with draining(hw, "lazy"), Sanitizer(hw, on_race="collect") as sanitizer:
        runner, side = simple(hw), hw.create_stream()
        x = torch.ones(3, device=hw.device())
        hw.wait_stream(side, hw.current_stream())
        with hw.stream_context(side):
            runner.prepare({"x": x}, lens(3))
        del runner
        gc.collect()
        assert sanitizer.take() == []
        hw.synchronize()


@pytest.mark.parametrize("end", ["close", "recapture"])
def test_what_uses_outputs_when_graphs_are_released_has_run_by_then(hw, end):
    with draining(hw, "lazy"), Sanitizer(hw, on_race="collect") as sanitizer:
        result = torch.zeros(3, device=hw.device())
        hw.synchronize()
        side = hw.create_stream()
        runner = simple(hw)
        with hw.stream_context(side):
            out = runner.run({"x": torch.ones(3, device=hw.device())}, lens(3))
            hw.synchronize_stream(side)  # the replay, but not what follows it
            result.copy_(out)
        del out
        getattr(runner, end)()
        del runner
        gc.collect()
        assert sanitizer.take() == []
        hw.synchronize_stream(side)
        assert result.tolist() == [2, 2, 2]
