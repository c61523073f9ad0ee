"""setup(): torch_npu is imported there, and what goes wrong is explained."""

import os
import pathlib
import subprocess
import sys

import npu_on_sim
import pytest

HERE = pathlib.Path(__file__).parent
SETUP = "import hwcore; from hwcore_npu.plugin import NpuPlugin; hwcore.Backend(NpuPlugin())"
FAILING = "raise ImportError('libhccl.so: cannot open shared object file')"


@pytest.fixture
def python(tmp_path):
    """Run Python with a torch_npu of one's own; return its standard output and error."""

    def run(code, torch_npu="import fake_torch_npu; fake_torch_npu.install()", version=None, **env):
        npu_on_sim.install_torch_npu(tmp_path / "site", version, torch_npu)
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("HWCORE_", "TORCH_"))}
        if cache := os.environ.get("HWCORE_SIM_CACHE"):
            inherited["HWCORE_SIM_CACHE"] = cache
        path = os.pathsep.join(
            [str(tmp_path / "site"), str(HERE), os.environ.get("PYTHONPATH", "")]
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**inherited, "PYTHONPATH": path, **env},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        return done.stdout.strip(), done.stderr.strip()

    return run


OFF = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}


def test_it_imports_torch_npu_where_torch_did_not(python):
    code = f"import sys, torch; print('torch_npu' in sys.modules); {SETUP}; print(torch.npu)"
    out, error = python(code, **OFF)
    assert out.splitlines()[0] == "False", error
    assert "torch.npu" in out


@pytest.mark.parametrize("before", ["0", None])
@pytest.mark.parametrize("code", [FAILING, "import fake_torch_npu; fake_torch_npu.install()"])
def test_the_variable_that_torch_npu_changes_is_as_before(python, before, code):
    spoil = "import os; os.environ['TORCH_DEVICE_BACKEND_AUTOLOAD'] = 'spoilt'\n"
    program = f"""if True:
        import os
        os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
        import torch
        if {before is None}:
            del os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"]
        try:
            {SETUP}
        except hwcore.HwcoreError:
            pass
        print(os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD"))
    """
    out, error = python(program, spoil + code)
    assert out == str(before), error


def test_a_failed_import_names_its_causes(python):
    code = "try:\n    raise OSError('no such file: libascendcl.so')\n"
    code += "except OSError as e:\n    raise ImportError('torch_npu._C') from e\n"
    _, error = python(SETUP, code, **OFF)
    last = error.splitlines()[-1]
    assert last.startswith("hwcore.errors.SetupError: ")
    assert "ImportError('torch_npu._C'), caused by OSError('no such file: libascendcl.so')" in last
    assert "source set_env.sh" in last
    assert "Traceback" in error
    assert "OSError: no such file: libascendcl.so" in error


def test_another_torch_is_refused(python):
    _, error = python(SETUP, version="2.12.0", **OFF)
    assert "torch_npu 2.12.0 is for another torch" in error.splitlines()[-1]
    assert "pip install torch_npu==" in error.splitlines()[-1]


def test_two_accelerators_are_refused_before_torch_npu_is_imported(python):
    code = f"import hwcore; hwcore.load_backend('sim'); {SETUP}"
    _, error = python(code, "raise SystemExit('imported')", **OFF)
    last = error.splitlines()[-1]
    assert last.startswith("hwcore.errors.SetupError: ")
    assert "this process's accelerator got 'sim'" in last
    assert "torch takes one a process" in last


def test_a_device_that_vanished_since_the_probe_is_named(python):
    vanish = "import fake_torch_npu as f; f.install(); import torch\n"
    vanish += "torch.npu.device_count = lambda: 0\n"
    _, error = python(SETUP, vanish, **OFF)
    last = error.splitlines()[-1]
    assert "got 0 devices from" in last
    assert "npu-smi info" in last


def test_import_torch_fails_where_torch_npu_cannot_load_and_another_backend_still_runs(python):
    """The poisoned import that the probe foresees."""
    code = """if True:
        import subprocess, sys
        command = [sys.executable, "-c", "import torch"]
        done = subprocess.run(command, capture_output=True, text=True)
        print("Failed to load the backend extension: torch_npu" in done.stderr)
        import hwcore
        print(hwcore.use("cpu").info.name)
        import torch
        print(torch.ones(2).sum().item())
    """
    out, error = python(code, FAILING)
    assert out.splitlines() == ["True", "cpu", "2.0"], error


def test_automatic_selection_warns_with_the_reason_and_the_poisoned_import(python):
    out, error = python("import hwcore; print(hwcore.current_backend().info.name)", FAILING)
    assert out == "cpu", error
    assert "there is no Ascend driver" in error
    assert "`import torch` fails here" in error
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in error
