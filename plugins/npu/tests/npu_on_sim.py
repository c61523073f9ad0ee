"""The plugin on the simulated device under the name `npu`, with a torch_npu that is faked."""

from __future__ import annotations

import functools
import pathlib
import sys
import tempfile
from importlib import metadata

import hwcore

HERE = pathlib.Path(__file__).parent


def install_torch_npu(site, version=None, code="import fake_torch_npu as f; f.install()"):
    """Put a distribution `torch_npu` into a folder, by default one that fits torch."""
    version = version or metadata.version("torch").partition("+")[0]
    info = pathlib.Path(site) / f"torch_npu-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch_npu\nVersion: {version}\n")
    (info / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    package = pathlib.Path(site) / "torch_npu"
    package.mkdir()
    (package / "__init__.py").write_text(f"{code}\ndef _autoload(): pass\n")


@functools.cache
def backend():
    """Return the backend, one a process."""
    from hwcore_npu.plugin import NpuPlugin

    site = tempfile.mkdtemp()
    install_torch_npu(site)
    sys.path[:0] = [str(HERE), site]
    return hwcore.Backend(NpuPlugin())
