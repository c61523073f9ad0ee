"""What a probe says of each machine that users meet: the reason, the fix, and the README's text."""

from __future__ import annotations

import dataclasses
import re

import pytest

from ._machines import AMD, NVIDIA, machine
from .conftest import GPUS

CUDA_INSTALL = (
    "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu130"
)
ROCM_INSTALL = (
    "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/rocm7.0"
)


def case(name, what, files, options, reason, fix):
    return pytest.param(name, files, options, reason, fix, id=f"{name}: {what}")


def without(files, *gone):
    return tuple(file for file in files if not file.startswith(gone))


CASES = [
    case(
        "cuda", "no driver", (), {},
        "no NVIDIA driver is loaded (/proc/driver/nvidia is missing)",
        "Install the driver, so that `nvidia-smi` lists the GPU; "
        "in a virtual machine, pass the GPU through to it",
    ),
    case(
        "cuda", "driver, no device node", NVIDIA[:1], {},
        "the NVIDIA driver is loaded, but there is no device node /dev/nvidia0",
        "Run `sudo nvidia-modprobe -u -c=0`, which makes it",
    ),
    case(
        "cuda", "container without the device", (*NVIDIA[:1], ".dockerenv"), {},
        "the host has an NVIDIA driver, but this container has no /dev/nvidia0",
        "Start it with the GPUs, such as `docker run --gpus all`",
    ),
    case(
        "cuda", "no permission", NVIDIA, {"denied": ("dev/nvidia0", "dev/nvidia1")},
        "this user may not read and write /dev/nvidia0",
        "Add the user to the group that owns it (`ls -l /dev/nvidia*`)",
    ),
    case(
        "cuda", "no permission for the control node", NVIDIA, {"denied": ("dev/nvidiactl",)},
        "this user may not read and write /dev/nvidiactl",
        "Add the user to the group that owns it (`ls -l /dev/nvidia*`)",
    ),
    case(
        "cuda", "hidden", NVIDIA, {"CUDA_VISIBLE_DEVICES": ""},
        'CUDA_VISIBLE_DEVICES="" hides every device',
        "Unset it, or name devices, such as CUDA_VISIBLE_DEVICES=0",
    ),
    case(
        "cuda", "hidden by -1", NVIDIA, {"CUDA_VISIBLE_DEVICES": "-1,0"},
        'CUDA_VISIBLE_DEVICES="-1,0" hides every device',
        "Unset it, or name devices, such as CUDA_VISIBLE_DEVICES=0",
    ),
    case(
        "cuda", "no library", NVIDIA, {"libraries": False},
        "the driver's library libcuda.so.1 cannot be loaded "
        "(libcuda.so.1: cannot open shared object file: No such file or directory)",
        "Install it in the driver's version (Debian, Ubuntu: libnvidia-compute-<version>), "
        "or add its folder to LD_LIBRARY_PATH",
    ),
    case(
        "cuda", "no library in a container", (*NVIDIA, "run/.containerenv"), {"libraries": False},
        "the driver's library libcuda.so.1 cannot be loaded "
        "(libcuda.so.1: cannot open shared object file: No such file or directory)",
        "Start the container with NVIDIA_DRIVER_CAPABILITIES=compute,utility, "
        "or add its folder to LD_LIBRARY_PATH",
    ),
    case(
        "cuda", "no torch", NVIDIA, {"build": None},
        "torch is not installed", f"Run `{CUDA_INSTALL}`",
    ),
    case(
        "cuda", "CPU torch", NVIDIA, {"build": "cpu"},
        "the installed torch 2.13.0+cpu was built without CUDA", f"Run `{CUDA_INSTALL}`",
    ),
    case(
        "cuda", "ROCm torch", NVIDIA, {"build": "rocm"},
        "the installed torch 2.13.0+rocm7.0 was built for ROCm (7.0.51831)",
        f"Run `{CUDA_INSTALL}`, or, for an AMD GPU, `pip install hwcore-hip`",
    ),
    case(
        "hip", "no driver", (), {},
        "no AMD driver is loaded (/sys/module/amdgpu is missing)",
        "Install the driver, so that `rocminfo` lists the GPU; "
        "in a virtual machine, pass the GPU through to it",
    ),
    case(
        "hip", "driver, no compute node", AMD[:1], {},
        "the AMD driver is loaded, but there is no device node /dev/kfd",
        "Install a driver with ROCm support (amdgpu-dkms), and restart",
    ),
    case(
        "hip", "driver, no GPU's node", AMD[:2], {},
        "the AMD driver is loaded, but there is no device node /dev/dri/renderD128",
        "Install a driver with ROCm support (amdgpu-dkms), and restart",
    ),
    case(
        "hip", "container without the device", (*AMD[:1], "run/.containerenv"), {},
        "the host has an AMD driver, but this container has no /dev/kfd",
        "Start it with `docker run --device /dev/kfd --device /dev/dri`",
    ),
    case(
        "hip", "no permission", AMD, {"denied": ("dev/kfd",)},
        "this user may not read and write /dev/kfd",
        "Run `sudo usermod -aG render,video $USER` and log in again; "
        "for a container, `docker run --group-add render`",
    ),
    case(
        "hip", "no permission for any GPU", AMD, {"denied": ("dev/dri/renderD128",)},
        "this user may not read and write /dev/dri/renderD128",
        "Run `sudo usermod -aG render,video $USER` and log in again; "
        "for a container, `docker run --group-add render`",
    ),
    case(
        "hip", "hidden from HIP", AMD, {"HIP_VISIBLE_DEVICES": "-1"},
        'HIP_VISIBLE_DEVICES="-1" hides every device',
        "Unset it, or name devices, such as HIP_VISIBLE_DEVICES=0",
    ),
    case(
        "hip", "hidden from ROCm", AMD, {"ROCR_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "0"},
        'ROCR_VISIBLE_DEVICES="" hides every device',
        "Unset it, or name devices, such as ROCR_VISIBLE_DEVICES=0",
    ),
    case(
        "hip", "hidden by CUDA's name", AMD, {"CUDA_VISIBLE_DEVICES": ""},
        'CUDA_VISIBLE_DEVICES="" hides every device',
        "Unset it, or name devices, such as CUDA_VISIBLE_DEVICES=0",
    ),
    case(
        "hip", "no library", AMD, {"libraries": False},
        "ROCm's library libamdhip64.so is not part of torch and cannot be loaded "
        "(libamdhip64.so: cannot open shared object file: No such file or directory)",
        "Install ROCm, or add its folder, such as /opt/rocm/lib, to LD_LIBRARY_PATH",
    ),
    case(
        "hip", "no torch", AMD, {"build": None},
        "torch is not installed", f"Run `{ROCM_INSTALL}`",
    ),
    case(
        "hip", "CPU torch", AMD, {"build": "cpu"},
        "the installed torch 2.13.0+cpu was built without ROCm", f"Run `{ROCM_INSTALL}`",
    ),
    case(
        "hip", "CUDA torch", AMD, {"build": "cuda, no local part"},
        "the installed torch 2.13.0+cu130 was built for CUDA (13.0)",
        f"Run `{ROCM_INSTALL}`, or, for an NVIDIA GPU, `pip install hwcore-cuda`",
    ),
]  # fmt: skip

FITTING = {"cuda": (NVIDIA, "cuda"), "hip": (AMD, "rocm")}


def answer(name, folder, files, **options):
    options = {"build": FITTING[name][1], **options}
    return GPUS[name].probe.availability(machine(folder, files, **options))


@pytest.mark.parametrize(("name", "files", "options", "reason", "fix"), CASES)
def test_what_is_missing_is_said_with_the_way_out(name, files, options, reason, fix, tmp_path):
    found = answer(name, tmp_path, files, **options)
    assert (found.ok, found.reason, found.fix) == (False, reason, fix)


@pytest.mark.parametrize(("name", "files", "options", "reason", "fix"), CASES)
def test_the_readme_has_the_very_text(name, files, options, reason, fix):
    readme = re.sub(r"\s+", " ", GPUS[name].readme)
    assert reason.partition(" (lib")[0] in readme
    assert fix in readme


@pytest.mark.parametrize("name", FITTING)
def test_where_all_is_there_it_is_available(name, tmp_path):
    assert answer(name, tmp_path, FITTING[name][0]).ok


@pytest.mark.parametrize(
    ("name", "variables"),
    [
        ("cuda", {"CUDA_VISIBLE_DEVICES": "1,-1"}),
        ("cuda", {"CUDA_VISIBLE_DEVICES": "GPU-8932f937"}),
        ("cuda", {"HIP_VISIBLE_DEVICES": ""}),
        ("hip", {"HIP_VISIBLE_DEVICES": "0", "CUDA_VISIBLE_DEVICES": ""}),
    ],
)
def test_a_variable_that_leaves_a_device_hides_nothing(name, variables, tmp_path):
    assert answer(name, tmp_path, FITTING[name][0], **variables).ok


@pytest.mark.parametrize(
    ("name", "denied", "other"),
    [
        ("cuda", "dev/nvidia0", "dev/nvidia1"),
        ("hip", "dev/dri/renderD128", "dev/dri/renderD129"),
    ],
)
def test_one_device_that_may_be_used_is_enough(name, denied, other, tmp_path):
    files = (*FITTING[name][0], other)
    assert answer(name, tmp_path, files, denied=(denied,)).ok


@pytest.mark.parametrize(
    ("name", "node"), [("cuda", "dev/dxg"), ("hip", "dev/dxg"), ("cuda", "dev/nvmap")]
)
def test_drivers_whose_nodes_have_other_names_will_do(name, node, tmp_path):
    """Windows' driver below Linux, and that of NVIDIA's own boards."""
    assert answer(name, tmp_path, (node,)).ok


@pytest.mark.parametrize("beside", ["site/torch/lib", "site/_rocm_sdk_core/lib"])
def test_rocms_library_may_come_with_torch(beside, tmp_path):
    files = (*AMD, f"{beside}/libamdhip64.so.7")
    assert answer("hip", tmp_path, files, libraries=False).ok


@pytest.mark.parametrize("name", FITTING)
def test_on_this_machine_it_answers_at_once_and_without_torch(name, site):
    code = f"""if True:
        import sys, time
        from hwcore_{name}.plugin import {GPUS[name].plugin.__name__} as Plugin
        began = time.perf_counter()
        plugin = Plugin()
        found = plugin.backend_info(), plugin.probe()
        print(time.perf_counter() - began < 1.0, "torch" in sys.modules)
    """
    assert site.run(code).output == ["True False"]


@pytest.mark.parametrize("name", FITTING)
def test_the_library_is_loaded_and_nothing_in_it_called(name, tmp_path):
    """So no context is made, and the process can still be forked."""

    class Library:
        def __getattr__(self, function):
            pytest.fail(f"{function} was called")

    loaded = []
    files, build = FITTING[name]
    made = machine(tmp_path, files, build=build)
    made = dataclasses.replace(made, load=lambda library: loaded.append(library) or Library())
    assert GPUS[name].probe.availability(made).ok
    assert loaded == [{"cuda": "libcuda.so.1", "hip": "libamdhip64.so.7"}[name]]
