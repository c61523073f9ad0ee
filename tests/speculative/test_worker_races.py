"""The races of EAGLE's plan stream upstream: written on the worker they are none, or reported.

Each came up on one device and was mended there (SGLang pull requests 23423, 22113, 28034, 26380).
"""

import pytest
import torch

from hwcore.testing.sanitizer import Sanitizer

from ._steps import CONTEXT, N, Naming, Steps


@pytest.fixture(params=[False, True], ids=["eager", "graphs"])
def steps(request, hw):
    return Steps(hw, plan_stream=True, graphs=request.param)


@pytest.fixture(params=[False, True], ids=["eager", "graphs"])
def graphs(request):
    return request.param


def races(hw, program, **options):
    """Run a program on a batch of rows 1 and 3; return what kinds of races were found."""
    with Sanitizer(hw, on_race="collect") as sanitizer:
        steps = Steps(hw, plan_stream=True, **options)
        batch = steps.batch([1, 3], [4, 9])
        hw.synchronize()
        program(steps, batch)
        hw.synchronize()
    return {race.kind for race in sanitizer.races}


# --- Right as it is written -----------------------------------------------------------------------


@pytest.mark.usefixtures("in_any_order", "watched")
class TestRight:
    def test_drafts_still_being_made_when_they_are_marked(self, steps):
        """22113, 28034: tokens, positions and mask were read half written, or not at all."""
        batch = steps.batch([1, 3], [4, 9])  # all of it queued on the main stream
        steps.worker.mark(batch)
        steps.worker.verify(steps.worker.prepare(batch))
        assert steps.target.tokens[:2, :N].tolist() == [[10, 11, 15], [30, 31, 35]]
        assert steps.target.positions[: 2 * N].tolist() == [4, 5, 6, 9, 10, 11]
        assert steps.held([1, 3]) == [12, 32]

    def test_drafts_let_go_of_once_they_are_prepared(self, steps):
        batch = steps.batch([1, 3], [4, 9], relayed=None)
        prepared = steps.worker.prepare(batch)
        del batch
        steps.worker.verify(prepared)
        del prepared
        torch.full((2, N), -9, device=steps.device)  # may be given the same memory
        assert steps.target.tokens[:2, :N].tolist() == [[10, 11, 15], [30, 31, 35]]
        assert steps.held([1, 3]) == [12, 32]

    @pytest.mark.parametrize("when", ["before verify", "after verify"])
    def test_a_row_given_away_while_the_forward_reads_it(self, hw, steps, when):
        """26380: the scheduler, on its own stream, writes the next owner's slots."""
        schedule = hw.create_stream()

        def give_away():
            steps.worker.vacate([3])
            with hw.stream_context(schedule), steps.worker.fence.writing():
                steps.table[3].fill_(7)

        prepared = steps.worker.prepare(steps.batch([1, 3], [4, 9]))
        if when == "before verify":
            give_away()
        steps.worker.verify(prepared)
        if when == "after verify":
            give_away()
        first = 3 * CONTEXT + 9
        expected = [0] * N if when == "before verify" else [first, first + 1, first + 2]
        assert steps.target.locs[1, :N].tolist() == expected
        own = list(range(3 * CONTEXT, 4 * CONTEXT))
        assert steps.target.attended[1].tolist() == ([0] * CONTEXT if expected == [0] * N else own)
        hw.synchronize_stream(schedule)
        assert steps.table[3].tolist() == [7] * CONTEXT
        assert steps.held([1]) == [12]

    def test_slots_written_for_a_batch_that_is_marked_already(self, hw, steps):
        schedule = hw.create_stream()
        batch = steps.batch([1, 3], [4, 9])
        steps.worker.mark(batch)
        with hw.stream_context(schedule), steps.worker.fence.writing():
            steps.table[3].add_(1)
        steps.worker.verify(steps.worker.prepare(batch))
        first = 3 * CONTEXT + 10
        assert steps.target.locs[1, :N].tolist() == [first, first + 1, first + 2]
        assert steps.held([1, 3]) == [12, 32]

    def test_deltas_given_away_while_they_are_computed_with_again(self, hw):
        with Naming(hw):
            steps = Steps(hw, plan_stream=True, mrope=True)
        schedule, deltas = hw.create_stream(), steps.worker._planner._deltas
        steps.worker.run(steps.batch([1, 3], [4, 9]))
        with hw.stream_context(schedule), steps.worker.fence.writing():
            deltas.fill_(1000)
        seen = steps.target.mrope_positions[0, : 2 * N]
        assert seen.tolist() == [4, 5, 6, 9, 10, 11]
        hw.synchronize_stream(schedule)
        assert steps.held([1, 3]) == [12, 32]

    def test_the_next_step_prepared_while_the_last_one_runs(self, steps):
        steps.prefill([1, 3], [4, 9], [10, 30])
        for n in range(3):
            batch = steps.batch([1, 3], [4 + 2 * n, 9 + 2 * n], prefilled=False)
            steps.worker.verify(steps.worker.prepare(batch))
        assert steps.held([1, 3]) == [16, 36]


# --- What cannot be stopped is reported -----------------------------------------------------------


READ = [("draft_tokens", True), ("seq_lens", False), ("seq_lens", True)]


class TestReported:
    def test_nothing_of_a_program_without_a_race(self, hw, graphs):
        assert races(hw, lambda steps, batch: steps.worker.run(batch), graphs=graphs) == set()

    @pytest.mark.parametrize(("name", "graphs"), READ)
    def test_drafts_written_after_the_mark(self, hw, name, graphs):
        def program(steps, batch):
            steps.worker.mark(batch)
            getattr(batch, name).add_(0)
            steps.worker.run(batch)

        assert "read after write" in races(hw, program, graphs=graphs)

    @pytest.mark.parametrize(("name", "graphs"), READ)
    def test_drafts_written_while_they_are_prepared(self, hw, name, graphs):
        def program(steps, batch):
            prepared = steps.worker.prepare(batch)
            getattr(batch, name).add_(0)
            steps.worker.verify(prepared)

        assert "write after read" in races(hw, program, graphs=graphs)

    def test_a_row_given_away_without_the_fence(self, hw, graphs):
        def program(steps, batch):
            schedule = hw.create_stream()
            prepared = steps.worker.prepare(batch)
            with hw.stream_context(schedule):
                steps.table[3].fill_(7)
            steps.worker.verify(prepared)

        both = {"write after read", "read after write"}  # the plan stream's, the forward's
        assert races(hw, program, graphs=graphs) == both

    def test_deltas_written_without_the_fence(self, hw):
        def program(steps, batch):
            prepared = steps.worker.prepare(batch)
            steps.worker._planner._deltas.fill_(5)
            steps.worker.verify(prepared)

        assert races(hw, program, mrope=True) == {"write after read"}

    def test_a_result_read_on_another_stream_at_once(self, hw, graphs):
        def program(steps, batch):
            step = steps.worker.run(batch)
            with hw.stream_context(hw.create_stream()):
                step.commit.accept_tokens + 1

        assert "read after write" in races(hw, program, graphs=graphs)
