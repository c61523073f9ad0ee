"""Graphs: what they record, what they refuse, whose memory it is."""

from __future__ import annotations

import gc

import pytest
import torch

from hwcore.errors import ArgumentTypeError, CapabilityError, CaptureError


def values(tensor):
    return tensor.cpu().tolist()


@pytest.fixture
def graph(sim):
    made = sim.Graph()
    yield made
    made.close()


@pytest.fixture
def x(sim):
    made = torch.ones(4, device="sim")
    torch.accelerator.synchronize()
    return made


def usable(sim):
    """Whether the device works as if nothing had happened."""
    again = sim.Graph()
    x = torch.ones(2, device="sim")
    out = again.capture(lambda: x + 1)
    again.replay()
    fine = values(out) == [2, 2] and not sim.is_capturing()
    again.close()
    return fine


def test_a_capture_records_and_does_not_run(sim, graph, x):
    graph.capture(lambda: x.add_(1))
    torch.accelerator.synchronize()
    assert values(x) == [1] * 4


def test_fn_runs_once_and_each_replay_runs_its_work(sim, graph, x):
    calls = []
    graph.capture(lambda: (calls.append(1), x.add_(1)))
    for _ in range(3):
        graph.replay()
    assert values(x) == [4] * 4
    assert calls == [1]


def test_a_replay_is_queued_like_any_work(sim, graph, x):
    out = graph.capture(lambda: x * 2)
    graph.replay()
    assert sim.peek(out).tolist() != [2] * 4
    assert values(out) == [2] * 4


def test_a_replay_reads_its_inputs_anew_and_writes_to_the_same_address(sim, graph, x):
    out = graph.capture(lambda: x * 2)
    address = out.data_ptr()
    for value in (3, 5):
        x.fill_(value)
        assert graph.replay() is out
        assert values(out) == [2 * value] * 4
        assert out.data_ptr() == address


def test_a_replay_runs_on_the_current_stream(sim, graph, x):
    out = graph.capture(lambda: x * 2)
    side = torch.Stream("sim")
    with side:
        graph.replay()
    assert sim.pending(side) > 0
    side.synchronize()
    assert sim.peek(out).tolist() == [2] * 4


@pytest.mark.parametrize("policy", ["eager", "random:1"])
def test_a_capture_records_under_every_drain_policy(sim, graph, x, policy):
    with sim.drain_policy(policy):
        graph.capture(lambda: x.add_(1))
        assert values(x) == [1] * 4
        graph.replay()
        assert values(x) == [2] * 4


def test_is_capturing_is_about_the_current_stream(sim, graph, x):
    side = torch.Stream("sim")

    def fn():
        inside = sim.is_capturing()
        with side:
            return inside, sim.is_capturing(), torch.sim.is_current_stream_capturing()

    assert graph.capture(fn) == (True, False, False)
    assert not sim.is_capturing()


def test_a_capture_can_run_on_a_stream_of_the_callers(sim, graph, x):
    stream = torch.Stream("sim")
    assert graph.capture(torch.accelerator.current_stream, stream=stream) == stream
    assert torch.accelerator.current_stream() != stream


def test_random_numbers_are_drawn_anew_by_each_replay(sim, graph):
    out = graph.capture(lambda: torch.rand(4, device="sim"))
    torch.manual_seed(3)
    expected = [torch.rand(4, device="sim").tolist() for _ in range(2)]
    torch.manual_seed(3)
    for drawn in expected:
        graph.replay()
        assert values(out) == drawn


def test_random_numbers_come_from_the_generator_of_the_captured_call(sim, graph):
    generator = torch.Generator("sim").manual_seed(5)
    out = graph.capture(lambda: torch.rand(2, device="sim", generator=generator))
    graph.replay()
    one = values(out)
    graph.replay()
    assert values(out) != one
    generator.manual_seed(5)
    graph.replay()
    torch.accelerator.synchronize()
    fresh = torch.rand(2, device="sim", generator=torch.Generator("sim").manual_seed(5))
    # Capturing drew once, as the call did that was captured; replays go on from where it is.
    assert values(out) == values(fresh)


def test_copies_from_pinned_memory_are_part_of_the_graph(sim, graph, x):
    host = torch.full((4,), 2.0).pin_memory()
    graph.capture(lambda: x.copy_(host, non_blocking=True))
    for value in (5, 6):
        host.fill_(value)
        graph.replay()
        assert values(x) == [value] * 4


def test_pinned_memory_of_a_graph_is_kept_for_it(sim, graph, x):
    host = torch.full((4,), 2.0).pin_memory()
    graph.capture(lambda: x.copy_(host, non_blocking=True))
    address = host.data_ptr()
    host = None
    assert torch.empty(4).pin_memory().data_ptr() != address
    graph.replay()
    assert values(x) == [2] * 4


# --- Memory --------------------------------------------------------------------------------------


def test_memory_of_a_graph_is_for_nobody_else_until_it_is_closed(sim):
    graph = sim.Graph()
    x = torch.ones(1000, device="sim")
    inner = []

    def fn():
        y = x * 2
        inner.append(y.data_ptr())
        return (y + 1).sum()

    graph.capture(fn)
    others = [torch.empty(1000, device="sim") for _ in range(20)]
    with torch.Stream("sim"):
        others += [torch.empty(1000, device="sim") for _ in range(20)]
    assert inner[0] not in {t.data_ptr() for t in others}
    graph.close()


def test_inside_a_capture_freed_memory_is_reused(sim, graph, x):
    def fn():
        first = (x * 2).data_ptr()
        return first, (x * 3).data_ptr()

    first, second = graph.capture(fn)
    assert first == second


def test_what_was_freed_inside_a_capture_is_poisoned_by_the_replay(sim, graph, x):
    views = []

    def fn():
        y = x * 2
        views.append(y.data_ptr())
        del y
        return x + 1

    out = graph.capture(fn)
    graph.replay()
    assert values(out) == [2] * 4


def test_closing_gives_the_memory_back(sim):
    torch.accelerator.empty_cache()
    before = torch.accelerator.memory_reserved()
    graph = sim.Graph()
    x = torch.ones(1 << 20, device="sim")
    out = graph.capture(lambda: (x * 2) + 1)
    graph.replay()
    out = x = None  # noqa: F841 - what they held is free
    graph.close()
    torch.accelerator.synchronize()
    torch.accelerator.empty_cache()
    torch.accelerator.empty_cache()
    assert torch.accelerator.memory_reserved() <= before


def test_graphs_can_share_a_pool(sim, x):
    pool, graphs, reserved = sim.graph_pool(), [], []
    big = torch.ones(1 << 18, device="sim")
    for _ in range(3):
        graph = sim.Graph()
        graph.capture(lambda: ((big * 2) + 1).sum(), pool=pool)
        graphs.append(graph)
        reserved.append(torch.accelerator.memory_reserved())
    assert reserved[2] - reserved[0] < big.nbytes
    for graph in graphs:
        graph.close()


def test_a_shared_pool_lives_as_long_as_one_of_its_graphs(sim, x):
    pool = sim.graph_pool()
    one, other = sim.Graph(), sim.Graph()
    one.capture(lambda: x + 1, pool=pool)
    out = other.capture(lambda: x + 2, pool=pool)
    one.close()
    clobber = [torch.zeros(4, device="sim") for _ in range(50)]
    other.replay()
    assert values(out) == [3] * 4
    assert not any(t.any() for t in clobber)
    other.close()


def test_a_replay_outlives_its_graph(sim):
    graph = sim.Graph()
    x = torch.ones(1000, device="sim")
    y = torch.zeros(1000, device="sim")
    graph.capture(lambda: y.copy_((x * 2) + 1))
    graph.replay()
    graph.close()
    graph = x = None
    gc.collect()
    others = [torch.full((1000,), 9.0, device="sim") for _ in range(20)]
    assert values(y) == [3] * 1000
    del others


def test_inputs_that_the_caller_drops_are_kept(sim, graph):
    x = torch.full((1000,), 2.0, device="sim")
    out = graph.capture(lambda: x + 1)
    x = None
    others = [torch.zeros(1000, device="sim") for _ in range(20)]
    torch.accelerator.synchronize()
    graph.replay()
    assert values(out) == [3] * 1000
    del others


def test_memory_from_outside_that_is_freed_inside_a_capture_is_not_the_graphs(sim, graph, x):
    """Warm-up on the stream that then captures, and what it made is replaced."""
    stream, held = torch.Stream("sim"), {}

    def step():
        held["h"] = x[0].expand(1000) + 1
        return held["h"] * 2

    with stream:
        step()
    stream.synchronize()
    graph.capture(step, stream=stream)
    with stream:
        others = [torch.full((1000,), 9.0, device="sim") for _ in range(5)]
        stream.synchronize()
        graph.replay()
    stream.synchronize()
    assert all(sim.peek(other).eq(9).all() for other in others)


def test_what_another_graph_wrote_is_not_poisoned_by_a_replay(sim, x):
    """A's memory, freed while B captures on the same stream, is of A's pool."""
    stream, pool, held = torch.Stream("sim"), sim.graph_pool(), []
    a, b, c = sim.Graph(), sim.Graph(), sim.Graph()
    a.capture(lambda: held.append(x[0].expand(1000) + 1), stream=stream, pool=pool)
    address = held[0].data_ptr()
    b.capture(lambda: (held.clear(), x + 1), stream=stream)
    out = c.capture(lambda: x[0].expand(1000) + 1, stream=stream, pool=pool)
    assert out.data_ptr() == address
    c.replay()
    b.replay()
    assert values(out) == [2] * 1000
    for graph in (a, b, c):
        graph.close()


def test_an_input_that_is_resized_gives_a_wrong_value_and_no_crash(python):
    done = python(
        """
        from hwcore_sim import device
        device.start()
        import torch
        x, graph = torch.ones(1 << 20, device="sim"), device.Graph()
        out = graph.capture(lambda: x + 1)
        x.resize_(1 << 21)
        torch.accelerator.synchronize()
        torch.accelerator.empty_cache()
        graph.replay()
        torch.accelerator.synchronize()
        print(device.peek(out)[0].item() != 2)
        """
    )
    assert (done.status, done.output) == (0, "True"), done.errors


def test_a_resize_inside_a_capture_reads_memory_that_is_kept(python):
    done = python(
        """
        from hwcore_sim import device
        device.start()
        import torch
        x = torch.ones(1 << 20, device="sim")
        torch.accelerator.synchronize()
        graph = device.Graph()
        graph.capture(lambda: x.resize_(1 << 21))
        torch.accelerator.empty_cache()
        graph.replay()
        torch.accelerator.synchronize()
        print("alive")
        """
    )
    assert (done.status, done.output) == (0, "alive"), done.errors


def test_memory_of_a_resized_input_comes_back_with_close(sim):
    torch.accelerator.empty_cache()
    x, graph = torch.ones(1 << 20, device="sim"), sim.Graph()
    graph.capture(lambda: x.add_(1))
    x.resize_(1 << 21)
    torch.accelerator.synchronize()
    torch.accelerator.empty_cache()
    reserved = torch.accelerator.memory_reserved()
    graph.close()
    torch.accelerator.empty_cache()
    assert torch.accelerator.memory_reserved() == reserved - (4 << 20)


# --- What cannot be captured ---------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def _operator_without_metadata():
    library = torch.library.Library("simgraphs", "DEF")
    library.define("plain(Tensor x) -> Tensor")
    library.impl("plain", lambda x: x + 1, "CPU")
    yield
    library._destroy()


REFUSED = {
    "synchronize": (lambda x: torch.accelerator.synchronize(), "called synchronize"),
    "stream": (lambda x: torch.accelerator.current_stream().synchronize(), "Stream.synchronize"),
    "another stream": (lambda x: torch.Stream("sim").synchronize(), "Stream.synchronize"),
    "stream query": (lambda x: torch.accelerator.current_stream().query(), "Stream.query"),
    "event": (lambda x: torch.accelerator.current_stream().record_event().synchronize(), "event"),
    "event query": (lambda x: torch.accelerator.current_stream().record_event().query(), "event"),
    "item": (lambda x: x.sum().item(), "reads a value on the host"),
    "to host": (lambda x: x.cpu(), "copied to the host"),
    "printing": (repr, "(copied to the host|reads a value|makes a shape)"),
    "pageable copy": (lambda x: x.copy_(torch.ones(4)), "not pinned"),
    "blocking copy": (lambda x: x.copy_(torch.ones(4).pin_memory()), "while blocking"),
    "nonzero": (lambda x: x.nonzero(), "aten::nonzero, which makes a shape that depends"),
    "mask": (lambda x: x[x > 0], "aten::nonzero, which makes a shape that depends"),
    "equal": (lambda x: torch.equal(x, x + 1), "aten::equal, which reads a value"),
    "no metadata": (lambda x: torch.ops.simgraphs.plain(x), "simgraphs::plain, which has no meta"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_graph_cannot_hold_is_refused_by_name(sim, graph, x, case):
    fn, problem = REFUSED[case]
    with pytest.raises(CaptureError, match=rf"^Graph\.capture: fn .*{problem}"):
        graph.capture(lambda: fn(x))
    assert usable(sim)


def test_a_refusal_that_fn_swallows_is_raised_at_the_end(sim, graph, x):
    def fn():
        try:
            x.sum().item()
        except RuntimeError:
            return x + 1

    with pytest.raises(CaptureError, match="reads a value on the host"):
        graph.capture(fn)
    assert usable(sim)


def test_a_refusal_that_fn_turns_into_another_error_is_its_cause(sim, graph, x):
    def fn():
        try:
            x.sum().item()
        except RuntimeError as error:
            raise KeyError from error

    with pytest.raises(CaptureError, match="reads a value on the host") as caught:
        graph.capture(fn)
    assert isinstance(caught.value.__cause__, KeyError)


def test_an_error_of_fn_passes_and_leaves_the_graph_empty(sim, graph, x):
    def fn():
        x.add_(1)
        int("mine")

    before = torch.accelerator.current_stream()
    with pytest.raises(ValueError, match="mine"):
        graph.capture(fn)
    assert torch.accelerator.current_stream() == before
    assert values(x) == [1] * 4
    graph.capture(lambda: x.add_(1))
    graph.replay()
    assert values(x) == [2] * 4


def test_a_capture_inside_a_capture_is_refused(sim, graph, x):
    with pytest.raises(CaptureError, match="began another capture inside this one"):
        graph.capture(lambda: sim.Graph().capture(lambda: x + 1))
    assert usable(sim)


def test_a_replay_inside_a_capture_is_refused(sim, graph, x):
    other = sim.Graph()
    other.capture(lambda: x + 1)
    with pytest.raises(CaptureError, match="replayed a graph inside the capture"):
        graph.capture(other.replay)
    assert usable(sim)
    other.close()


def test_a_reset_inside_a_capture_is_refused(sim, graph):
    with pytest.raises(CaptureError, match="called reset"):
        graph.capture(sim.reset)
    assert usable(sim)


def test_replaying_an_empty_or_closed_graph_is_an_error(sim, x):
    graph = sim.Graph()
    with pytest.raises(CaptureError, match="the graph is empty"):
        graph.replay()
    graph.capture(lambda: x + 1)
    graph.close()
    graph.close()
    with pytest.raises(CaptureError, match="the graph is closed"):
        graph.replay()
    with pytest.raises(CaptureError, match="the graph is closed"):
        graph.capture(lambda: x + 1)


def test_a_graph_is_captured_once(sim, graph, x):
    graph.capture(lambda: x + 1)
    with pytest.raises(CaptureError, match="captured already"):
        graph.capture(lambda: x + 1)


def test_a_graph_replays_on_its_own_device(sim, graph, x):
    graph.capture(lambda: x + 1)
    torch.accelerator.set_device_index(1)
    with pytest.raises(CaptureError, match="expected one of sim:0"):
        graph.replay()


@pytest.mark.parametrize(
    "arguments", [{"fn": 3}, {"fn": list, "pool": 3}, {"fn": list, "stream": 3}]
)
def test_arguments_of_another_type_are_errors(sim, graph, arguments):
    with pytest.raises(ArgumentTypeError, match=r"^Graph.capture: "):
        graph.capture(**arguments)


# --- Several streams in one graph ----------------------------------------------------------------


def test_a_stream_that_waits_for_the_capture_takes_part_in_it(sim, graph, x):
    side = torch.Stream("sim")
    out = torch.zeros(4, device="sim")

    def fn():
        x.add_(1)
        side.wait_stream(torch.accelerator.current_stream())
        with side:
            assert sim.is_capturing()
            out.copy_(x * 10)
        torch.accelerator.current_stream().wait_stream(side)
        out.add_(1)

    graph.capture(fn)
    assert sim.pending() == 1  # the zeros
    assert values(out) == [0] * 4
    graph.replay()
    assert values(out) == [21] * 4


def test_a_stream_that_is_not_joined_is_refused(sim, graph, x):
    side = torch.Stream("sim")

    def fn():
        side.wait_stream(torch.accelerator.current_stream())
        with side:
            x.add_(1)

    with pytest.raises(CaptureError, match="did not join its work again"):
        graph.capture(fn)
    assert usable(sim)


def test_a_wait_that_is_missing_inside_a_capture_gives_the_old_value_at_replay(sim, graph, x):
    side = torch.Stream("sim")
    out = torch.zeros(4, device="sim")

    def fn():
        here = torch.accelerator.current_stream()
        side.wait_stream(here)
        with side:
            out.copy_(x * 10)
        x.add_(1)  # the side stream may read this, or not: nobody waits
        here.wait_stream(side)

    graph.capture(fn)
    graph.replay()
    assert values(out) == [20] * 4


def test_waiting_for_an_event_from_outside_is_refused(sim, graph, x):
    event = torch.accelerator.current_stream().record_event()
    with pytest.raises(CaptureError, match="recorded outside the capture"):
        graph.capture(event.wait)
    assert usable(sim)


def test_an_event_from_inside_cannot_be_waited_for_outside(sim, graph, x):
    event = graph.capture(lambda: torch.accelerator.current_stream().record_event())
    for use in (event.synchronize, event.query, event.wait):
        with pytest.raises(CaptureError, match="inside a capture"):
            use()
    event.record()
    event.synchronize()


def test_waiting_for_an_event_never_recorded_is_nothing_in_a_capture_too(sim, graph, x):
    event = torch.Event("sim")
    out = graph.capture(lambda: (event.wait(), x + 1)[1])
    graph.replay()
    assert values(out) == [2] * 4


# --- Capture streams -----------------------------------------------------------------------------


@pytest.fixture
def three_streams(sim):
    gc.collect()
    before = sim.capture_stream_limit()
    held = before - sim.streams_left()
    sim.set_capture_stream_limit(held + 3)
    yield
    sim.set_capture_stream_limit(before)


def test_capture_streams_run_out_by_name_and_come_back_with_close(sim, x, three_streams):
    graphs = [sim.Graph() for _ in range(4)]
    for graph in graphs[:3]:
        graph.capture(lambda: x + 1)
    assert sim.streams_left() == 0
    with pytest.raises(CaptureError, match=r"needs one more capture stream than the \d+ that"):
        graphs[3].capture(lambda: x + 1)
    graphs[0].close()
    graphs[3].capture(lambda: x + 1)
    for graph in graphs:
        graph.close()
    assert sim.streams_left() == 3


def test_a_failed_capture_and_a_dropped_graph_hold_no_streams(sim, x, three_streams):
    graph = sim.Graph()
    with pytest.raises(CaptureError):
        graph.capture(lambda: x.sum().item())
    assert sim.streams_left() == 3
    graph.capture(lambda: x + 1)
    assert sim.streams_left() == 2
    del graph
    assert sim.streams_left() == 3


def test_a_stream_that_takes_part_is_held_too(sim, x, three_streams):
    side, graph = torch.Stream("sim"), sim.Graph()

    def fn():
        side.wait_stream(torch.accelerator.current_stream())
        torch.accelerator.current_stream().wait_stream(side)

    with pytest.raises(CaptureError):  # joined back without work: nothing to hold it for
        graph.capture(lambda: side.wait_stream(torch.accelerator.current_stream()))
    graph.capture(fn)
    assert sim.streams_left() == 1
    graph.close()


def test_a_stream_of_before_a_reset_cannot_capture(sim, graph, x):
    stream = torch.Stream("sim")
    sim.reset()
    with pytest.raises(CapabilityError, match="was created before reset"):
        graph.capture(lambda: x + 1, stream=stream)
    assert usable(sim)
