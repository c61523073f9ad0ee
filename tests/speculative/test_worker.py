"""EagleVerifyWorker, one step at a time."""

import dataclasses
import doctest

import pytest
import torch

import hwcore
from hwcore.cpu import CpuPlugin
from hwcore.errors import ArgumentTypeError, CapabilityError
from hwcore.graphs import GraphRunner
from hwcore.overlap import FutureMap, RelayPayload, RelaySpec
from hwcore.speculative import (
    EagleVerifyWorker,
    HostLogitProcessor,
    SamplingParams,
    TreeMaskMode,
    VerifyStatus,
    verify_slots,
)
from hwcore.types import PlanStreamPolicy

from ._steps import CONTEXT, N, Steps

WAYS = {
    "one stream": {"plan_stream": False},
    "plan stream": {"plan_stream": True},
    "graphs": {"plan_stream": False, "graphs": True},
    "graphs and plan stream": {"plan_stream": True, "graphs": True},
}


@pytest.fixture(params=WAYS.values(), ids=WAYS.keys())
def steps(request, hw):
    """A worker in each of its ways."""
    made = Steps(hw, **request.param)
    yield made
    made.close()


@pytest.fixture
def eager(hw):
    made = Steps(hw)
    yield made
    made.close()


@pytest.fixture
def sim(hw):
    if hw.info.name != "sim":
        pytest.skip("the device does not tell what the host waits for")
    from hwcore_sim import device

    return device


def test_the_docstring_does_what_it_says(hw):
    def on(values):
        return torch.tensor(values, device=hw.device())

    names = {"torch": torch, "on": on, **vars(hwcore.overlap), **vars(hwcore.speculative)}
    test = doctest.DocTestParser().get_doctest(
        EagleVerifyWorker.__doc__, names, "EagleVerifyWorker", None, None
    )
    assert len(test.examples) > 9
    assert doctest.DocTestRunner().run(test).failed == 0


# --- A step ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("in_any_order", "watched")
class TestAStep:
    def test_it_emits_what_the_target_says_and_leaves_the_next_root_and_length(self, steps):
        step = steps.worker.run(steps.batch([1, 3], [4, 9]))
        assert step.commit.accept_tokens.tolist() == [[11, 12, -1], [31, 32, -1]]
        assert step.result.status.tolist() == [VerifyStatus.OK] * 2
        assert step.rows.tolist() == [1, 3]
        assert step.replayed == (steps.runner is not None)
        assert steps.lens([1, 3]) == [6, 11]
        assert steps.held([1, 3]) == [12, 32]

    def test_the_forward_is_given_tokens_positions_and_the_slots_of_their_places(self, steps):
        steps.worker.run(steps.batch([1, 3], [4, 9]))
        assert steps.target.tokens[:2, :N].tolist() == [[10, 11, 15], [30, 31, 35]]
        assert steps.target.positions[: 2 * N].tolist() == [4, 5, 6, 9, 10, 11]
        first = CONTEXT + 4, 3 * CONTEXT + 9
        assert steps.target.locs[:2, :N].tolist() == [[at, at + 1, at + 2] for at in first]

    def test_steps_follow_each_other(self, steps):
        steps.prefill([1, 3], [4, 9], [10, 30])
        for n in range(4):
            lens = [4 + 2 * n, 9 + 2 * n]
            steps.worker.run(steps.batch([1, 3], lens, prefilled=False))
        assert steps.lens([1, 3]) == [12, 17]
        assert steps.held([1, 3]) == [18, 38]

    def test_what_lies_between_mark_and_prepare_does_not_matter(self, steps):
        batch = steps.batch([1, 3], [4, 9])
        steps.worker.mark(batch)
        other = torch.ones(8, device=steps.device) * 2
        prepared = steps.worker.prepare(batch)
        other += 1
        assert steps.worker.verify(prepared).commit.accept_lens.tolist() == [2, 2]
        assert steps.held([1, 3]) == [12, 32]

    def test_a_padded_batch_keeps_nothing_of_its_padding(self, steps):
        steps.prefill([1], [4], [10])
        step = steps.worker.run(steps.batch([1, 0, 0], [4, 0, 0], prefilled=False))
        assert step.commit.accept_tokens[0].tolist() == [11, 12, -1]
        assert steps.target.locs[1:3, :N].tolist() == [[0] * N] * 2
        assert steps.lens([1, 0]) == [6, 0]
        assert steps.held([1]) == [12]

    def test_an_idle_batch_runs_the_forward_and_leaves_nothing(self, steps):
        calls = steps.target.calls
        assert steps.worker.run(steps.idle()) is None
        if steps.runner is None:
            assert steps.target.calls == calls + 1
        assert steps.lens([0, 1]) == [0, 0]

    def test_a_step_after_an_idle_one_is_right(self, steps):
        steps.worker.run(steps.idle())
        steps.worker.run(steps.batch([1, 3], [4, 9]))
        assert steps.held([1, 3]) == [12, 32]


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_the_host_waits_for_nothing(hw, sim, monkeypatch, way, sampled):
    monkeypatch.setenv("HWCORE_DEBUG", "0")  # it looks at arguments
    steps, more = Steps(hw, vocab=64, **way), {}
    if sampled:
        more["sampling"] = SamplingParams.of([0.0, 0.8], top_ps=[1.0, 0.9], device=steps.device)
        more["seeds"] = steps.on([1, 2])
    steps.prefill([1, 3], [4, 9], [10, 30])
    for n in range(2):
        batch = steps.batch([1, 3], [4 + n * N, 9 + n * N], prefilled=False, **more)
        with sim.host_waits() as waits:
            steps.worker.mark(batch)
            prepared = steps.worker.prepare(batch)
            steps.worker.vacate([3] if n else [])
            steps.worker.verify(prepared)
        assert waits == []
    steps.held([1])
    steps.close()


# --- Rows that leave ------------------------------------------------------------------------------


@pytest.mark.usefixtures("in_any_order", "watched")
class TestVacated:
    @pytest.fixture
    def given_away(self, steps):
        """Row 3 and its slots go to another request between prepare and verify."""
        prepared = steps.worker.prepare(steps.batch([1, 3], [4, 9]))
        steps.worker.vacate([3])
        steps.prefill([3], [2], [77])
        slots = steps.on(list(range(3 * CONTEXT, 4 * CONTEXT)))
        steps.target.kv.index_fill_(0, slots, 55)  # the other's entries
        return steps.worker.verify(prepared)

    def test_the_rows_next_owner_finds_its_own_token_and_length(self, steps, given_away):
        assert steps.lens([1, 3]) == [6, 2]
        assert steps.held([1, 3]) == [12, 77]

    def test_the_rows_next_owner_finds_its_own_kv_entries(self, steps, given_away):
        assert steps.target.kv[3 * CONTEXT : 4 * CONTEXT].tolist() == [55] * CONTEXT
        assert steps.target.locs[1, :N].tolist() == [0] * N
        assert steps.held([1, 3]) == [12, 77]

    def test_what_is_left_says_so(self, steps, given_away):
        assert given_away.rows.tolist() == [1, 0]
        assert given_away.cache_locs[1].tolist() == [0] * N
        assert given_away.commit.kv_src[1].tolist() == [0] * N
        assert given_away.commit.kv_dst[1].tolist() == [0] * N
        assert given_away.commit.accept_tokens[0].tolist() == [11, 12, -1]
        steps.held([1, 3])

    def test_between_mark_and_prepare_it_counts_as_well(self, steps):
        batch = steps.batch([1, 3], [4, 9])
        steps.worker.mark(batch)
        steps.worker.vacate([3])
        steps.prefill([3], [2], [77])
        assert steps.worker.run(batch).rows.tolist() == [1, 0]
        assert steps.held([1, 3]) == [12, 77]

    def test_the_next_batch_may_have_the_row_again(self, steps):
        prepared = steps.worker.prepare(steps.batch([1, 3], [4, 9]))
        steps.worker.vacate([3])
        steps.worker.verify(prepared)
        steps.prefill([3], [2], [70])
        step = steps.worker.run(steps.batch([3], [2], prefilled=False))
        assert step.rows.tolist() == [3]
        assert steps.held([1, 3]) == [12, 72]

    def test_all_of_a_batch_may_leave(self, steps):
        prepared = steps.worker.prepare(steps.batch([1, 3], [4, 9]))
        steps.worker.vacate([3, 1])
        assert steps.worker.verify(prepared).rows.tolist() == [0, 0]
        steps.relay.check()

    def test_what_was_verified_is_emptied_for_the_next_owner(self, steps):
        steps.worker.run(steps.batch([1, 3], [4, 9]))
        steps.worker.vacate([3])
        steps.prefill([3], [2], [77])  # not written twice
        assert steps.held([1, 3]) == [12, 77]


def test_with_pages_what_left_goes_to_its_place_in_nobodys_page(hw):
    steps = Steps(hw, page_size=4, num_slots=6 * CONTEXT)
    prepared = steps.worker.prepare(steps.batch([1, 3], [4, 9]))
    steps.worker.vacate([3])
    steps.worker.verify(prepared)  # commit looks at slots and pages
    assert steps.target.locs[:2, :N].tolist() == [
        [CONTEXT + 4, CONTEXT + 5, CONTEXT + 6],
        [1, 2, 3],
    ]
    steps.held([1])
    steps.close()


def test_with_pages_padding_is_at_its_place_of_nobodys_page(hw):
    steps = Steps(hw, page_size=4, num_slots=6 * CONTEXT)
    steps.prefill([1], [4], [10])
    steps.worker.run(steps.batch([1, 0], [4, 0], prefilled=False))  # commit looks as well
    assert steps.target.locs[1, :N].tolist() == [0, 1, 2]
    steps.held([1])
    steps.close()


# --- Graphs ---------------------------------------------------------------------------------------


class TestCanRun:
    def verdict(self, steps, **more):
        batch = steps.batch([1, 3], [4, 9], **more)
        said = steps.worker.can_run(batch)
        assert steps.worker.run(batch).replayed == bool(said)
        steps.held([1, 3])
        steps.close()
        return said

    def test_a_batch_that_fits_runs_in_a_graph(self, hw):
        assert self.verdict(Steps(hw, graphs=True)).bucket == (4, N)

    def test_without_a_runner_there_is_none(self, hw):
        said = self.verdict(Steps(hw))
        assert (said.kind, said.reason) == (
            "no runner",
            "the worker was given no GraphRunner",
        )

    def test_too_large_a_batch_has_the_runners_reason(self, hw):
        said = self.verdict(Steps(hw, graphs=True, buckets=[(1, N)]))
        assert said.kind == "batch size"
        assert "a batch of 2 requests is larger than the largest bucket" in said.reason

    def test_another_width_has_the_runners_reason(self, hw):
        steps = Steps(hw, graphs=True, buckets=[(2, N + 1)])
        assert self.verdict(steps).kind == "tokens per request"

    def test_what_the_graph_takes_and_the_batch_has_not_is_named(self, hw):
        steps = Steps(hw, graphs=True)
        batch = steps.batch([1, 3], [4, 9], has_positions=False)
        said = steps.worker.can_run(batch)
        assert said.kind == "inputs"
        assert said.reason == "the graph takes positions, which this batch does not have"
        steps.close()

    def test_a_processor_on_the_host_needs_the_host(self, hw):
        processor = HostLogitProcessor(lambda logits, requests, paths: logits, "grammar")
        steps = Steps(hw, graphs=True, processor=processor)
        said = steps.worker.can_run(steps.batch([1, 3], [4, 9]))
        assert said.kind == "processor"
        assert "logit processor `grammar` runs on the host" in said.reason
        assert steps.worker.can_run(steps.idle())
        steps.close()

    def test_a_processor_on_the_device_does_not(self, hw):
        steps = Steps(hw, graphs=True, processor=lambda rows: rows.logits)
        assert steps.worker.can_run(steps.batch([1, 3], [4, 9]))
        steps.close()

    def test_an_idle_batch_takes_any_graph_of_its_width(self, hw):
        steps = Steps(hw, graphs=True)
        assert steps.worker.can_run(steps.idle()).bucket == (4, N)
        assert steps.worker.can_run(steps.idle(rows=9)).bucket == (4, N)
        steps.close()


@pytest.fixture
def told(hw):
    """What `graph_replay` is told of each batch."""
    seen = []

    class Wrapper:
        @hwcore.hookimpl(wrapper=True)
        def graph_replay(self, graph, buffers, batch):
            seen.append(batch)
            return (yield)

    wrapper = Wrapper()
    hw.register(wrapper)
    yield seen
    hw.unregister(wrapper)


@pytest.mark.parametrize("plan_stream", [True, False])
def test_the_backend_is_told_what_was_decided(hw, told, plan_stream):
    steps = Steps(hw, graphs=True, plan_stream=plan_stream)
    steps.worker.run(steps.batch([1, 3], [4, 9], attention="mla"))
    (batch,) = told
    assert batch.plan_stream_active is plan_stream
    assert (batch.bucket, batch.seq_lens, batch.attention) == ((4, N), (4, 9), "mla")
    assert batch.padded_seq_lens == (4, 9, 1, 1)
    assert batch.recomputed == {}
    steps.held([1, 3])
    steps.close()


def test_slots_are_those_that_the_forward_names():
    def forward(draft_tokens, tree_mask, page_table=None):
        pass

    assert sorted(verify_slots(forward)) == ["draft_tokens", "tree_mask"]
    mask = verify_slots(forward)["tree_mask"]
    assert mask.shape_for(2, 5) == (2, 5, 5)
    packed = {"tree_mask_mode": TreeMaskMode.BITPACKED}
    for nodes, size in ((8, 1), (9, 2), (16, 2), (17, 4), (33, 8)):
        slot = verify_slots(forward, num_draft_tokens=nodes, **packed)["tree_mask"]
        assert slot.shape_for(2, nodes) == (2, nodes, size)
    every = verify_slots(lambda **inputs: None, mrope=True)
    assert sorted(every) == [
        "cache_locs",
        "draft_tokens",
        "mrope_positions",
        "positions",
        "rows",
        "seq_lens",
        "tree_mask",
    ]


@pytest.mark.parametrize("nodes", [3, 9, 33])
def test_a_packed_mask_fits_its_slot(hw, nodes):
    def forward(draft_tokens, tree_mask):
        return draft_tokens + 1

    mode = TreeMaskMode.BITPACKED
    slots = verify_slots(forward, tree_mask_mode=mode, num_draft_tokens=nodes)
    relay = FutureMap(RelaySpec(pool_size=6), backend=hw)
    with GraphRunner(forward, slots, [(2, nodes)], backend=hw) as runner:
        runner.capture()
        worker = EagleVerifyWorker(
            forward, relay, runner=runner, tree_mask_mode=mode, backend=hw, plan_stream=False
        )
        steps = Steps(hw)
        batch = steps.batch([1], [4])
        wide = torch.arange(nodes, device=hw.device()).unsqueeze(0)
        batch = dataclasses.replace(batch, draft_tokens=wide, parents=wide - 1)
        assert worker.run(batch).replayed
    relay.close()


# --- What is left for the next step ---------------------------------------------------------------


def test_accepted_hidden_states_are_kept_and_the_last_is_handed_on(hw):
    steps = Steps(hw, relay=RelaySpec(pool_size=6, hidden_size=1, hidden_dtype=torch.bfloat16))
    rows = steps.on([1, 3])
    hidden = torch.zeros(2, 1, dtype=torch.bfloat16, device=hw.device())
    steps.relay.publish(rows, steps.on([4, 9]))
    steps.relay.stash(rows, RelayPayload(steps.on([10, 30]), hidden_states=hidden))
    step = steps.worker.run(steps.batch([1, 3], [4, 9], prefilled=False))
    assert step.commit.hidden_states.squeeze(2).tolist() == [[100, 110, 0], [300, 310, 0]]
    payload = steps.relay.resolve(rows)
    assert payload.hidden_states.squeeze(1).tolist() == [110, 310]
    assert payload.next_token.tolist() == [12, 32]
    steps.close()


def test_a_draft_model_says_what_is_handed_on(hw):
    seen = []

    def extend(step):
        seen.append(step)
        index = step.commit.accept_tokens[:, :2].clamp(min=0)
        return RelayPayload(step.commit.bonus_tokens, topk_p=index / 100, topk_index=index)

    steps = Steps(hw, relay=RelaySpec(pool_size=6, topk=2), draft_extend=extend)
    rows = steps.on([1, 3])
    index = torch.zeros(2, 2, dtype=torch.int64, device=hw.device())
    first = RelayPayload(steps.on([10, 30]), topk_p=index / 2, topk_index=index)
    steps.relay.publish(rows, steps.on([4, 9]))
    steps.relay.stash(rows, first)
    step = steps.worker.run(steps.batch([1, 3], [4, 9], prefilled=False))
    assert seen == [step]
    assert steps.relay.resolve(rows).topk_index.tolist() == [[11, 12], [31, 32]]
    steps.close()


def test_every_move_is_handed_to_the_pool(hw):
    moves = []
    steps = Steps(hw, move_kv=lambda src, dst: moves.append((src.tolist(), dst.tolist())))
    steps.worker.run(steps.batch([1], [4]))
    at = CONTEXT + 4
    assert moves == [([at, at + 1, at], [at, at + 1, at])]
    steps.held([1])
    steps.close()


# --- The switch -----------------------------------------------------------------------------------


class One(CpuPlugin):
    """A device whose policy has no plan stream."""

    @hwcore.hookimpl
    def plan_stream_policy(self):
        return PlanStreamPolicy(enabled=False, reason="mask and positions came out half written")


class TestTheSwitch:
    def test_the_policy_decides_where_nobody_else_does(self, eager, monkeypatch):
        monkeypatch.delenv("HWCORE_PLAN_STREAM", raising=False)
        assert Steps(eager.hw).worker.plan_stream_active
        assert not Steps(hwcore.Backend(One())).worker.plan_stream_active

    @pytest.mark.parametrize("value", ["1", "0"])
    def test_the_variable_decides_over_the_policy(self, hw, monkeypatch, value):
        monkeypatch.setenv("HWCORE_PLAN_STREAM", value)
        assert Steps(hw).worker.plan_stream_active == (value == "1")

    @pytest.mark.parametrize("value", [True, False])
    def test_the_argument_decides_over_the_variable(self, hw, monkeypatch, value):
        monkeypatch.setenv("HWCORE_PLAN_STREAM", "0" if value else "1")
        assert Steps(hw, plan_stream=value).worker.plan_stream_active == value

    def test_true_where_the_policy_disables_it_is_an_error_with_its_reason(self):
        message = (
            r"plan_stream=True asks for .* backend `cpu` disables: mask and positions came out "
            r"half written; .* Leave plan_stream out\."
        )
        with pytest.raises(CapabilityError, match=message):
            Steps(hwcore.Backend(One()), plan_stream=True)

    def test_so_it_is_by_the_variable_which_is_named(self, monkeypatch):
        monkeypatch.setenv("HWCORE_PLAN_STREAM", "1")
        with pytest.raises(CapabilityError, match=r"HWCORE_PLAN_STREAM=1 asks .* Unset HWCORE"):
            Steps(hwcore.Backend(One()))
        assert not Steps(hwcore.Backend(One()), plan_stream=False).worker.plan_stream_active

    def test_even_where_streams_run_side_by_side(self, hw, monkeypatch):
        """PlanStream can be overruled there, for a trial; this worker is not one."""

        class Wrapper:
            @hwcore.hookimpl(wrapper=True)
            def plan_stream_policy(self):
                yield
                return PlanStreamPolicy(enabled=False, reason="it was measured to cost more")

        wrapper = Wrapper()
        hw.register(wrapper)
        try:
            with pytest.raises(CapabilityError, match="it was measured to cost more"):
                Steps(hw, plan_stream=True)
        finally:
            hw.unregister(wrapper)

    def test_another_value_is_refused(self, hw):
        with pytest.raises(ArgumentTypeError, match="plan_stream got 'on'"):
            Steps(hw, plan_stream="on")


def test_a_worker_says_how_it_works(hw):
    steps = Steps(hw, plan_stream=True)
    assert repr(steps.worker) == "<hwcore EagleVerifyWorker, plan stream on>"
    batch = steps.batch([1, 3], [4, 9])
    prepared = steps.worker.prepare(batch)
    assert repr(prepared) == f"<hwcore PreparedBatch 2 requests of {N} nodes, eagerly>"
    steps.worker.close()
    assert repr(steps.worker) == "<hwcore EagleVerifyWorker, closed>"
    assert steps.held([1, 3]) == [10, 30]  # what was prepared and never verified was put back
