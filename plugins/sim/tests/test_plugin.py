"""The plugin itself: what hwcore and its user see of the simulated accelerator."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest
import torch

import hwcore_sim

PACKAGE = pathlib.Path(hwcore_sim.__file__).parent


def python(code, **variables):
    """Run Python in a process of its own; return what it printed, or the last line of its error."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("HWCORE_")}
    if cache := os.environ.get("HWCORE_SIM_CACHE"):
        inherited["HWCORE_SIM_CACHE"] = cache
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**inherited, **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    return done.stdout.strip() if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def test_the_part_that_vendors_copy_is_small_and_stands_apart_from_the_device():
    lines = [len(file.read_text().splitlines()) for file in PACKAGE.glob("*.py")]
    assert sum(lines) <= 150


def test_it_is_not_selected_automatically():
    assert python("import hwcore; print(hwcore.current_backend().info.name)") == "cpu"


def test_importing_the_plugin_imports_no_torch():
    code = "import sys, hwcore_sim.plugin; print('torch' in sys.modules)"
    assert python(code) == "False"


@pytest.mark.parametrize(
    ("count", "several"), [("1", False), ("01", False), ("2", True), ("", True), ("two", True)]
)
def test_several_devices_are_listed_where_the_variable_says_so(count, several):
    code = """if True:
        import sys
        from hwcore_sim.plugin import SimPlugin
        print("multi_device" in SimPlugin().backend_info().capabilities, "torch" in sys.modules)
    """
    assert python(code, HWCORE_SIM_DEVICES=count) == f"{several} False"


def test_without_a_compiler_it_says_what_to_install(tmp_path):
    (tmp_path / "python").symlink_to(sys.executable)
    code = "import hwcore; hwcore.use('sim')"
    error = python(code, PATH=str(tmp_path), HWCORE_SIM_CACHE=str(tmp_path / "empty"))
    assert error.startswith("hwcore.errors.BackendUnavailableError: ")
    assert "there is no C++ compiler `c++`" in error
    assert "set CXX" in error


def test_a_device_that_was_built_needs_no_compiler(tmp_path, hw):
    code = "import hwcore; print(hwcore.use('sim').info.name)"
    assert python(code, PATH=str(tmp_path)) == "sim"


def test_renamed_it_is_the_device_of_that_name():
    code = """if True:
        import torch, hwcore
        hw = hwcore.use("sim")
        x = torch.ones(2, device=hw.device(1)) + 1
        print(hw.info.name, hw.info.device_type, x.device, x.is_npu, torch.npu.device_count())
        print(hw.device_string(0), hw.current_stream().device.type, x.tolist())
    """
    assert python(code, HWCORE_SIM_NAME="npu").splitlines() == [
        "sim npu npu:1 True 2",
        "npu:0 npu [2.0, 2.0]",
    ]


@pytest.mark.parametrize("name", ["cpu", "cuda", "hip", "mps", "xpu", "mtia", "privateuseone"])
def test_a_name_that_torch_has_already_is_refused(name):
    error = python("import hwcore; hwcore.use('sim')", HWCORE_SIM_NAME=name)
    assert error.startswith("hwcore.errors.SetupError: ")
    assert f"HWCORE_SIM_NAME got \\'{name}\\'" in error


def test_a_name_that_is_none_is_refused():
    error = python("import hwcore; hwcore.use('sim')", HWCORE_SIM_NAME="My Device")
    assert error.startswith("hwcore.errors.PluginReturnError: ")
    assert "'My Device'" in error


def test_a_process_of_another_backend_cannot_change_to_it():
    code = "import hwcore; hwcore.use('cpu'); hwcore.use('sim')"
    assert "hwcore.errors.SelectionError" in python(code)


def test_a_denied_op_asks_for_the_cpu(hw):
    from hwcore_sim import device

    tensor = torch.ones(2, device=hw.device())
    with device.denied("topk"):
        assert hw.needs_cpu_fallback(tensor, "topk")
        assert not hw.needs_cpu_fallback(tensor, "sort")
        assert not hw.needs_cpu_fallback(tensor.cpu(), "topk")
    assert not hw.needs_cpu_fallback(tensor, "topk")
