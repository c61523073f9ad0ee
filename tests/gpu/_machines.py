"""Machines with and without a GPU, as far as a probe looks."""

from __future__ import annotations

import functools

from hwcore import torch_build
from hwcore.machine import Machine

NVIDIA = ("proc/driver/nvidia/version", "dev/nvidiactl", "dev/nvidia0", "dev/nvidia1")
AMD = ("sys/module/amdgpu", "dev/kfd", "dev/dri/renderD128", "dev/dri/card0")

BUILDS = {
    # name: the metadata's version, and what torch/version.py says
    "cpu": ("2.13.0+cpu", "__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\nhip = None\n"),
    "cuda": ("2.13.0+cu130", "__version__ = '2.13.0+cu130'\ncuda: Optional[str] = '13.0'\n"),
    # The one on PyPI: a version without a local part.
    "cuda, no local part": ("2.13.0", "__version__ = '2.13.0+cu130'\ncuda = '13.0'\nhip = None\n"),
    "cuda, no version.py": ("2.13.0+cu130", None),
    "rocm": ("2.13.0+rocm7.0", "cuda: Optional[str] = None\nhip: Optional[str] = '7.0.51831'\n"),
    "rocm, no local part": ("2.13.0", "cuda = None\nhip: Optional[str] = '7.0.51831'\n"),
    "rocm, no version.py": ("2.13.0+rocm7.0", None),
    "a vendor's own": ("2.9.0a0+50eac811a6.nv25.09", "cuda: Optional[str] = '13.0'\nhip = None\n"),
}


def machine(folder, paths=(), *, build=None, libraries=True, denied=(), **environ):
    """A machine with these files; ``libraries``: any can be loaded; ``denied`` may not be used."""

    def load(name):
        if not libraries:
            message = f"{name}: cannot open shared object file: No such file or directory"
            raise OSError(message)

    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()
    site = folder / "site"
    if build is not None:
        install_torch(site, *BUILDS[build])
    return Machine(
        root=folder,
        environ=environ,
        load=load,
        may_use=lambda node: str(node.relative_to(folder)) not in denied,
        torch=functools.partial(torch_build.installed, [str(site)]),
    )


def install_torch(site, version, version_file):
    """Install a torch that cannot be imported: a probe must not try."""
    (site / "torch").mkdir(parents=True, exist_ok=True)
    (site / "torch/__init__.py").write_text("raise RuntimeError('imported')\n")
    if version_file is not None:
        (site / "torch/version.py").write_text(version_file)
    info = site / f"torch-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
