"""Rules that no single module can keep: what may be imported, and what may be named."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
LINT = ROOT / "scripts/check_device_names.py"


def python(*arguments, **options):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        **options,
    )


# --- Imports --------------------------------------------------------------------------------------


def test_importing_hwcore_imports_nothing_heavy(site):
    code = """
        import sys, hwcore
        heavy = "torch numpy msgspec pluggy importlib_metadata click rich multiprocessing".split()
        print([name for name in heavy if name in sys.modules])
        print(sorted(name for name in sys.modules if name.startswith("hwcore")))
    """
    assert site.run(code).output == ["[]", "['hwcore', 'hwcore._version']"]


def test_public_names_come_without_torch(site):
    code = """
        import sys, hwcore
        for name in hwcore.__all__:
            getattr(hwcore, name)
        print("torch" in sys.modules, set(hwcore.__all__) <= set(dir(hwcore)))
        try:
            hwcore.curent_backend
        except AttributeError as error:
            print(error)
    """
    expected = ["False True", "module 'hwcore' has no attribute 'curent_backend'"]
    assert site.run(code).output == expected


def test_importing_any_module_selects_no_backend(site):
    site.add("acme", "import pathlib; pathlib.Path('imported').touch()")
    code = """
        import importlib, os, pkgutil, hwcore, hwcore.activation
        names = [module.name for module in pkgutil.walk_packages(hwcore.__path__, "hwcore.")]
        for name in names:
            if not name.endswith("__main__"):
                try:
                    importlib.import_module(name)
                except ModuleNotFoundError as error:
                    assert error.name == "triton", name  # not there for every device
                assert hwcore.activation._process.decision is None, name
                assert not hwcore.activation._process.loaded, name
                assert "HWCORE_BACKEND" not in os.environ, name
        print(len(names) > 20, "hwcore.speculative.verify" in names)
    """
    assert site.run(code).output == ["True True"]
    assert not (site.folder / "imported").exists()


# --- Device names ---------------------------------------------------------------------------------


def test_the_core_names_no_device():
    done = python(LINT, "hwcore")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "line",
    [
        'device = "cuda"',
        'device = "npu:0"',
        "x = x.cuda()",
        "torch.cuda.synchronize()",
        "import torch_npu",
        "if tensor.is_cuda:",
        "_is_npu = False",
        "IS_HIP = True",
        "# on ROCm this differs",
        '"""Ascend wants it so."""',
        "class CudaGraph:",
        "def run_on_xpu0(): ...",
        "cudaMalloc(8)",
        "HAS_MPS = HAS_HPU",
        "nvidia_smi()",
        "MUSAStream = None",
    ],
)
def test_the_lint_finds(tmp_path, line):
    (tmp_path / "good.py").write_text("chip = ship = npuzzle = barracuda = imps = whip = 1\n")
    bad = tmp_path / "deep" / "bad.py"
    bad.parent.mkdir()
    bad.write_text(f"import torch\n\n    {line}\n")
    done = python(LINT, tmp_path)
    assert done.returncode == 1
    assert done.stdout.splitlines()[:-1] == [f"{bad}:3: {line}"]
    assert python(LINT, bad).returncode == 1
    assert python(LINT, tmp_path / "good.py").returncode == 0


def test_the_lint_spares_triton_kernels_alone(tmp_path):
    kernels = tmp_path / "kernels" / "triton"
    kernels.mkdir(parents=True)
    (kernels / "gather.py").write_text('backend = "cuda"\n')
    assert python(LINT, tmp_path).returncode == 0
    (tmp_path / "kernels" / "gather.py").write_text('backend = "cuda"\n')
    assert python(LINT, tmp_path).returncode == 1


@pytest.mark.parametrize("arguments", [(), ("missing",), (".git",)])
def test_the_lint_does_not_pass_where_there_is_nothing_to_check(arguments):
    assert python(LINT, *arguments).returncode == 2


@pytest.mark.parametrize(
    "code",
    [
        "import torch\n\ntorch.cuda.synchronize()\n",
        "import torch\n\ntorch.npu.synchronize()\n",
        "from torch import cuda\n\ncuda.synchronize()\n",
        "import torch.cuda\n\ntorch.cuda.synchronize()\n",
        "from torch.cuda import synchronize\n\nsynchronize()\n",
    ],
)
@pytest.mark.parametrize(
    ("file", "refused"),
    [("hwcore/x.py", True), ("examples/x.py", True), ("plugins/acme/x.py", False)],
)
def test_one_devices_api_is_refused_outside_its_plugin(code, file, refused):
    pytest.importorskip("ruff")  # not there where a device is tested
    ruff = ("-m", "ruff", "check", "--no-cache", "--select", "TID251", "--stdin-filename", file)
    done = python(*ruff, "-", input=code)
    assert done.returncode == int(refused), done.stdout + done.stderr
    assert ("TID251" in done.stdout) == refused
    assert ("call the Backend" in done.stdout) == refused
