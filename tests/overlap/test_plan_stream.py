"""PlanStream: a block beside the main stream, and what joining it gives."""

import pytest
import torch

import hwcore
from hwcore.cpu import CpuPlugin
from hwcore.errors import ArgumentTypeError, ArgumentValueError, CapabilityError
from hwcore.overlap import PlanStream, RelayPayload, recomputes
from hwcore.testing.sanitizer import Sanitizer
from hwcore.types import PlanStreamPolicy


@pytest.fixture(params=[True, False], ids=["plan stream", "one stream"])
def plan(request, hw):
    return PlanStream(backend=hw, enabled=request.param)


@pytest.fixture
def policy(hw):
    """Give the backend another plan-stream policy for a test."""
    wrappers = []

    def change(**fields):
        class Wrapper:
            @hwcore.hookimpl(wrapper=True)
            def plan_stream_policy(self):
                yield
                return PlanStreamPolicy(**fields)

        wrappers.append(Wrapper())
        hw.register(wrappers[-1])

    yield change
    for wrapper in wrappers:
        hw.unregister(wrapper)


def ones(hw):
    return torch.ones(4, device=hw.device())


# --- Order ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("in_any_order", "watched")
class TestOrder:
    def test_a_block_reads_what_the_main_stream_holds(self, hw, plan):
        drafted = ones(hw) * 3
        with plan.block(drafted) as outputs:
            outputs["doubled"] = drafted * 2
        assert plan.join().outputs["doubled"].tolist() == [6] * 4

    def test_many_steps_keep_their_order(self, hw, plan):
        total = torch.zeros(4, device=hw.device())
        for step in range(6):
            drafted = total + step
            with plan.block(drafted) as outputs:
                outputs["prepared"] = drafted + 1
            total = plan.join().outputs["prepared"]
        assert total.tolist() == [sum(range(6)) + 6] * 4

    def test_an_input_may_be_freed_once_it_was_passed(self, hw, plan):
        drafted = ones(hw) * 3
        with plan.block(drafted) as outputs:
            outputs["doubled"] = drafted * 2
        del drafted
        filler = torch.full((4,), -9.0, device=hw.device())  # may be given the same memory
        assert plan.join().outputs["doubled"].tolist() == [6] * 4
        assert filler.tolist() == [-9] * 4

    def test_outputs_live_until_the_main_stream_has_used_them(self, hw, plan):
        with plan.block() as outputs:
            outputs["made"] = torch.full((4,), 5.0, device=hw.device())
        used = plan.join().outputs.pop("made") + 1
        outputs.clear()
        with plan.block() as outputs:
            outputs["other"] = torch.full((4,), -9.0, device=hw.device())
        plan.join()
        assert used.tolist() == [6] * 4

    def test_inputs_and_outputs_may_be_nested(self, hw, plan):
        batch = {"tokens": [ones(hw)], "name": "verify"}
        with plan.block(batch, (ones(hw),)) as outputs:
            outputs["batch"] = {"tokens": [batch["tokens"][0] + 1], "name": batch["name"]}
        got = plan.join().outputs["batch"]
        assert got["tokens"][0].tolist() == [2] * 4
        assert got["name"] == "verify"

    def test_another_stream_may_join(self, hw, plan):
        with plan.block() as outputs:
            outputs["made"] = ones(hw)
        other = hw.create_stream()
        with hw.stream_context(other):
            assert plan.join().outputs["made"].tolist() == [1] * 4

    def test_tensors_in_dataclasses_are_kept_like_any_others(self, hw, plan):
        given = RelayPayload(torch.full((4,), 5, device=hw.device()))
        with plan.block({"payload": given}) as outputs:
            outputs["made"] = RelayPayload(given.next_token + 1)
        del given
        filler = torch.full((4,), -9, device=hw.device())  # may be given the same memory
        made = plan.join().outputs.pop("made")
        outputs.clear()
        used = made.next_token + 1
        del made
        with plan.block() as outputs:
            outputs["other"] = torch.full((4,), -9, device=hw.device())
        plan.join()
        assert used.tolist() == [7] * 4
        assert filler.tolist() == [-9] * 4

    def test_what_another_stream_joins_is_kept_for_it(self, hw, plan):
        with plan.block() as outputs:
            outputs["made"] = ones(hw) * 3
        other = hw.create_stream()
        with hw.stream_context(other):
            used = plan.join().outputs.pop("made") + 1
        outputs.clear()
        filler = torch.full((4,), -9.0, device=hw.device())
        hw.wait_stream(hw.current_stream(), other)
        assert used.tolist() == [4] * 4
        assert filler.tolist() == [-9] * 4


def ran_before(hw, forward_first):
    """Return what had run when a block's results were there: a late device, a mark or none."""
    from hwcore_sim import device

    plan, ran = PlanStream(backend=hw, enabled=True), []
    device.launch_host_function(lambda: ran.append("draft"))
    plan.mark() if forward_first else None
    device.launch_host_function(lambda: ran.append("forward"))
    with plan.block():
        hw.synchronize_stream(hw.current_stream())
    seen = list(ran)
    plan.join()
    hw.synchronize()
    return seen


@pytest.mark.usefixtures("late")
def test_a_block_waits_for_the_mark_and_not_for_what_came_after(hw):
    if hw.info.name != "sim":
        pytest.skip("only a simulated device tells what has run")
    assert ran_before(hw, forward_first=True) == ["draft"]
    assert ran_before(hw, forward_first=False) == ["draft", "forward"]


@pytest.mark.usefixtures("late")
def test_neither_block_nor_join_makes_the_host_wait(hw):
    if hw.info.name != "sim":
        pytest.skip("only a simulated device tells whether it was waited for")
    from hwcore_sim import device

    plan, waited, drafted = PlanStream(backend=hw, enabled=True), [], ones(hw)
    hw.synchronize()
    device.launch_host_function(lambda: waited.append(True))
    with plan.block(drafted) as outputs:
        outputs["doubled"] = drafted * 2
    plan.join()
    assert not waited
    hw.synchronize()


# --- What the API cannot stop ---------------------------------------------------------------------


def races(hw, program):
    with Sanitizer(hw, on_race="collect") as sanitizer:
        program(PlanStream(backend=hw, enabled=True))
        hw.synchronize()
    return [race.kind for race in sanitizer.races]


def test_a_tensor_written_after_the_mark_is_reported(hw):
    drafted = ones(hw)
    hw.synchronize()

    def program(plan):
        plan.mark()
        drafted.add_(1)
        with plan.block() as outputs:
            outputs["doubled"] = drafted * 2
        plan.join()

    assert races(hw, program) == ["read after write"]


def test_a_static_buffer_that_is_still_read_is_reported(hw):
    static = ones(hw)
    hw.synchronize()

    def program(plan):
        plan.mark()
        forward = static * 2
        with plan.block():
            static.fill_(7)
        plan.join()
        del forward

    assert races(hw, program) == ["write after read"]


def test_a_captured_tensor_that_is_freed_early_is_reported(hw):
    def program(plan):
        drafted = ones(hw) * 3
        with plan.block() as outputs:
            outputs["doubled"] = drafted * 2
        del drafted
        ones(hw)
        plan.join()

    assert races(hw, program) == ["freed while in use"]


def test_reading_before_the_join_is_reported(hw):
    def program(plan):
        with plan.block() as outputs:
            outputs["made"] = ones(hw)
        outputs["made"] * 2
        plan.join()

    assert "read after write" in races(hw, program)


# --- Recomputing ----------------------------------------------------------------------------------


def prepare(plan, hw):
    with plan.block() as outputs:
        outputs["mrope_positions"] = ones(hw)
        outputs["mask"] = ones(hw)


def test_what_the_backend_does_not_trust_is_computed_again_after_the_join(hw, policy):
    policy(recompute_after_join=frozenset({"mrope_positions"}))
    seen = []

    def mrope(outputs, context):
        seen.append((sorted(outputs), context, hw.current_stream()))
        return outputs["mask"] * context

    plan = PlanStream(backend=hw, enabled=True, recompute={"mrope_positions": mrope, "mask": mrope})
    prepare(plan, hw)
    prepared = plan.join(context=7)
    assert seen == [(["mask", "mrope_positions"], 7, hw.current_stream())]
    assert prepared.outputs["mrope_positions"].tolist() == [7] * 4
    assert prepared.outputs["mask"].tolist() == [1] * 4
    assert list(prepared.recomputed) == ["mrope_positions"]
    assert prepared.recomputed["mrope_positions"] is prepared.outputs["mrope_positions"]
    assert prepared.plan_stream_active


def test_on_one_stream_nothing_needs_computing_again(hw, policy):
    policy(recompute_after_join=frozenset({"mrope_positions"}))
    plan = PlanStream(backend=hw, enabled=False)
    prepare(plan, hw)
    prepared = plan.join()
    assert prepared.recomputed == {}
    assert prepared.outputs["mrope_positions"].tolist() == [1] * 4
    assert not prepared.plan_stream_active


def test_a_name_that_the_block_did_not_put_out_is_not_computed(hw, policy):
    policy(recompute_after_join=frozenset({"mrope_positions"}))
    plan = PlanStream(backend=hw, enabled=True)
    with plan.block() as outputs:
        outputs["mask"] = ones(hw)
    assert plan.join().recomputed == {}


def test_functions_may_be_registered_for_all(hw, policy, monkeypatch):
    monkeypatch.setattr("hwcore.overlap.plan_stream._registered", {})
    policy(recompute_after_join=frozenset({"mrope_positions"}))

    @recomputes("mrope_positions")
    def mrope(outputs, context):
        return outputs["mask"] + 1

    plan = PlanStream(backend=hw, enabled=True)
    prepare(plan, hw)
    assert plan.join().outputs["mrope_positions"].tolist() == [2] * 4
    assert recomputes("mrope_positions")(mrope) is mrope
    with pytest.raises(ArgumentValueError, match="`name` got 'mrope_positions'"):
        recomputes("mrope_positions")(lambda outputs, context: None)


def test_a_name_without_a_function_is_an_error_that_says_how(hw, policy, monkeypatch):
    monkeypatch.setattr("hwcore.overlap.plan_stream._registered", {})
    policy(recompute_after_join=frozenset({"mrope_positions"}))
    plan = PlanStream(backend=hw, enabled=True)
    prepare(plan, hw)
    message = (
        r"wants `mrope_positions` recomputed .*overlap.recomputes\('mrope_positions'\), or pass"
    )
    with pytest.raises(CapabilityError, match=message):
        plan.join()
    with plan.block() as outputs:
        outputs["mask"] = ones(hw)
    assert plan.join().outputs["mask"].tolist() == [1] * 4


# --- Errors ---------------------------------------------------------------------------------------


def test_an_exception_in_a_block_leaves_the_streams_as_they_were_and_is_raised_at_join(hw, plan):
    before = hw.current_stream()
    error = KeyError("in the block")
    with plan.block() as outputs:
        outputs["made"] = ones(hw)
        raise error
    assert hw.current_stream() == before
    with pytest.raises(KeyError) as caught:
        plan.join()
    assert caught.value is error
    with plan.block() as outputs:
        outputs["made"] = ones(hw)
    assert plan.join().outputs["made"].tolist() == [1] * 4


def test_an_interrupt_passes_through_at_once(hw, plan):
    before = hw.current_stream()
    with pytest.raises(KeyboardInterrupt), plan.block():
        raise KeyboardInterrupt
    assert hw.current_stream() == before
    with pytest.raises(ArgumentValueError, match="there is no block to join"):
        plan.join()
    with plan.block():
        pass
    plan.join()


def test_blocks_and_joins_take_turns(hw, plan):
    with pytest.raises(ArgumentValueError, match=r"PlanStream.join: there is no block to join;"):
        plan.join()
    with plan.block():
        pass
    with pytest.raises(ArgumentValueError, match=r"PlanStream.block: the last block was not"):
        plan.block().__enter__()
    plan.join()
    with pytest.raises(ArgumentValueError, match="there is no block"):
        plan.join()


def test_a_failed_block_that_nobody_joined_is_named_as_the_cause(plan):
    with plan.block():
        raise KeyError
    with pytest.raises(ArgumentValueError, match="was not joined") as caught:
        plan.block().__enter__()
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize("method", ["mark", "join", "block"])
def test_inside_a_block_there_is_nothing_to_mark_join_or_begin(plan, method):
    calls = {"mark": plan.mark, "join": plan.join, "block": lambda: plan.block().__enter__()}
    with plan.block(), pytest.raises(ArgumentValueError, match="open"):
        calls[method]()
    plan.join()


# --- The switch -----------------------------------------------------------------------------------


def test_the_policy_decides_where_nobody_else_does(hw, policy, monkeypatch):
    monkeypatch.delenv("HWCORE_PLAN_STREAM", raising=False)
    assert PlanStream(backend=hw).enabled
    policy(enabled=False, reason="it was measured to cost more")
    plan = PlanStream(backend=hw)
    assert not plan.enabled
    assert plan.reason == "it was measured to cost more"
    assert repr(plan) == "<hwcore PlanStream off: it was measured to cost more>"


@pytest.mark.parametrize(("value", "enabled"), [("1", True), ("off", False), (" ", True)])
def test_the_variable_decides_over_the_policy(hw, monkeypatch, value, enabled):
    monkeypatch.setenv("HWCORE_PLAN_STREAM", value)
    assert PlanStream(backend=hw).enabled == enabled


def test_the_argument_decides_over_the_variable(hw, monkeypatch):
    monkeypatch.setenv("HWCORE_PLAN_STREAM", "0")
    assert PlanStream(backend=hw, enabled=True).enabled
    monkeypatch.setenv("HWCORE_PLAN_STREAM", "1")
    plan = PlanStream(backend=hw, enabled=False)
    assert not plan.enabled
    assert plan.reason == "it was switched off"


def test_switch_and_functions_are_checked_at_once(hw):
    with pytest.raises(ArgumentTypeError, match="PlanStream: enabled got '0'"):
        PlanStream(backend=hw, enabled="0")
    with pytest.raises(ArgumentTypeError, match=r"recompute\['mask'\] got 7 \(int\)"):
        PlanStream(backend=hw, recompute={"mask": 7})


def test_a_value_without_meaning_is_refused(hw, monkeypatch):
    monkeypatch.setenv("HWCORE_PLAN_STREAM", "yse")
    with pytest.raises(ArgumentValueError, match="the variable HWCORE_PLAN_STREAM got 'yse'"):
        PlanStream(backend=hw)


def test_a_device_that_cannot_is_not_overruled():
    class Plugin(CpuPlugin):
        @hwcore.hookimpl
        def plan_stream_policy(self):
            return PlanStreamPolicy(enabled=False, reason="it has one queue")

    cannot = hwcore.Backend(Plugin())
    assert not PlanStream(backend=cannot).enabled
    message = (
        r"backend `cpu` cannot: it has one queue; .* Leave out enabled=True and unset HWCORE_P"
    )
    with pytest.raises(CapabilityError, match=message):
        PlanStream(backend=cannot, enabled=True)


def test_a_device_that_can_is_overruled(hw, policy):
    if "async_streams" not in hw.info.capabilities:
        pytest.skip("this device has no streams that run side by side")
    policy(enabled=False, reason="it was measured to cost more")
    plan = PlanStream(backend=hw, enabled=True)
    assert plan.enabled
    assert repr(plan) == "<hwcore PlanStream on>"
