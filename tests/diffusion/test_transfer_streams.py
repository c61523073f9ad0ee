"""Tensors of a device on their way: right in any order of work, and no wait of it is one too many.

Every program is right, and silent under the sanitizer. With one wait taken out of the manager the
value is wrong where work runs late, and the sanitizer says which wait it was.
"""

import contextlib

import pytest
import torch

from hwcore.diffusion import DiffusionTransferManager
from hwcore.errors import PeerError
from hwcore.testing.loop_engine import LoopEngine
from hwcore.testing.sanitizer import Sanitizer

from ._tensors import filled, same

COUNT = 20_000  # elements: several chunks


@pytest.fixture(params=["mapped", "sent to"])
def pair(hw, request):
    """A manager that sends, in chunks of 16 KiB, and one that receives, with page-locked pools."""
    is_mapped = request.param == "mapped"
    both = [
        DiffusionTransferManager(
            LoopEngine(hw, 1 << 20, is_mapped=is_mapped), hw, chunk_bytes=1 << 14
        )
        for _ in range(2)
    ]
    yield both
    hw.synchronize()
    for one in both:
        one.close(timeout_s=2)
        assert one.pool.stats().ranges.free_bytes == one.size_bytes


@pytest.fixture
def device(hw):
    if hw.info.device_type == "cpu":
        pytest.skip("the host is the device: nothing runs late")
    return hw.device()


# --- What arrives ---------------------------------------------------------------------------------


def test_a_tree_of_host_and_device_goes_to_a_device(hw, pair, in_any_order):
    sender, receiver = pair
    sent = {
        "large": filled(torch.float32, (COUNT,), hw.device()),
        "small": filled(torch.int64, (3,), hw.device()),
        "host": filled(torch.float16, (5000,)),
        "view": filled(torch.float32, (300, 200), hw.device()).t()[::3],
        "conjugated": filled(torch.complex64, (90, 91), hw.device()).conj(),
    }
    for way in ("send", "stage", "stage, not waited for"):
        slot = receiver.grant(sender.size_of(sent))
        if way == "send":
            seal = sender.send_tensors("r", sent, receiver.address, slot)
        else:
            stage = sender.stage_tensors if way == "stage" else sender.stage_tensors_async
            staged = stage("r", sent)
            seal = sender.push_to_peer(staged, receiver.address, slot, 10)
            staged.free()
        assert receiver.consume(slot)
        for place in (hw.device(), hw.device_string(), None):
            got = receiver.load_tensors(slot, seal, place)
            assert got.keys() == sent.keys()
            for name, tensor in got.items():
                assert tensor.device == (torch.device("cpu") if place is None else hw.device(0))
                same(tensor, sent[name])
            del got, tensor
        receiver.finish(slot)


def test_no_device_is_needed_at_the_time_of_making(hw, manager, monkeypatch):
    """Device arguments are resolved at each call."""
    sender, receiver = manager(), manager()
    slot = receiver.grant(12)
    seal = sender.send_tensors("r", torch.ones(3), receiver.address, slot)
    receiver.consume(slot)
    asked = []
    current = hw.current_stream
    monkeypatch.setattr(hw, "current_stream", lambda *a: asked.append(a) or current(*a))
    got, event = receiver.load_tensors_async(slot, seal, hw.device().type)
    hw.synchronize_event(event)
    assert asked
    assert got.device.type == hw.device().type
    receiver.finish(slot)


# --- Streams --------------------------------------------------------------------------------------


def whole_way(hw, sender, receiver, straight):
    """Compute, stage or send on a side stream, load on another, compute; then reuse the slot."""
    side, other = hw.create_stream(), hw.create_stream()
    totals = []
    for turn in (1.0, 2.0):
        x = torch.zeros(COUNT, device=hw.device())
        x += turn  # on the current stream
        slot = receiver.grant(sender.size_of(x))
        if straight:
            seal = sender.send_tensors("r", x, receiver.address, slot, stream=side)
        else:
            staged = sender.stage_tensors_async("r", x, stream=side)
        del x
        torch.zeros(COUNT, device=hw.device())  # would get its memory
        hw.synchronize_stream(hw.current_stream())
        if not straight:
            seal = sender.push_to_peer(staged, receiver.address, slot, 10)
            staged.free()
        assert receiver.consume(slot)
        tree, event = receiver.load_tensors_async(slot, seal, hw.device(), other)
        receiver.finish(slot)
        # The next tenant writes as soon as it may.
        following = receiver.stage_tensors("next", torch.full((COUNT,), 7.0))
        hw.wait_event(event)
        totals.append(tree.sum())
        following.free()
    return [total.item() / COUNT for total in totals]


@pytest.mark.parametrize("straight", [False, True], ids=["staged", "sent"])
def test_the_whole_way_is_right_and_silent_in_any_order(hw, pair, in_any_order, straight):
    with Sanitizer(hw, on_race="collect") as sanitizer:
        assert whole_way(hw, *pair, straight) == [1, 2]
    assert sanitizer.races == []


@pytest.mark.parametrize("count", [3, COUNT], ids=["small", "large"])
def test_a_tensor_of_the_host_that_a_stream_still_writes_is_reported(hw, device, pair, late, count):
    """The host reads it at once: whoever sends it has to wait for its copy first."""
    sender, receiver = pair
    there, here = torch.ones(count, device=device), hw.pin_memory(torch.zeros(count))
    slot = receiver.grant(sender.size_of(here))
    with Sanitizer(hw, on_race="collect") as sanitizer:
        here.copy_(there, non_blocking=True)
        sender.send_tensors("r", here, receiver.address, slot)
    assert "the host never waited" in sanitizer.races[0].missing_edge
    receiver.free(slot)


@contextlib.contextmanager
def broken(hw, hook, answer):
    """Take a wait out: its hook answers without waiting."""
    kept = getattr(hw, hook)
    setattr(hw, hook, lambda *arguments, **options: answer)
    try:
        yield
    finally:
        setattr(hw, hook, kept)


# What is taken out, and what the report says is missing.
WAITS = {
    "the side stream for the current one": ("wait_stream", None, "`side` never waited for"),
    "the host for what was staged": ("synchronize_event", None, "the host never waited for `side`"),
    "the source's memory for the side stream": ("record_stream", None, "Call backend.record_str"),
    "the slot's memory for the load": ("query_event", True, ""),
}
REPORTED = [
    ("the side stream for the current one", False),
    ("the side stream for the current one", True),
    ("the host for what was staged", False),
    ("the host for what was staged", True),
    ("the source's memory for the side stream", False),
]
# A range's tenants are strangers to the sanitizer (tests/races has that race). What is staged is
# copied when the push waits for it, and the program has waited for the current stream by then.
WRONG = [
    *REPORTED[1:],
    ("the slot's memory for the load", False),
    ("the slot's memory for the load", True),
]


@pytest.fixture
def outcome_without(hw, pair):
    """Run the whole way with a wait taken out, and clear up what that has left."""

    def run(name, straight):
        hook, answer, _ = WAITS[name]
        try:
            with broken(hw, hook, answer):
                return whole_way(hw, *pair, straight)
        except PeerError as error:  # a checksum may notice as well
            return type(error)
        finally:
            hw.synchronize()
            for one in pair:
                one.abort("r")
                one.abort("next")
                for slot in one.granted():
                    one.free(slot)

    return run


@pytest.mark.parametrize(("name", "straight"), REPORTED)
@pytest.mark.parametrize("policy", ["lazy", "eager", "random:1"])
@pytest.mark.usefixtures("device")
def test_a_wait_that_is_taken_out_is_reported(hw, outcome_without, name, straight, policy):
    with contextlib.ExitStack() as stack:
        if hw.info.name == "sim":
            from hwcore_sim import device

            stack.enter_context(device.drain_policy(policy))
        sanitizer = stack.enter_context(Sanitizer(hw, on_race="collect"))
        outcome_without(name, straight)
    edges = [race.missing_edge for race in sanitizer.races]
    assert any(WAITS[name][2] in edge for edge in edges), edges


@pytest.mark.parametrize(("name", "straight"), WRONG)
@pytest.mark.usefixtures("late")
def test_without_it_values_are_wrong_where_work_runs_late(hw, outcome_without, name, straight):
    if hw.info.name != "sim":
        pytest.skip("only a simulated device runs as late as it may")
    assert outcome_without(name, straight) != [1, 2]


def test_a_send_leaves_nothing_under_way_when_it_fails(hw, pair, monkeypatch, late):
    """Else a copy would come into a slot that has been given to another."""
    sender, receiver = pair
    if not sender._engine.is_mapped:
        pytest.skip("copies go to its own pool")
    x = torch.ones(COUNT, device=hw.device())
    slot = receiver.grant(sender.size_of(x))

    def failing(event):
        raise KeyboardInterrupt

    side = hw.create_stream()
    with monkeypatch.context() as patch:
        patch.setattr(hw, "synchronize_event", failing)
        with pytest.raises(KeyboardInterrupt):
            sender.send_tensors("r", x, receiver.address, slot, stream=side)
    memory = receiver._engine.memory[slot.offset : slot.offset + slot.size_bytes]
    memory.zero_()
    hw.synchronize()
    assert not memory.any()
    receiver.free(slot)


def test_the_host_does_not_wait_for_what_is_staged_or_loaded_async(hw, pair, late):
    if hw.info.name != "sim":
        pytest.skip("only a simulated device tells what the host waited for")
    from hwcore_sim import device

    sender, receiver = pair
    x = torch.ones(COUNT, device=hw.device())
    slot = receiver.grant(sender.size_of(x))
    seal = sender.send_tensors("r", x, receiver.address, slot)
    receiver.consume(slot)
    with device.host_waits() as waits:
        staged = sender.stage_tensors_async("r", x, stream=hw.create_stream())
        tree, _ = receiver.load_tensors_async(slot, seal, hw.device(), hw.create_stream())
        receiver.finish(slot)
    assert waits == []
    hw.synchronize()
    assert tree.sum() == COUNT
    staged.free()
