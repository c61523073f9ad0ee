"""GraphRunner.capture: in which order, within which budget, and what a failure leaves."""

from __future__ import annotations

import contextlib
import gc
import logging
import re
import types
import weakref

import pytest
import torch

import hwcore
from hwcore.errors import ArgumentTypeError, ArgumentValueError, CaptureError, StaleGraphError
from hwcore.graphs import BATCH, GraphRunner, Slot, budget
from hwcore.graphs.addresses import Addresses
from hwcore.testing.sanitizer import Sanitizer

from ._steps import BUCKETS, SLOTS, Step, inputs, lens, runner_of, simple


class _BrokenError(Exception):
    pass


X = {"x": Slot(torch.float32, (BATCH,), fill=100.0)}


@pytest.fixture
def held(hw):
    """How many graphs the budget counts now, beyond those of before the test."""
    gc.collect()
    before = budget._held[hw.info.device_type]

    def count():
        gc.collect()
        return budget._held[hw.info.device_type] - before

    return count


@pytest.fixture
def hooks(hw):
    """Calls of the graph hooks, in order, with what was given."""
    calls = []

    def create_graph():
        calls.append(("create_graph",))
        return (yield)

    def graph_pool():
        pool = yield
        calls.append(("graph_pool", pool))
        return pool

    def graph_capture(graph, fn, pool, stream):
        calls.append(("graph_capture", pool, stream))
        return (yield)

    wrappers = types.SimpleNamespace(
        **{
            f.__name__: hwcore.hookimpl(wrapper=True)(f)
            for f in (create_graph, graph_pool, graph_capture)
        }
    )
    hw.register(wrappers)
    yield calls
    hw.unregister(wrappers)


def test_buckets_are_captured_largest_first_after_their_warm_ups(hw):
    step = Step(hw.device())
    with runner_of(hw, step, warm_ups=2):
        order = [(4, 3), (8, 1), (4, 1), (1, 3), (2, 1), (1, 1)]
        assert sorted(order) == sorted(BUCKETS)
        assert step.calls == [bucket for bucket in order for _ in range(3)]


@pytest.mark.parametrize("warm_ups", [0, 1])
def test_warm_ups_may_be_fewer(hw, warm_ups):
    step = Step(hw.device())
    with runner_of(hw, step, buckets=[(2, 1)], warm_ups=warm_ups):
        assert len(step.calls) == warm_ups + 1


def test_all_graphs_share_one_pool_and_one_side_stream(hw, hooks):
    with runner_of(hw):
        captures = [call for call in hooks if call[0] == "graph_capture"]
        assert len(captures) == len(BUCKETS)
        (pool,) = [call[1] for call in hooks if call[0] == "graph_pool"]
        assert all(capture[1] is pool for capture in captures)
        assert len({capture[2] for capture in captures}) == 1
        assert captures[0][2] != hw.current_stream()


def test_warm_ups_and_capture_see_nothing_but_padding(hw):
    seen = []

    def fn(x):
        if not hw.is_capturing():
            seen.append(x.clone())
        return x * 2

    with runner_of(hw, fn, X, [(2, 1), (4, 1)], warm_ups=1) as runner:
        for _ in range(2):
            assert [t.tolist() for t in seen] == [[100.0] * 4, [100.0] * 2]
            seen.clear()
            runner.run({"x": torch.ones(4, device=hw.device())}, lens(4))
            runner.recapture()


def test_a_function_that_writes_its_inputs_is_warmed_up_on_padding_each_time(hw):
    table, seen = torch.zeros(8, device=hw.device()), []

    def fn(rows):
        out = table[rows] + 1  # row 8 does not exist
        if not hw.is_capturing():
            seen.append(rows.tolist())
        rows.add_(1)
        return out

    with runner_of(hw, fn, {"rows": Slot(torch.int64, (BATCH,), fill=7)}, [(2, 1)], warm_ups=3):
        assert seen == [[7, 7]] * 3


WRITES = {
    "add_": lambda x: x.add_(1),
    "foreach": lambda x: torch._foreach_add_([x], 1),
    "data": lambda x: x.data.add_(1),
    "a view": lambda x: x.view(-1)[1:].add_(1),
}


@pytest.mark.parametrize("write", WRITES)
def test_what_a_replay_writes_into_inputs_is_no_padding_of_the_next_batch(hw, write):
    seen = torch.zeros(4, device=hw.device())

    def fn(x):
        seen.copy_(x)
        WRITES[write](x)
        return x * 2

    with runner_of(hw, fn, X, [(4, 1)]) as runner:
        for _ in range(3):
            runner.run({"x": torch.zeros(2, device=hw.device())}, lens(2))
            assert seen.tolist() == [0, 0, 100, 100]


def test_a_failed_capture_leaves_no_work_on_memory_that_is_freed(hw):
    def fn(x):
        x.mul_(0.5)
        raise _BrokenError

    def attempt():
        slots = {"x": Slot(torch.float32, (BATCH, 1000), fill=100.0)}
        with pytest.raises(CaptureError):
            GraphRunner(fn, slots, [(4, 1)], backend=hw).capture()

    policy = contextlib.nullcontext()
    if hw.info.name == "sim":
        from hwcore_sim import device

        policy = device.drain_policy("lazy")
    with policy, Sanitizer(hw):
        attempt()
        gc.collect()
        others = torch.full((4096,), 7.0, device=hw.device())
        hw.synchronize_stream(hw.current_stream())
        hw.synchronize()
        assert (others == 7).all()


def test_what_warm_ups_write_into_inputs_is_no_padding_of_the_first_batch(hw):
    def fn(x):
        if not hw.is_capturing():
            x.fill_(-5)
        return x * 2

    with runner_of(hw, fn, X, [(4, 1)]) as runner:
        runner.run({"x": torch.ones(2, device=hw.device())}, lens(2))
        assert runner.buffers.views((4, 1))["x"].tolist() == [1, 1, 100, 100]


def test_smaller_graphs_take_their_memory_from_the_largest(hw):
    """Where the device has pools: the intermediate results of all graphs lie in one place."""
    if hw.info.name != "sim":
        pytest.skip("the tape keeps every tensor of every graph")

    def fn(x):
        for _ in range(4):
            x = x[:, None].repeat(1, 50_000).sum(1)
        return x

    def reserved(buckets):
        gc.collect()
        hw.synchronize()
        before = torch.accelerator.memory_reserved()
        with runner_of(hw, fn, X, buckets, warm_ups=0):
            return torch.accelerator.memory_reserved() - before

    # Not one: this allocator splits no block that is much too large.
    assert reserved([(5, 1), (8, 1), (6, 1), (7, 1)]) < 2 * reserved([(8, 1)])


# --- Progress -------------------------------------------------------------------------------------


def test_a_progress_bar_counts_graphs_and_shows_the_memory_used(hw, capsys):
    with simple(hw, [(1, 1), (2, 1)], progress=True):
        shown = capsys.readouterr()
    assert shown.out == ""
    assert re.search(r"graphs .* 2/2 .*\d+ MiB used", shown.err)


def test_a_progress_bar_ends_where_a_capture_fails(hw, capsys):
    def fn(x):
        if x.shape[0] == 1:
            raise _BrokenError
        return x * 2

    with pytest.raises(CaptureError):
        runner_of(hw, fn, X, [(1, 1), (2, 1)], progress=True)
    assert re.search(r"graphs .* 1/2 .*used +\(1, 1\)", capsys.readouterr().err)


def test_without_a_terminal_there_is_no_progress_bar(hw, capsys):
    with simple(hw):
        assert capsys.readouterr() == ("", "")


def test_the_log_says_how_many_graphs_took_how_much(hw, caplog):
    with caplog.at_level(logging.INFO, "hwcore"), simple(hw, [(1, 1), (2, 1)]):
        assert re.search(r"2 graphs captured on \S+, \d+ MiB used", caplog.text)


# --- Budget ---------------------------------------------------------------------------------------


def test_too_many_buckets_are_refused_before_anything_runs(hw, held):
    step = Step(hw.device())
    runner = GraphRunner(step, SLOTS, BUCKETS, backend=hw, capture_budget=held() + 5)
    with pytest.raises(CaptureError) as caught:
        runner.capture()
    for part in ("`buckets` got 6 to capture", "at most 5 in all", "Name fewer batch sizes"):
        assert part in str(caught.value)
    assert step.calls == []
    assert held() == 0


def test_the_budget_is_one_for_all_runners_and_given_back(hw, held):
    with simple(hw, [(1, 1), (2, 1)]):
        assert held() == 2
        with pytest.raises(CaptureError, match="while this process holds 2 graphs"):
            simple(hw, [(4, 1)], capture_budget=2)
        with simple(hw, [(4, 1)], capture_budget=3):
            assert held() == 3
        assert held() == 2
    assert held() == 0


def test_a_runner_that_was_dropped_holds_no_graphs(hw, held):
    runner = simple(hw)
    graph = weakref.ref(runner._set.graphs[4, 1])
    assert held() == 1
    del runner
    assert held() == 0
    assert graph() is None


def test_the_budget_comes_from_the_environment_where_no_argument_says_it(hw, monkeypatch):
    monkeypatch.setenv("HWCORE_CAPTURE_BUDGET", "0")
    with pytest.raises(CaptureError, match="at most 0 in all"):
        simple(hw)
    simple(hw, capture_budget=2**20).close()
    monkeypatch.setenv("HWCORE_CAPTURE_BUDGET", "many")
    with pytest.raises(ArgumentValueError, match="HWCORE_CAPTURE_BUDGET got 'many'"):
        simple(hw)


def test_by_default_only_a_device_with_few_streams_has_a_budget(hw, monkeypatch):
    monkeypatch.setattr(budget, "DEFAULT_BUDGET", 0)
    if "capture_stream_limit" in hw.info.quirks:
        with pytest.raises(CaptureError, match="at most 0 in all"):
            simple(hw)
    else:
        simple(hw).close()


def test_a_device_that_runs_out_of_streams_is_named_with_the_bucket(hw, held):
    if hw.info.name != "sim":
        pytest.skip("there is no limit to run into")
    from hwcore_sim.device import graphs

    limit = graphs.capture_stream_limit()
    graphs.set_capture_stream_limit(limit - graphs.streams_left() + 1)
    try:
        with pytest.raises(CaptureError, match=r"bucket \(2, 1\) .*capture stream") as caught:
            simple(hw, [(4, 1), (2, 1)])
        assert caught.value.__cause__ is not None
        assert held() == 0
        gc.collect()
        assert graphs.streams_left() == 1
    finally:
        graphs.set_capture_stream_limit(limit)


# --- Failures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("while_capturing", [False, True], ids=["warm-up", "capture"])
def test_a_failure_names_its_bucket_and_leaves_an_empty_runner(hw, held, while_capturing):
    broken, step = True, Step(hw.device())

    def fn(**given):
        if broken and given["rows"].shape[0] == 2 and hw.is_capturing() is while_capturing:
            raise _BrokenError
        return step(**given)

    runner = GraphRunner(fn, SLOTS, BUCKETS, backend=hw)
    with pytest.raises(CaptureError, match=r"bucket \(2, 1\) got _BrokenError") as caught:
        runner.capture()
    assert isinstance(caught.value.__cause__, _BrokenError)
    assert held() == 0
    assert runner._set.graphs == {}
    assert not hw.is_capturing()
    assert runner.can_run(1).kind == "not captured"
    broken = False
    runner.capture()
    given = inputs(3, 1, hw.device())
    assert runner.run(given, lens(3))["logits"].shape == (3, 3)
    runner.close()


def test_out_of_memory_is_named_with_what_the_buckets_took(hw, held):
    def step(x):
        if x.shape[0] == 2:
            message = "Tried to allocate 2.00 GiB"
            raise torch.OutOfMemoryError(message)
        return x + 1

    runner = GraphRunner(step, X, [(8, 1), (4, 1), (2, 1)])
    with pytest.raises(CaptureError) as caught:
        runner.capture()
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    parts = r"bucket \(2, 1\) got no memory on .*: Tried to allocate 2.00 GiB; expected enough for "
    parts += r"3 buckets. 2 were captured; the inputs of all take \d+ MiB; capturing took \d+ MiB"
    assert re.search(
        parts + r"; \d+ MiB of \d+ MiB are free. Leave out the largest", str(caught.value)
    )
    assert held() == 0
    assert not runner.can_run(1)


def test_out_of_memory_is_named_also_where_the_device_answers_nothing_any_more(hw, monkeypatch):
    def no_answer(index=None):
        message = "the device does not answer"
        raise OSError(message)

    def step(x):
        monkeypatch.setattr(hw, "memory_info", no_answer)
        raise torch.OutOfMemoryError

    runner = GraphRunner(step, X, [(2, 1)], backend=hw)
    with pytest.raises(CaptureError, match=r"bucket \(2, 1\) got no memory.*does not answer"):
        runner.capture()


def test_a_host_read_in_the_function_is_refused_with_its_bucket(hw):
    with pytest.raises(CaptureError, match=r"bucket \(4, 1\)"):
        runner_of(hw, lambda x: x * x.sum().item(), X, [(4, 1)])


def test_an_interruption_passes_as_it_is_and_leaves_an_empty_runner(hw, held):
    def fn(x):
        raise KeyboardInterrupt

    runner = GraphRunner(fn, X, [(4, 1)], backend=hw)
    with pytest.raises(KeyboardInterrupt):
        runner.capture()
    assert held() == 0
    assert not runner.can_run(1)


@pytest.mark.parametrize("method", ["capture", "recapture", "prepare", "replay", "run", "close"])
@pytest.mark.parametrize("while_capturing", [False, True], ids=["warm-up", "capture"])
def test_a_call_within_a_capture_is_refused(hw, method, while_capturing):
    other = simple(hw)
    x = torch.ones(1, device=hw.device())
    prepared = other.prepare({"x": x}, lens(1))
    arguments = {"prepare": ({"x": x}, lens(1)), "run": ({"x": x}, lens(1)), "replay": (prepared,)}
    caught = []

    def fn(x):
        for it in (runner, other) if while_capturing else (runner,):
            if hw.is_capturing() is while_capturing:
                with pytest.raises(CaptureError, match="a call within a capture") as error:
                    getattr(it, method)(*arguments.get(method, ()))
                caught.append(str(error.value))
        return x * 2

    runner = GraphRunner(fn, X, [(4, 1)], backend=hw, warm_ups=1)
    runner.capture()
    assert len(caught) == (2 if while_capturing else 1)
    named = "can_run" if method == "run" else method
    assert all(message.startswith(f"GraphRunner.{named}: ") for message in caught)
    assert runner.run({"x": x}, lens(1)).tolist() == [2], "the capture has gone on"
    assert other.replay(prepared).tolist() == [2], "the other runner has lost nothing"
    runner.close()
    other.close()


def test_capturing_twice_is_refused_and_loses_nothing(hw):
    with simple(hw) as runner:
        with pytest.raises(CaptureError, match=r"Call recapture\(\) to replace them"):
            runner.capture()
        assert runner.run({"x": torch.ones(1, device=hw.device())}, lens(1)).tolist() == [2]


@pytest.mark.parametrize(
    ("arguments", "kind", "part"),
    [
        ({"fn": 3}, ArgumentTypeError, "`fn` got 3"),
        ({"warm_ups": -1}, ArgumentValueError, "`warm_ups` got -1"),
        ({"warm_ups": None}, ArgumentValueError, "`warm_ups` got None"),
        ({"pad_seq_len": -1}, ArgumentValueError, "`pad_seq_len` got -1"),
        ({"static": [1]}, ArgumentTypeError, "`static` got [1]"),
        ({"static": {"w": object}}, ArgumentTypeError, "static `w` got"),
        ({"capture_budget": -1}, ArgumentValueError, "`capture_budget` got -1"),
        ({"capture_budget": True}, ArgumentValueError, "`capture_budget` got True"),
    ],
)
def test_malformed_arguments_are_refused(hw, arguments, kind, part):
    given = {"fn": lambda x: x * 2, "slots": X, "buckets": [(1, 1)], "backend": hw} | arguments
    with pytest.raises(kind) as caught:
        GraphRunner(**given).capture()
    assert part in str(caught.value)


# --- Static tensors -------------------------------------------------------------------------------


class Model(torch.nn.Module):
    def __init__(self, device):
        super().__init__()
        self.inner = torch.nn.Linear(1, 1, bias=False, device=device)
        self.register_buffer("scale", torch.ones(1, device=device))
        torch.nn.init.constant_(self.inner.weight, 3.0)

    def forward(self, x):
        return (self.inner(x[:, None]) * self.scale)[:, 0]


def moved(change):
    return pytest.param(*change, id=change[1])


def other(tensor):
    return tensor.detach().clone()


CHANGES = [
    (lambda m, kv: setattr(m.inner.weight, "data", other(m.inner.weight)), "model.inner.weight"),
    (
        lambda m, kv: setattr(m.inner, "weight", torch.nn.Parameter(other(m.inner.weight))),
        "model.inner.weight",
    ),
    (
        lambda m, kv: setattr(m, "inner", torch.nn.Linear(1, 1, device=m.scale.device)),
        "model.inner",
    ),
    (lambda m, kv: setattr(m, "scale", other(m.scale)), "model.scale"),
    (lambda m, kv: kv["layers"][1].set_(other(kv["layers"][1])), "kv.layers.1"),
    (lambda m, kv: kv["layers"].__setitem__(0, other(kv["layers"][0])), "kv.layers.0"),
    (lambda m, kv: kv["layers"].pop(), "kv.layers.1"),
    (lambda m, kv: kv.__setitem__("layers", list(kv["layers"])), "kv.layers"),
]


@pytest.fixture
def model(hw):
    with torch.no_grad():
        yield Model(hw.device())


@pytest.fixture
def kv(hw):
    return {"layers": [torch.zeros(4, device=hw.device()) for _ in range(2)], "page_size": 16}


@pytest.mark.parametrize(("change", "name"), [moved(change) for change in CHANGES])
def test_a_static_tensor_that_moved_is_named_and_recapture_follows_it(hw, model, kv, change, name):
    static = {"model": model, "kv": kv}
    x = torch.ones(2, device=hw.device())
    with runner_of(hw, model.forward, X, [(4, 1)], static=static) as runner:
        prepared = runner.prepare({"x": x}, lens(2))
        change(model, kv)
        for _ in range(2):
            with pytest.raises(StaleGraphError) as caught:
                runner.replay(prepared)
        assert f"GraphRunner.replay: static tensor `{name}` got other memory" in str(caught.value)
        assert "Call recapture()" in str(caught.value)
        runner.recapture()
        assert torch.equal(runner.run({"x": x}, lens(2)), model(x))


@pytest.mark.parametrize(
    "change",
    [
        lambda m, kv: m.inner.weight.fill_(5),
        lambda m, kv: kv["layers"][0].add_(1),
        lambda m, kv: m.requires_grad_(False),
        lambda m, kv: m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()}),
        lambda m, kv: kv["layers"].append(torch.zeros(1)),
        lambda m, kv: m.inner._buffers.update(more=torch.zeros(1)),
        lambda m, kv: kv.update(other=None),
        lambda m, kv: kv.update(page_size=10_000 + kv["page_size"]),
    ],
)
def test_what_changes_in_place_or_is_added_has_not_moved(hw, model, kv, change):
    x = torch.ones(2, device=hw.device())
    static = {"model": model, "kv": kv}
    with runner_of(hw, model.forward, X, [(4, 1)], static=static) as runner:
        for _ in range(2):
            change(model, kv)
            for _ in range(2):
                assert torch.equal(runner.run({"x": x}, lens(2)), model(x))
        model.scale = other(model.scale)
        with pytest.raises(StaleGraphError, match=r"`model\.scale`"):
            runner.run({"x": x}, lens(2))


def test_a_tensor_that_moves_while_capturing_is_an_error_of_the_capture(hw, model):
    def fn(x):
        model.scale = other(model.scale)
        return x * 2

    runner = GraphRunner(fn, X, [(4, 1)], backend=hw, static={"model": model})
    with pytest.raises(StaleGraphError, match=r"GraphRunner.capture: .*`model.scale`"):
        runner.capture()
    assert not runner.can_run(1)


def test_what_was_added_is_looked_at_closely_once(hw, kv, monkeypatch):
    closely = []
    look = Addresses._which
    monkeypatch.setattr(Addresses, "_which", lambda self: closely.append(1) or look(self))
    addresses = Addresses({"kv": kv})
    assert addresses.moved() is None
    assert closely == []
    kv["layers"].append(torch.zeros(1))
    for _ in range(3):
        assert addresses.moved() is None
    assert closely == [1]


def test_tied_weights_and_cycles_are_looked_at_once(hw, model):
    model.again = model.inner
    both = [model, model.inner.weight]
    both.append(both)
    with runner_of(hw, model.forward, X, [(4, 1)], static={"all": both}) as runner:
        assert len(runner._set.static._tensors) == 2
        assert runner.run({"x": torch.ones(1, device=hw.device())}, lens(1)).tolist() == [3]


def test_recapture_gives_the_old_graphs_back_first(hw, held):
    with simple(hw, [(1, 1), (2, 1)], capture_budget=held() + 2) as runner:
        old = weakref.ref(runner._set.graphs[2, 1])
        runner.recapture()
        assert held() == 2
        assert old() is None


def test_the_mapping_of_static_tensors_is_looked_at_as_well(hw):
    pools = {"k": torch.ones(2, device=hw.device()), "v": torch.ones(2, device=hw.device())}
    with runner_of(hw, lambda x: x * pools["k"].sum(), X, [(2, 1)], static=pools) as runner:
        x = {"x": torch.ones(2, device=hw.device())}
        assert runner.run(x, lens(2)).tolist() == [2, 2]
        pools["k"] = torch.full((2,), 5.0, device=hw.device())
        with pytest.raises(StaleGraphError, match="static tensor `k` got other memory"):
            runner.run(x, lens(2))
        runner.recapture()
        assert runner.run(x, lens(2)).tolist() == [10, 10]
