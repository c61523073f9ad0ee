"""Benchmarks of a device: where there is none, they say so; simulated, every line of them runs."""

from __future__ import annotations

import pytest
import torch

from hwcore.cli import device_clock
from hwcore.cli.bench import load
from hwcore.cli.measurement import NotMeasuredError

SUBJECTS = ("device_gather", "device_verification", "device_graphs", "device_serving")


@pytest.mark.parametrize("subject", SUBJECTS)
def test_each_gives_its_rows_on_an_accelerator_and_says_so_elsewhere(hw, subject):
    module = load(subject)
    if "async_streams" not in hw.info.capabilities:
        with pytest.raises(
            NotMeasuredError, match=f"accelerator, and the backend `{hw.info.name}`"
        ):
            module.run(quick=True)
        return
    rows = module.run(quick=True)
    assert [row.what for row in rows] == [target.what for target in module.TARGETS]
    assert [row.target for row in rows] == [target.value for target in module.TARGETS]
    left_out = {row.what: row.not_measured for row in rows if row.not_measured}
    assert all("Triton" in what or "torch.compile" in what for what in left_out), left_out
    assert all(row.value == row.value and row.detail for row in rows if not row.not_measured)
    if subject == "device_serving":
        assert [row.value for row in rows if "with the tokens of" in row.what] == [100, 100]


@pytest.fixture
def clock(hw):
    return device_clock.DeviceClock(hw)


def test_the_hosts_clock_takes_calls_and_the_wait_for_them(clock):
    done = []
    measure = clock.by_host(lambda: done.append(1), calls=10)
    assert measure() > 0
    assert len(done) == 3 + 10, "some to warm up"


def test_the_devices_clock_replays_calls_that_were_captured_once(hw, clock):
    made, total = [], torch.zeros(2, device=hw.device())

    def adds(number):
        made.append(number)
        total[number].add_(1)

    measure = clock.on_device([lambda: adds(0), lambda: adds(1)])
    before = total.tolist()
    assert made == [0, 1, 0, 1], "to warm up, and in the capture"
    assert measure() > 0
    assert total.tolist() == [value + 2 for value in before], "one replay ahead, and one measured"
    assert len(made) == 4


def test_a_device_whose_events_take_no_time_is_refused(hw):
    class Untimed:
        info = type("Info", (), {"name": "acme", "capabilities": frozenset()})

    with pytest.raises(NotMeasuredError, match="which the backend `acme` has not"):
        device_clock.DeviceClock(Untimed())
