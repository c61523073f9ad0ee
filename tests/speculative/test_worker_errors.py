"""What the worker refuses, and that nothing is lost by it: the same rows can be resolved again."""

import dataclasses
import math

import pytest
import torch

from hwcore.errors import ArgumentTypeError, ArgumentValueError, ClosedError, HwcoreError
from hwcore.graphs import TOKENS, GraphRunner, Slot
from hwcore.overlap import FutureMap, RelayPayload, RelaySpec
from hwcore.speculative import EagleVerifyWorker, SamplingParams, TreeMaskMode, verify_slots

from ._steps import CONTEXT, N, Steps

WAYS = {
    "one stream": {"plan_stream": False},
    "plan stream": {"plan_stream": True},
    "graphs": {"plan_stream": True, "graphs": True},
}


@pytest.fixture(params=WAYS.values(), ids=WAYS.keys())
def steps(request, hw):
    made = Steps(hw, **request.param)
    yield made
    made.close()


def still_works(steps):
    """Whatever was refused: the rows hold what they held, and the next step is right."""
    again = steps.batch([1, 3], [4, 9], prefilled=False)
    step = steps.worker.run(again)
    assert step.commit.accept_tokens.tolist() == [[11, 12, -1], [31, 32, -1]]
    assert step.replayed == (steps.runner is not None)
    assert steps.lens([1, 3]) == [6, 11]
    assert steps.held([1, 3]) == [12, 32]
    if steps.runner is not None:
        assert steps.runner.refusals == {}


def other(steps, kind):
    """Return a field of a batch, made wrong."""
    wrong = {
        "draft_tokens of a dtype": ("draft_tokens", lambda b: b.draft_tokens.to(torch.int32)),
        "parents of a shape": ("parents", lambda b: b.parents[:, :2]),
        "seq_lens of a dtype": ("seq_lens", lambda b: b.seq_lens.to(torch.int16)),
        "host_seq_lens a list": ("host_seq_lens", lambda b: [4, 9]),
        "host_seq_lens too few": ("host_seq_lens", lambda b: (4,)),
        "host_seq_lens beyond the row": ("host_seq_lens", lambda b: (4, CONTEXT - N + 1)),
        "cache_locs of a shape": ("cache_locs", lambda b: b.draft_tokens[:1]),
        "seeds of a dtype": ("seeds", lambda b: b.seq_lens.to(torch.int32)),
        "sampling no params": ("sampling", lambda b: {"temperature": 1}),
        "sampling without seeds": (
            "sampling",
            lambda b: SamplingParams.of([1.0, 0.0], device=steps.device),
        ),
        "sampling of another size": (
            "sampling",
            lambda b: SamplingParams.of([0.0], device=steps.device),
        ),
        "extra no tensors": ("extra", lambda b: {"page_table": [1, 2]}),
        "extra of a taken name": ("extra", lambda b: {"rows": b.rows}),
    }
    return wrong[kind]


REFUSED = {
    "draft_tokens of a dtype": (ArgumentTypeError, r"batch\.draft_tokens\.dtype got torch\.int32"),
    "parents of a shape": (ArgumentValueError, r"batch\.parents\.shape got \[2, 2\]"),
    "seq_lens of a dtype": (ArgumentTypeError, r"batch\.seq_lens\.dtype got torch\.int16"),
    "host_seq_lens a list": (ArgumentTypeError, r"batch\.host_seq_lens got \[4, 9\] \(list\)"),
    "host_seq_lens too few": (ArgumentTypeError, r"host_seq_lens got \(4,\).*a tuple of 2 ints"),
    "host_seq_lens beyond the row": (
        ArgumentValueError,
        r"max\(batch\.host_seq_lens\) got 22 .*room for 3 nodes within the 24 places of a row",
    ),
    "cache_locs of a shape": (ArgumentValueError, r"batch\.cache_locs\.shape got \[1, 3\]"),
    "seeds of a dtype": (ArgumentTypeError, r"batch\.seeds\.dtype got torch\.int32"),
    "sampling no params": (ArgumentTypeError, r"batch\.sampling got .*a SamplingParams"),
    "sampling without seeds": (ArgumentValueError, r"batch\.seeds got None .*some are sampled"),
    "sampling of another size": (ArgumentValueError, r"params\.temperatures\.shape got \[1\]"),
    "extra no tensors": (ArgumentTypeError, r"batch\.extra got .*Pass a dict of tensors"),
    "extra of a taken name": (ArgumentValueError, r"batch\.extra got 'rows' .*other names than"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_wrong_batch_is_named_and_loses_nothing(steps, kind):
    batch = steps.batch([1, 3], [4, 9])
    field, make = other(steps, kind)
    wrong = dataclasses.replace(batch, **{field: make(batch)})
    error, message = REFUSED[kind]
    with pytest.raises(error, match=rf"^EagleVerifyWorker.*: .*{message}") as caught:
        steps.worker.run(wrong)
    assert not getattr(caught.value, "__notes__", [])
    still_works(steps)


def test_what_fails_on_the_plan_stream_is_raised_by_prepare(steps):
    late = (4, CONTEXT - N + 1)
    wrong = dataclasses.replace(steps.batch([1, 3], [4, 9]), host_seq_lens=late)
    with pytest.raises(ArgumentValueError, match="room for 3 nodes"):
        steps.worker.prepare(wrong)
    still_works(steps)


@pytest.mark.parametrize("debug", ["0", "1"])
@pytest.mark.parametrize(
    ("parents", "message"),
    [
        ([[-1, 2, 1]] * 2, r"parents\[0, 1\] got 2 .*a node before its child"),
        ([[-1, 0, 7]] * 2, r"parents\[0, 2\] got 7 .*-1 or a node index below 3"),
    ],
    ids=["cyclic", "of another request"],
)
def test_links_that_are_no_tree_are_found_where_that_costs_nothing(
    hw, monkeypatch, debug, parents, message
):
    if debug == "0" and hw.info.device_type != "cpu":
        pytest.skip("the contents of device tensors are looked at while debugging")
    monkeypatch.setenv("HWCORE_DEBUG", debug)
    steps = Steps(hw)
    wrong = dataclasses.replace(steps.batch([1, 3], [4, 9]), parents=steps.on(parents))
    with pytest.raises(ArgumentValueError, match=rf"^build_tree: {message}"):
        steps.worker.run(wrong)
    still_works(steps)
    steps.close()


def test_a_slot_out_of_the_pool_is_found_before_anything_is_written(hw, monkeypatch):
    monkeypatch.setenv("HWCORE_DEBUG", "1")
    steps = Steps(hw, num_slots=CONTEXT)
    batch = steps.batch([1, 3], [4, 9])
    message = rf"cache_locs\[0, 0\] got {CONTEXT + 4} .*a slot in \[0, {CONTEXT}\)"
    with pytest.raises(ArgumentValueError, match=message):
        steps.worker.run(batch)
    assert steps.target.calls == 0
    assert steps.held([1, 3]) == [10, 30]
    steps.close()


def test_a_row_twice_is_found_where_the_host_sees_it_and_cannot_be_put_back(hw):
    if hw.info.device_type != "cpu":
        pytest.skip("elsewhere the map finds it, and says so later")
    steps = Steps(hw)
    steps.prefill([1], [4], [10])
    twice = steps.batch([1, 1], [4, 4], prefilled=False)
    with pytest.raises(ArgumentValueError, match="each row once") as caught:
        steps.worker.run(twice)
    (note,) = caught.value.__notes__
    assert note.startswith("What was resolved for the batch could not be put back: FutureMap.stash")
    steps.held([1])
    with pytest.raises(HwcoreError, match=r"row 1 .* was read twice"):
        steps.relay.check()
    steps.worker.close()


class Broken(Exception):
    pass


def fail(*args, **kwargs):
    raise Broken


class TestWhatOthersRaise:
    def test_the_forward(self, hw):
        steps = Steps(hw)
        forward, steps.worker._forward = steps.worker._forward, fail
        with pytest.raises(Broken):
            steps.worker.run(steps.batch([1, 3], [4, 9]))
        steps.worker._forward = forward
        still_works(steps)
        steps.close()

    @pytest.mark.parametrize("plan_stream", [True, False])
    def test_a_replay(self, hw, monkeypatch, plan_stream):
        steps = Steps(hw, graphs=True, plan_stream=plan_stream)
        with monkeypatch.context() as broken:
            broken.setattr(hw, "graph_replay", fail)
            with pytest.raises(Broken):
                steps.worker.run(steps.batch([1, 3], [4, 9]))
        still_works(steps)
        steps.close()

    def test_a_graphs_inputs_that_do_not_fit(self, hw):
        steps = Steps(hw, graphs=True)
        forward = steps.target.forward

        def paged(draft_tokens, rows, positions, cache_locs, page_table):
            return forward(draft_tokens, rows, positions, cache_locs)

        slots = verify_slots(paged, extra={"page_table": Slot(torch.int64, (TOKENS,))})
        with GraphRunner(paged, slots, [(4, N)], backend=hw) as runner:
            runner.capture()
            worker = EagleVerifyWorker(
                paged, steps.relay, runner=runner, backend=hw, req_to_token=steps.table
            )
            batch = steps.batch([1, 3], [4, 9])
            drifted = dataclasses.replace(batch, extra={"page_table": batch.rows})
            with pytest.raises(ArgumentValueError, match="input `page_table` got"):
                worker.run(drifted)
            again = steps.batch([1, 3], [4, 9], prefilled=False)
            table = {"page_table": again.draft_tokens.view(-1)}
            assert worker.run(dataclasses.replace(again, extra=table)).replayed
            assert steps.held([1, 3]) == [12, 32]
            worker.close()
        steps.close()

    @pytest.mark.parametrize("part", ["move_kv", "processor"])
    def test_moves_and_processors(self, hw, part):
        steps = Steps(hw, vocab=64, **{part: fail})
        with pytest.raises(Broken):
            steps.worker.run(steps.batch([1, 3], [4, 9]))
        assert steps.lens([1, 3]) == [4, 9]
        assert steps.held([1, 3]) == [10, 30]
        steps.close()

    def test_the_draft_after_which_the_rows_are_empty(self, hw):
        steps = Steps(hw, draft_extend=fail)
        with pytest.raises(Broken):
            steps.worker.run(steps.batch([1, 3], [4, 9]))
        steps.worker.vacate([1, 3])
        steps.prefill([1, 3], [4, 9], [10, 30])
        assert steps.held([1, 3]) == [10, 30]
        steps.close()

    @pytest.mark.parametrize(
        ("returned", "error", "message"),
        [
            (None, ArgumentTypeError, r"the logits that forward returned got None"),
            (
                torch.zeros(2, 2, 5),
                ArgumentValueError,
                r"got \[2, 2, 5\] .*\[2, 3, …\] or \[6, …\]",
            ),
            (
                (torch.zeros(6, 40), torch.zeros(5, 4)),
                ArgumentValueError,
                r"the hidden states that forward returned got \[5, 4\]",
            ),
        ],
    )
    def test_what_a_forward_returned_is_looked_at(self, hw, returned, error, message):
        steps = Steps(hw)
        forward, steps.worker._forward = steps.worker._forward, lambda **inputs: returned
        with pytest.raises(error, match=message):
            steps.worker.run(steps.batch([1, 3], [4, 9]))
        steps.worker._forward = forward
        still_works(steps)
        steps.close()


def test_what_left_meanwhile_is_not_put_back(steps):
    """Its row belongs to another by then."""
    forward, steps.worker._forward = steps.worker._forward, fail
    prepared = steps.worker.prepare(steps.batch([1, 3], [4, 9]))
    steps.worker.vacate([3])
    steps.prefill([3], [2], [77])
    if steps.runner is None:
        with pytest.raises(Broken):
            steps.worker.verify(prepared)
    else:
        steps.worker.abandon(prepared)
    assert steps.held([1, 3]) == [10, 77]
    steps.worker._forward = forward


def test_a_batch_that_is_abandoned_leaves_things_as_they_were(steps):
    steps.worker.abandon(steps.worker.prepare(steps.batch([1, 3], [4, 9])))
    still_works(steps)


def test_without_what_was_resolved_nothing_can_be_put_back(hw):
    steps = Steps(hw)
    steps.worker.abandon(steps.worker.prepare(steps.batch([1, 3], [4, 9], relayed=None)))
    steps.prefill([1, 3], [4, 9], [10, 30])
    still_works(steps)
    steps.close()


# --- Calls out of turn ----------------------------------------------------------------------------


class TestTurns:
    def test_one_batch_at_a_time(self, steps):
        batch = steps.batch([1, 3], [4, 9])
        prepared = steps.worker.prepare(batch)
        for call in (steps.worker.mark, steps.worker.prepare, steps.worker.run):
            with pytest.raises(ArgumentValueError, match=r"while another is prepared; .*abandon"):
                call(batch)
        steps.worker.verify(prepared)  # as if nobody had tried
        assert steps.held([1, 3]) == [12, 32]

    def test_what_was_marked_is_prepared(self, steps):
        batch = steps.batch([1], [4])
        steps.worker.mark(batch)
        with pytest.raises(ArgumentValueError, match="another batch than mark"):
            steps.worker.prepare(dataclasses.replace(batch))
        steps.worker.run(batch)
        assert steps.held([1]) == [12]

    def test_a_mark_may_be_taken_back_by_another(self, steps):
        steps.worker.mark(steps.batch([1], [4]))
        other = steps.batch([3], [9])
        steps.worker.mark(other)
        steps.worker.run(other)
        assert steps.held([3]) == [32]

    def test_a_batch_is_verified_once(self, steps):
        prepared = steps.worker.prepare(steps.batch([1, 3], [4, 9]))
        steps.worker.verify(prepared)
        for call in (steps.worker.verify, steps.worker.abandon):
            with pytest.raises(ArgumentValueError, match=r"prepared got .*not verified yet"):
                call(prepared)
            with pytest.raises(ArgumentTypeError, match=r"Pass what prepare\(\) returned"):
                call(None)
        assert steps.held([1, 3]) == [12, 32]

    def test_closed_is_closed(self, hw):
        steps = Steps(hw)
        batch = steps.batch([1, 3], [4, 9])
        steps.close()
        steps.worker.close()
        worker = steps.worker
        for call in (worker.mark, worker.prepare, worker.run, worker.can_run, worker.verify):
            with pytest.raises(ClosedError, match=r"^EagleVerifyWorker\.\w+: .* a closed worker"):
                call(batch)
        with pytest.raises(ClosedError):
            worker.vacate([1])

    def test_a_worker_is_a_context(self, hw):
        steps = Steps(hw)
        with steps.worker as worker:
            pass
        with pytest.raises(ClosedError):
            worker.vacate([])

    @pytest.mark.parametrize("rows", [[0], [6], [-1], [True], [1.0]])
    def test_only_rows_of_the_pool_leave(self, steps, rows):
        with pytest.raises(ArgumentValueError, match=r"vacate: rows got .*ints in \[1, 6\)"):
            steps.worker.vacate(rows)

    def test_rows_leave_once_and_are_a_list(self, steps):
        with pytest.raises(ArgumentValueError, match=r"vacate: rows got \[1, 1\] .*none twice"):
            steps.worker.vacate([1, 1])
        with pytest.raises(ArgumentTypeError, match=r"vacate: rows got None .*a list of ints"):
            steps.worker.vacate(None)


# --- Made wrong -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"page_size": 0}, ArgumentValueError, "page_size got 0"),
        ({"req_to_token": [[1]]}, ArgumentTypeError, "req_to_token got"),
        ({"relay": None}, ArgumentTypeError, "relay got None"),
        ({"forward": 7}, ArgumentTypeError, "`forward` got 7"),
        ({"threshold_single": 5.0}, ArgumentValueError, r"threshold_single got 5\.0"),
        ({"threshold_acc": math.nan}, ArgumentValueError, "threshold_acc got nan"),
        ({"processor": 3}, ArgumentTypeError, "processor got 3"),
        ({"tree_mask_mode": "x"}, ArgumentTypeError, "tree_mask_mode got 'x'"),
        ({"spec_steps": -1}, ArgumentValueError, "spec_steps got -1"),
        ({"num_slots": -4}, ArgumentValueError, "num_slots got -4"),
        ({"move_kv": 3}, ArgumentTypeError, "move_kv got 3"),
        ({"draft_extend": 3}, ArgumentTypeError, "draft_extend got 3"),
        ({"runner": 3}, ArgumentTypeError, "runner got 3"),
        ({"fence": 3}, ArgumentTypeError, "fence got 3"),
        ({"group": 3}, ArgumentTypeError, "group got 3"),
        ({"backend": "cpu"}, ArgumentTypeError, "backend got 'cpu'"),
    ],
)
def test_a_worker_is_made_of_what_it_says(hw, options, error, message):
    relay = FutureMap(RelaySpec(pool_size=6), backend=hw)
    made = {"forward": lambda draft_tokens: draft_tokens, "relay": relay, **options}
    with pytest.raises(error, match=rf"^EagleVerifyWorker: {message}"):
        EagleVerifyWorker(made.pop("forward"), made.pop("relay"), **{"backend": hw, **made})


def test_tables_and_deltas_are_of_their_form(hw):
    table = torch.zeros(8, 6, dtype=torch.int64, device=hw.device())
    with pytest.raises(ArgumentValueError, match=r"req_to_token\.stride\(\) got .*a contiguous"):
        Steps(hw).worker.__class__(
            lambda draft_tokens: draft_tokens,
            FutureMap(RelaySpec(pool_size=6), backend=hw),
            req_to_token=table.t(),
            backend=hw,
        )
    with pytest.raises(ArgumentTypeError, match=r"mrope_deltas\.dim\(\) got 2"):
        Steps(hw, mrope=True, mrope_deltas=table)


@pytest.mark.parametrize("sizes", [{"topk": 2}, {"draft_probs": (2, 3)}])
def test_a_map_of_drafts_wants_a_draft_model(hw, sizes):
    (name,) = sizes
    with pytest.raises(ArgumentValueError, match=rf"draft_extend got None .*relay holds {name}"):
        Steps(hw, relay=RelaySpec(pool_size=6, **sizes))


def test_a_map_of_hidden_states_wants_some(hw):
    steps = Steps(hw, relay=RelaySpec(pool_size=6, hidden_size=4))
    steps.worker._forward = lambda draft_tokens, **inputs: draft_tokens + 1
    batch = batch_with_hidden(steps)
    with pytest.raises(ArgumentValueError, match=r"got None .*hidden states, for relay holds"):
        steps.worker.run(batch)


def batch_with_hidden(steps):
    hidden = torch.zeros(1, 4, dtype=torch.bfloat16, device=steps.device)
    steps.relay.publish(steps.on([1]), steps.on([4]))
    steps.relay.stash(steps.on([1]), RelayPayload(steps.on([10]), hidden_states=hidden))
    return steps.batch([1], [4], prefilled=False)


def test_moves_want_slots(hw):
    relay = FutureMap(RelaySpec(pool_size=6), backend=hw, debug=True)
    steps = Steps(hw)
    worker = EagleVerifyWorker(
        lambda draft_tokens: draft_tokens + 1, relay, move_kv=fail, backend=hw
    )
    with pytest.raises(ArgumentValueError, match=r"batch\.cache_locs got None .*req_to_token"):
        worker.run(steps.batch([1], [4], relayed=None))


def test_a_mask_of_no_static_shape_has_no_slot():
    def forward(draft_tokens, tree_mask):
        pass

    full = {"tree_mask_mode": TreeMaskMode.FULL}
    with pytest.raises(ArgumentValueError, match=r"tree_mask_mode got .*QLEN_ONLY or BITPACKED"):
        verify_slots(forward, **full)
    assert list(verify_slots(lambda draft_tokens: 1, **full)) == ["draft_tokens"]
    with pytest.raises(ArgumentTypeError, match=r"num_draft_tokens got None"):
        verify_slots(forward, tree_mask_mode=TreeMaskMode.BITPACKED)
    with pytest.raises(ArgumentTypeError, match=r"`forward` got None"):
        verify_slots(None)
