"""The plugin itself: what hwcore and its user see of it, and that it conforms as far as can be."""

import pathlib
import subprocess
import sys

import pytest
import torch

import hwcore_npu
from hwcore.errors import ArgumentValueError
from hwcore.kernels import gather_rows, kernel
from hwcore.testing.conformance import session

PACKAGE = pathlib.Path(hwcore_npu.__file__).parent


def test_importing_any_module_but_graphs_imports_no_torch():
    modules = sorted(file.stem for file in PACKAGE.glob("*.py") if file.stem != "graphs")
    code = f"import sys, {', '.join(f'hwcore_npu.{name}' for name in modules)}\n"
    code += "print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "False", done.stderr


# What cannot hold on a machine without the device.
NOT_HERE = {
    "identity::test_probe_says_that_the_device_which_runs_is_available",
    "distributed::test_a_group_of_one_reduces_a_tensor",
    "streams::test_an_event_for_other_processes_has_a_handle_or_is_refused",
}


def test_it_conforms_but_for_what_needs_the_device(hw, capsys):
    from hwcore_sim.device.raw import SimRawAccess

    loader = "__import__('npu_on_sim').backend()"
    found = session.run(hw, raw=SimRawAccess(), loader=loader)
    failed = {result.id: result.message for result in found.tests if result.outcome == "failed"}
    assert failed.keys() == NOT_HERE, failed
    assert sum(result.outcome == "passed" for result in found.tests) > 120
    with capsys.disabled():
        print("\nhwcore-npu conforms on the simulated device with graphs of torch_npu faked;")
        print("not run on the device: every hook. Not run at all:", ", ".join(sorted(NOT_HERE)))


# --- Policies -------------------------------------------------------------------------------------


def test_nothing_is_assumed_of_host_memory_but_that_it_can_be_pinned(hw):
    policy = hw.host_memory_policy()
    assert policy.can_pin
    assert not policy.reuse_waits_for_copy
    assert not policy.copies_ordered_with_kernels


def test_collectives_are_hccls(hw):
    assert hw.distributed_backend() == "hccl"


def test_transfer_goes_through_shared_memory_or_mooncakes_ascend_transport(hw):
    shm, mooncake = hw.transfer_engines()
    assert (shm.name, shm.memory) == ("shm", "host")
    assert (mooncake.name, mooncake.protocol) == ("mooncake", "ascend")
    assert mooncake.package == "mooncake-transfer-engine-npu"


def test_graphs_are_budgeted(hw):
    assert "capture_stream_limit" in hw.info.quirks


@pytest.mark.parametrize(("visible", "several"), [(None, True), ("0,1", True), ("3", False)])
def test_several_devices_are_claimed_where_the_variable_leaves_several(
    hw, monkeypatch, visible, several
):
    from hwcore_npu.plugin import NpuPlugin

    monkeypatch.delenv("ASCEND_RT_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", visible)
    assert ("multi_device" in NpuPlugin().backend_info().capabilities) == several


# --- Kernels --------------------------------------------------------------------------------------


@pytest.fixture
def library():
    with torch.library._scoped_library("npu", "FRAGMENT") as scoped:
        yield scoped


def test_an_operator_with_the_cores_name_and_arguments_is_picked_up(hw, library):
    library.define("gather_rows(Tensor rows, Tensor indices, Tensor(a!) out) -> Tensor(a!)")
    library.impl("gather_rows", lambda rows, indices, out: out.fill_(7), "PrivateUse1")
    kernels = hw.kernels()
    assert list(kernels) == ["gather_rows"]
    rows = torch.zeros(3, 2, dtype=torch.int64, device="npu")
    out = kernels["gather_rows"](rows, torch.tensor([0], device="npu"), rows[:1].clone())
    assert out.tolist() == [[7, 7]]


def test_one_with_the_name_and_other_arguments_is_not(hw, library):
    """As SGLang's, which is given the argmax of every row."""
    library.define(
        "verify_tree_greedy(Tensor(a!) predicts, Tensor(b!) accept_index, Tensor candidates) -> ()"
    )
    assert hw.kernels() == {}


def test_without_any_the_reference_runs(hw):
    assert hw.kernels() == {}
    assert kernel(hw, gather_rows) is gather_rows


# --- Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [2, 99, -1])
@pytest.mark.parametrize("call", ["device", "set_device", "memory_info", "generator"])
def test_an_index_beyond_the_devices_is_named_and_nothing_is_changed(hw, call, index):
    before = torch.npu.current_device()
    with pytest.raises(
        ArgumentValueError, match=rf"`index` got {index} \(int\); expected an index from 0 to 1"
    ):
        getattr(hw, call)(index)
    assert torch.npu.current_device() == before
    hw.memory_info(1)


@pytest.mark.parametrize("call", ["create_stream", "create_event"])
def test_so_is_a_device_of_such_an_index(hw, call):
    with pytest.raises(
        ArgumentValueError, match=r"`index` got 9 \(int\); expected an index from 0 to 1"
    ):
        getattr(hw, call)(torch.device("npu", 9))
    getattr(hw, call)(torch.device("npu", 1))


def test_recording_an_event_of_another_device_is_named_and_the_event_still_works(hw):
    event = hw.create_event(hw.device(0))
    hw.record_event(event, hw.current_stream(hw.device(0)))
    with pytest.raises(ArgumentValueError) as caught:
        hw.record_event(event, hw.create_stream(hw.device(1)))
    assert str(caught.value) == (
        "hwcore-npu: `event` got device(type='npu', index=0) (device); expected an event of npu:1, "
        "where the stream is: it was recorded there before. Make one event for each device, with "
        "create_event(device)."
    )
    hw.record_event(event, hw.current_stream(hw.device(0)))
    hw.synchronize_event(event)


def test_another_error_of_record_is_passed_on(hw):
    class Event:
        device = torch.device("npu", 0)

        def record(self, stream):
            raise RuntimeError

    with pytest.raises(RuntimeError, check=lambda error: type(error) is RuntimeError):
        hw.record_event(Event(), hw.current_stream(hw.device(0)))
