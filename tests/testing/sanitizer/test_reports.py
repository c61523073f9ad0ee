"""What a report says."""

from __future__ import annotations

import inspect

import torch

from hwcore.testing.sanitizer import Sanitizer


def here():
    """Return this file as reports show it and the line of the caller."""
    frame = inspect.currentframe().f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def test_a_report_names_both_sides_the_tensor_and_the_missing_edge(hw, sanitizer):
    plan = hw.create_stream()
    made, x = here(), torch.zeros(4, 2, device=hw.device())
    hw.synchronize()

    def draft():
        x.add_(1)

    draft()
    with hw.stream_context(plan):
        y = x * 2
    (race,) = sanitizer.take()
    second, first = race.current, race.previous
    assert race.kind == "read after write"
    assert (second.stream, second.op, second.write) == ("`plan`", "aten::mul", False)
    assert (first.stream, first.op, first.write) == ("`current`", "aten::add_", True)
    assert second.stack[0].endswith(
        " in test_a_report_names_both_sides_the_tensor_and_the_missing_edge"
    )
    assert first.stack[0].endswith(" in draft")
    assert first.stack[1].endswith(second.stack[0].rpartition(" in ")[2])
    line = made.rpartition("/")[2]
    assert first.origin == second.origin
    assert first.origin.startswith("[4, 2] float32, made by aten::zeros on `current` at ")
    assert line in first.origin
    assert race.missing_edge == (
        f"`plan` never waited for `current` after aten::add_ at {first.site}. "
        f"Call backend.wait_stream(plan, current) before {second.site}."
    )
    text = str(race)
    for part in (race.kind, first.origin, *first.stack, *second.stack, race.missing_edge):
        assert part in text
    hw.synchronize()
    del y


def test_frames_of_torch_and_of_the_sanitizer_are_left_out(hw, sanitizer):
    side = hw.create_stream()
    layer = torch.nn.Linear(2, 2, device=hw.device())
    with hw.stream_context(side), torch.no_grad():
        y = layer(torch.ones(1, 2, device=hw.device()))
    races = sanitizer.take()
    assert races
    for race in races:
        for line in (*race.current.stack, *race.previous.stack):
            assert "test_reports.py" in line
    hw.synchronize()
    del y


def names_of(hw, sanitizer, *streams):
    tracker = sanitizer._tracker
    return [tracker.clocks.lane(stream).name for stream in streams]


def test_streams_are_called_what_the_program_calls_them(hw, sanitizer):
    class Worker:
        pass

    worker = Worker()
    plan = hw.create_stream()
    worker.copy_stream = hw.create_stream()
    a, b = hw.create_stream(), hw.create_stream()
    typed: object = hw.create_stream()
    wrapped = [hw.create_stream()]
    found = names_of(hw, sanitizer, plan, worker.copy_stream, a, b, typed, wrapped[0])
    assert found == ["plan", "copy_stream", "a", "b", "typed", "wrapped"]


def test_a_stream_without_a_name_has_its_number(hw, sanitizer):
    streams = {}
    streams["x"] = hw.create_stream()
    assert names_of(hw, sanitizer, streams["x"]) == [f"stream {streams['x'].stream_id}"]


def test_two_streams_of_one_name_are_told_apart(hw, sanitizer):
    kept = []
    for _ in range(2):
        plan = hw.create_stream()
        kept.append(plan)
    first, second = names_of(hw, sanitizer, *kept)
    assert (first, second) == ("plan", f"plan (stream {kept[1].stream_id})")


def test_a_stream_can_be_renamed(hw, sanitizer):
    plan = hw.create_stream()
    sanitizer.name(plan, "prefill")
    assert names_of(hw, sanitizer, plan) == ["prefill"]


def test_the_stream_of_before_is_the_current_one(hw):
    side = hw.create_stream()
    with Sanitizer(hw) as sanitizer:
        torch.ones(1, device=hw.device())
        assert names_of(hw, sanitizer, hw.current_stream(), side) == [
            "current",
            f"stream {side.stream_id}",
        ]


def test_the_first_stream_entered_is_not_the_current_one(hw):
    side, x = hw.create_stream(), torch.zeros(4, device=hw.device())
    hw.synchronize()
    with Sanitizer(hw) as sanitizer:
        with hw.stream_context(side):
            x.fill_(1)
        assert names_of(hw, sanitizer, side, hw.current_stream()) == [
            f"stream {side.stream_id}",
            "current",
        ]
    hw.synchronize()


def test_a_tensor_of_before_says_so(hw):
    x = torch.zeros(8, device=hw.device())
    with Sanitizer(hw, on_race="collect") as sanitizer:
        side = hw.create_stream()
        x.add_(1)
        with hw.stream_context(side):
            x.add_(1)
    (race,) = sanitizer.races
    assert race.current.origin == "[8] float32, made before the sanitizer looked"
    hw.synchronize()
