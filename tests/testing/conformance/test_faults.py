"""The kit catches faults: plugins that are each wrong in one way, each found and its hook named."""

from __future__ import annotations

import ast
import importlib.util
import json
import pathlib
import subprocess
import sys
from concurrent import futures

import msgspec
import pytest

from hwcore.probing import child_environment
from hwcore.testing.conformance.report import Report

HERE = pathlib.Path(__file__).parent

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("hwcore_sim") is None, reason="hwcore-sim is not installed"
    ),
]

# The issue's own list; what faults.py has beyond it is welcome.
REQUIRED = {
    "WaitEventDoesNothing": "wait_event",
    "WaitStreamDoesNothing": "wait_stream",
    "WaitStreamReversed": "wait_stream",
    "EventRecordedOnTheWrongStream": "record_event",
    "RecordStreamDoesNothing": "record_stream",
    "CurrentStreamIgnoresTheContext": "current_stream",
    "ContextNotRestoredAfterAnException": "stream_context",
    "SynchronizeReturnsEarly": "synchronize",
    "QueryAlwaysTrue": "query_event",
    "BlockingEventSpinsForever": "synchronize_event",
    "DeviceStringWithoutIndex": "device_string",
    "MemorySwapped": "memory_info",
    "NoFallbackForDeviceTensors": "needs_cpu_fallback",
    "PinReturnsUnpinned": "pin_memory",
    "ReplayWithStaleInputs": "graph_replay",
    "ReplayAllocatesNewOutputs": "graph_replay",
    "ReplayCallsTheFunctionAgain": "graph_replay",
    "GeneratorIgnoresItsSeed": "generator",
    "SetDeviceLeaksToOtherThreads": "set_device",
    "KernelOfAWrongDtype": "kernels",
    "KernelBreaksOnAnEmptyBatch": "kernels",
    "SamplingAcceptsAtTheCoin": "kernels",
    "SamplingKeepsTheResidual": "kernels",
    "SamplingTakesTheArgmax": "kernels",
    "SamplingUsesACoinTwice": "kernels",
    "SamplingCountsDuplicatesTwice": "kernels",
    "SamplingFallsThrough": "kernels",
    "SamplingReversesSiblings": "kernels",
    "SamplingReadsTheBonusWithAnotherStride": "kernels",
}

# What is emitted gives each of these away, without a look at the reference's results: so that a
# kernel is found as well whose coins cannot be given.
BY_DISTRIBUTION = {
    "SamplingAcceptsAtTheCoin": "test_a_coin_equal_to_the_probability_rejects",
    "SamplingAcceptsAtTheCoinWithoutMass": "test_extreme_coins_emit_no_token_without_probability",
    "SamplingKeepsTheResidual": "test_sampled_sequences_have_the_targets_distribution",
    "SamplingTakesTheArgmax": "test_sampled_sequences_have_the_targets_distribution",
    "SamplingUsesACoinTwice": "test_sampled_sequences_have_the_targets_distribution",
    "SamplingCountsDuplicatesTwice": "test_sampled_sequences_have_the_targets_distribution",
    "SamplingFallsThrough": "test_extreme_coins_emit_no_token_without_probability",
    "SamplingReversesSiblings": "test_thresholds_favour_siblings_in_their_order",
    "SamplingReadsTheBonusWithAnotherStride": (
        "test_sampled_sequences_have_the_targets_distribution"
    ),
}

OPERATION_AT_FAULT = {
    **dict.fromkeys(BY_DISTRIBUTION, "verify_tree_sampling"),
    "KernelOfAWrongValue": "verify_tree_greedy",
    "GreedyTakesTheHighestOfEqualLogits": "verify_tree_greedy",
    "KernelWritesToItsLogits": "verify_tree_greedy",
    "TreeCountsPaddingAsDeep": "build_tree",
    "CommitMovesToTheEnd": "commit_paths",
    "MropeGivesAllTheFirstDelta": "mrope_positions",
    "GatherOfTheWrongRow": "gather_rows",
    "KernelThatLeavesRowsFull": "assert_and_invalidate",
}


def entered(decorator):
    """Read from faults.py, without the device that importing it needs: class to decorator."""
    found = {}
    for node in ast.parse((HERE / "faults.py").read_text()).body:
        for mark in getattr(node, "decorator_list", []):
            if isinstance(mark, ast.Call) and getattr(mark.func, "id", "") == decorator:
                found[node.name] = mark.args[0].value if mark.args else None
    return found


FAULTS = entered("fault")
SOUND = ["SimPlugin", *entered("sound")]


def run_each(names):
    """Run the kit on these plugins, one after the other in one new process."""
    done = subprocess.run(
        [sys.executable, str(HERE / "_fault_runs.py"), *names],
        env={**child_environment(), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line["name"]: msgspec.convert(line["report"], Report) for line in lines}


@pytest.fixture(scope="module")
def reports():
    """The report on every plugin, from two processes, because importing torch takes seconds."""
    names = [*SOUND, *FAULTS]
    with futures.ThreadPoolExecutor() as halves:
        found = halves.map(run_each, (names[::2], names[1::2]))
    return {name: report for half in found for name, report in half.items()}


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_plugin_conforms(reports, name):
    report = reports[name]
    assert [failure.messages for failure in report.failures] == []
    assert report.exit_code == 0
    assert sum(group.passed for group in report.groups) > 60


@pytest.mark.parametrize(("name", "hook"), FAULTS.items())
def test_a_fault_is_caught_and_its_hook_named(reports, name, hook):
    report = reports[name]
    assert report.exit_code == 1
    named = {failure.hook: failure.messages for failure in report.failures}
    assert hook in named
    assert all(message.startswith(f"{hook}: ") for message in named[hook])


@pytest.mark.parametrize(("name", "test"), BY_DISTRIBUTION.items())
def test_a_sampling_fault_is_found_by_what_is_emitted(reports, name, test):
    failed = {test.id for test in reports[name].tests if test.outcome == "failed"}
    assert f"sampling::{test}" in failed


@pytest.mark.parametrize(("name", "operation"), OPERATION_AT_FAULT.items())
def test_a_wrong_kernel_is_named_by_its_operation(reports, name, operation):
    (messages,) = (it.messages for it in reports[name].failures if it.hook == "kernels")
    assert any(f"`{operation}`" in message for message in messages)


def test_most_faults_are_blamed_on_their_hook_alone(reports):
    alone = [name for name in FAULTS if [f.hook for f in reports[name].failures] == [FAULTS[name]]]
    assert len(alone) >= 0.8 * len(FAULTS), sorted(set(FAULTS) - set(alone))


def test_a_hook_that_spins_for_ever_is_ended_by_its_limit(reports):
    (failure,) = reports["BlockingEventSpinsForever"].failures
    assert "synchronize_event: the call got no answer within 5 s" in failure.messages[0]


def test_what_is_claimed_less_is_skipped_and_counted(reports):
    skipped = {feature.name for feature in reports["ListsNothing"].features_skipped}
    assert {"async_streams", "graphs", "pinned_memory", "event_timing"} <= skipped


def test_a_declared_quirk_is_listed_with_the_test_it_adapted(reports):
    quirks = {quirk.name: quirk.tests for quirk in reports["CapturesWithTheTape"].quirks}
    assert quirks["capture_executes"] == [
        "graphs::test_capture_records_the_work_and_does_it_only_by_quirk"
    ]


def test_every_fault_that_was_asked_for_is_there():
    assert set(REQUIRED.items()) <= set(FAULTS.items())
