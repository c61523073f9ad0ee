"""mrope positions, computed again after the join exactly when four things hold together.

The backend's policy names them, the model is mrope, the batch is not idle, and it has positions.
What a request's positions differ by changes here between ``prepare`` and ``verify``: so the forward
sees which of the two computed them.
"""

import pytest
import torch

import hwcore
from hwcore.overlap import PlanStream
from hwcore.speculative import MropeContext, compute_spec_mrope_positions

from ._steps import N, Naming, Steps

BEFORE, AFTER = [1000, 100, 200, 300, 400, 500], [9000, 900, 800, 700, 600, 500]


@pytest.fixture(params=[False, True], ids=["trusted", "named by the policy"])
def named(request, hw):
    """Whether the backend wants mrope positions computed again."""
    if not request.param:
        yield False
        return
    with Naming(hw):
        yield True


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


def run(steps, batch):
    """Run a batch while the deltas change; the engine shares them by the worker's fence."""
    prepared = steps.worker.prepare(batch)
    with steps.worker.fence.writing():
        steps.deltas.copy_(steps.on(AFTER))
    return steps.worker.verify(prepared)


def mrope_steps(hw, plan_stream=True, mrope=True, **options):
    deltas = torch.tensor(BEFORE, device=hw.device())
    steps = Steps(hw, mrope=mrope, mrope_deltas=deltas, plan_stream=plan_stream, **options)
    steps.deltas = deltas
    return steps


def expected(deltas):
    """Positions 4.. of row 1 and 9.. of row 3, moved."""
    line = [4 + i + deltas[1] for i in range(N)] + [9 + i + deltas[3] for i in range(N)]
    return [line] * 3


@pytest.mark.usefixtures("in_any_order", "watched")
class TestFourConditions:
    @pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
    def test_the_policy_names_them(self, hw, named, graphs):
        steps = mrope_steps(hw, graphs=graphs)
        assert run(steps, steps.batch([1, 3], [4, 9])).replayed == graphs
        seen = steps.target.mrope_positions[:, : 2 * N].tolist()
        assert seen == expected(AFTER if named else BEFORE)
        assert steps.held([1, 3]) == [12, 32]
        steps.close()

    @pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
    def test_on_one_stream_there_is_no_join_to_distrust(self, hw, named, graphs):
        steps = mrope_steps(hw, plan_stream=False, graphs=graphs)
        run(steps, steps.batch([1, 3], [4, 9]))
        assert steps.target.mrope_positions[:, : 2 * N].tolist() == expected(BEFORE)
        steps.held([1, 3])
        steps.close()

    def test_the_model_is_mrope(self, hw, named):
        """A text model that shares the pool uses its own positions where it is given no others."""
        seen = []

        def text(draft_tokens, positions, cache_locs, **inputs):
            seen.append(inputs.get("mrope_positions", positions))
            return draft_tokens + 1

        steps = Steps(hw, plan_stream=True)
        steps.deltas = torch.tensor(BEFORE, device=hw.device())
        steps.worker._forward, steps.worker._names = text, None
        run(steps, steps.batch([1, 3], [4, 9]))
        assert seen[0].tolist() == [4, 5, 6, 9, 10, 11]
        steps.held([1, 3])
        steps.close()

    def test_a_forward_that_takes_none_has_none(self, hw, named, told):
        steps = mrope_steps(hw, mrope=False, graphs=True)
        run(steps, steps.batch([1, 3], [4, 9]))
        assert steps.target.positions[: 2 * N].tolist() == [4, 5, 6, 9, 10, 11]
        assert told[0].recomputed == {}
        steps.held([1, 3])
        steps.close()

    @pytest.mark.parametrize("rows", [0, 2])
    def test_the_batch_is_not_idle(self, hw, named, rows):
        """The forward of nobody's rows sees zeros, not what row 0's delta makes of them."""
        steps = mrope_steps(hw)
        run(steps, steps.idle(rows))
        assert steps.target.mrope_positions[:, : rows * N].tolist() == [[0] * rows * N] * 3
        steps.close()

    def test_nor_is_the_backend_told_of_an_idle_batch(self, hw, named, told):
        steps = mrope_steps(hw, graphs=True)
        run(steps, steps.idle(2))
        assert (told[0].seq_lens, told[0].recomputed) == ((), {})
        assert steps.target.mrope_positions[:, : 4 * N].tolist() == [[0] * 4 * N] * 3
        steps.close()

    def test_the_batch_has_positions(self, hw, named):
        """A forward that makes its own where it is given none is given none."""
        seen, given = [], []

        def forward(draft_tokens, mrope_positions=None, **inputs):
            given.append("positions" in inputs)
            own = torch.zeros(3, draft_tokens.numel(), dtype=torch.int64, device=hw.device())
            seen.append(own if mrope_positions is None else mrope_positions)
            return draft_tokens + 1

        steps = mrope_steps(hw)
        steps.worker._forward, steps.worker._names = forward, None
        run(steps, steps.batch([1, 3], [4, 9], has_positions=False))
        assert seen[0].tolist() == [[0] * 2 * N] * 3
        assert given == [False]
        steps.held([1, 3])
        steps.close()


@pytest.mark.usefixtures("late")
def test_a_plan_stream_that_does_not_wait_gives_wrong_positions_but_where_they_are_named(
    hw, named, monkeypatch
):
    """SGLang PR 23423 on the device that it is about: the plan stream sees the deltas too early."""
    if hw.info.name != "sim":
        pytest.skip("only a simulated device runs streams in an order of one's choice")
    from hwcore_sim import device

    steps = mrope_steps(hw)
    batch = steps.batch([1, 3], [4, 9])
    hw.synchronize()
    side, wait = steps.worker._planner.plan._stream, hw.wait_event
    with device.drain_policy("eager", side), monkeypatch.context() as defect:
        defect.setattr(
            hw, "wait_event", lambda event, stream=None: stream == side or wait(event, stream)
        )
        steps.deltas.copy_(steps.on(AFTER))  # queued on the main stream, before the mark
        prepared = steps.worker.prepare(batch)
    steps.worker.verify(prepared)
    seen = steps.target.mrope_positions[:, : 2 * N].tolist()
    assert seen == expected(AFTER if named else BEFORE)
    steps.held([1, 3])
    steps.close()


def test_the_backend_is_told_what_was_computed_again(hw, told):
    with Naming(hw):
        steps = mrope_steps(hw, graphs=True)
        run(steps, steps.batch([1, 3], [4, 9]))
        run(steps, steps.batch([2], [5]))
    for batch, size in zip(told, (2, 1), strict=True):
        assert batch.plan_stream_active
        assert list(batch.recomputed) == ["mrope_positions"]
        assert batch.recomputed["mrope_positions"].shape == (3, 4 * N)  # padded
        assert len(batch.seq_lens) == size
    steps.held([1, 2, 3])
    steps.close()


@pytest.mark.usefixtures("in_any_order", "watched")
def test_any_plan_stream_computes_them_again_by_the_registered_function(hw):
    with Naming(hw):
        plan = PlanStream(backend=hw, enabled=True)
    deltas = torch.tensor(BEFORE, device=hw.device())
    rows = torch.tensor([1, 3], device=hw.device())
    with plan.block(rows) as outputs:
        outputs["positions"] = torch.tensor([4, 9], device=hw.device())
        outputs["mrope_positions"] = compute_spec_mrope_positions(
            deltas, rows, outputs["positions"], backend=hw
        )
    hw.wait_stream(hw.current_stream(), plan._stream)
    deltas.copy_(torch.tensor(AFTER, device=hw.device()))
    joined = plan.join(MropeContext(deltas, rows, hw))
    assert joined.outputs["mrope_positions"].tolist() == [[904, 709]] * 3
    assert list(joined.recomputed) == ["mrope_positions"]
