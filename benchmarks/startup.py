"""What ``import hwcore`` and selection among many installed plugins cost, in whole processes."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import tempfile
import time

from hwcore.cli.measurement import Row, interleaved

PLUGINS = 20

_SELECT = (
    "import time; start = time.perf_counter(); import hwcore.activation, torch, hwcore.backend;"
    "import hwcore.defaults, hwcore.cpu; start = time.perf_counter();"
    "hwcore.current_backend(); print(time.perf_counter() - start)"
)
_PLUGIN = """
import hwcore
from hwcore.types import Availability, BackendInfo

@hwcore.hookimpl
def backend_info():
    return BackendInfo(name="{name}", device_type="cpu", vendor="Test", api_version="1.0")

@hwcore.hookimpl
def probe():
    return Availability(ok=False, reason="there is no such device", fix="Buy one")
"""


def run(quick: bool = False) -> list[Row]:
    """Return the rows of this subject."""
    rounds = 3 if quick else 15
    with tempfile.TemporaryDirectory() as empty, tempfile.TemporaryDirectory() as full:
        for number in range(PLUGINS):
            _install(pathlib.Path(full), f"fake{number}")
        medians = interleaved(
            {
                "python": lambda: _process("pass", empty),
                "import": lambda: _process("import hwcore", empty),
                "none": lambda: _printed(_SELECT, empty),
                "many": lambda: _printed(_SELECT, full),
            },
            rounds,
        )
    milliseconds = {name: seconds * 1e3 for name, seconds in medians.items()}
    imported = milliseconds["import"] - milliseconds["python"]
    added = milliseconds["many"] - milliseconds["none"]
    return [
        Row(
            "import hwcore, over an empty Python process",
            imported,
            "ms",
            60,
            True,
            f"{milliseconds['import']:.0f} ms, empty {milliseconds['python']:.0f} ms",
        ),
        Row(
            f"selection among {PLUGINS} plugins, over none (torch imported before)",
            added,
            "ms",
            150,
            True,
            f"{milliseconds['many']:.0f} ms, none {milliseconds['none']:.0f} ms",
        ),
    ]


def _install(folder: pathlib.Path, name: str) -> None:
    (folder / f"hwcore_{name}.py").write_text(_PLUGIN.format(name=name))
    info = folder / f"hwcore_{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: hwcore-{name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[hwcore.backends]\n{name} = hwcore_{name}\n")


def _process(code: str, path: str) -> float:
    start = time.perf_counter()
    _run(code, path)
    return time.perf_counter() - start


def _printed(code: str, path: str) -> float:
    return float(_run(code, path))


def _run(code: str, path: str) -> str:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("HWCORE_")}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**inherited, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=True,
    ).stdout
