"""Compile the simulated device at its first use, once for all processes, and load it.

The library is bound to one torch and one Python, so it is built where it is used and kept under
``$HWCORE_SIM_CACHE/<torch>-<python>-<source hash>/`` (default ``~/.cache/hwcore/sim``).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.machinery
import importlib.util
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from typing import TYPE_CHECKING, Any

import torch

from hwcore.errors import CapabilityError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["CACHE", "ensure", "load"]

CACHE = "HWCORE_SIM_CACHE"
NAME = "_hwcore_sim"
SOURCES = pathlib.Path(__file__).parent / "csrc"
FLAGS = ["-O1", "-std=c++20"]
# What is compiled together. Most of the time goes into torch's headers, once for each unit.
UNITS = (
    ("fallback", "shapes", "operator_info"),
    ("tensors", "recurrent", "autocast"),
    ("bindings", "runtime"),
    ("streams", "graph", "guard", "hooks", "allocator", "pinned"),
)


def ensure() -> pathlib.Path:
    """Return the device's library, built if this torch and Python have none yet.

    Raises
    ------
    CapabilityError
        If it has to be built and there is no C++ compiler, no ninja or no place to put it, or if
        the compiler fails.
    """
    folder = _cache() / _key()
    built = folder / f"{NAME}.so"
    if not built.exists():
        with _locked(folder.parent):
            if not built.exists():  # by another process, while this one waited
                _build(folder)
    return built


def load(built: pathlib.Path) -> Any:
    """Load the library, which registers the device with torch."""
    loader = importlib.machinery.ExtensionFileLoader(NAME, str(built))
    spec = importlib.util.spec_from_file_location(NAME, built, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def _key() -> str:
    """Return what the library depends on: torch, Python's binary interface, the sources."""
    digest = hashlib.sha256(repr((FLAGS, UNITS)).encode())
    for file in sorted(SOURCES.iterdir()):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    abi = sysconfig.get_config_var("SOABI") or sys.implementation.cache_tag
    return f"{torch.__version__}-{abi}-{digest.hexdigest()[:16]}"


def _cache() -> pathlib.Path:
    """Return the folder of all builds: the user's choice, or the first that can be written to."""
    if named := os.environ.get(CACHE):
        folder = pathlib.Path(named).expanduser().absolute()
        if (problem := _unusable(folder)) is None:
            return folder
        message = (
            f"hwcore_sim: {CACHE} got {named!r}, which cannot be written to ({problem}); expected "
            f"a folder for the built device. Name another one."
        )
        raise CapabilityError(message)
    home = pathlib.Path(os.path.expanduser("~/.cache/hwcore/sim"))
    if (problem := _unusable(home)) is None:
        return home
    # Per user, and only if it is theirs: anybody may create a folder there first.
    shared = pathlib.Path(tempfile.gettempdir()) / f"hwcore-sim-{os.getuid()}"
    if (other := _unusable(shared)) is None and shared.stat().st_uid == os.getuid():
        if not any(shared.iterdir()):
            _say(f"{home} cannot be written to ({problem}): building in {shared} instead")
        return shared
    message = (
        f"hwcore_sim: the build cache got neither {home} ({problem}) nor {shared} ({other}); "
        f"expected a folder that can be written to. Set {CACHE} to one."
    )
    raise CapabilityError(message)


def _unusable(folder: pathlib.Path) -> OSError | None:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return error
    return None


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[None]:
    """Let one process build at a time. The lock dies with its process, however that dies."""
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("waiting for another process that is building the simulated device")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(folder: pathlib.Path) -> None:
    """Build beside the final place and rename: what is there is whole."""
    for left in folder.parent.glob("building-*"):  # by processes that died; we hold the lock
        shutil.rmtree(left, ignore_errors=True)
    for tool, fix in (
        (shlex.split(os.environ.get("CXX") or "c++")[0], "Install g++ or clang, or set CXX"),
        ("ninja", "Run `pip install ninja`"),
    ):
        if shutil.which(tool, path=_path()) is None:
            message = (
                f"hwcore_sim: building the simulated device got no `{tool}` on PATH; expected it "
                f"there, for the device is compiled once on each machine. {fix}."
            )
            raise CapabilityError(message)
    _say(f"building the simulated device, about 30 s, once for torch {torch.__version__} ...")
    started = time.monotonic()
    temporary = pathlib.Path(tempfile.mkdtemp(prefix="building-", dir=folder.parent))
    try:
        _compile(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _say(f"built in {time.monotonic() - started:.0f} s, kept in {folder}")


def _compile(folder: pathlib.Path) -> None:
    """Run torch's own builder, in a process of its own: it also loads what it builds."""
    sources = []
    for unit in UNITS:
        source = folder / f"unit_{unit[0]}.cpp"
        source.write_text("".join(f'#include "{SOURCES / part}.cpp"\n' for part in unit))
        sources.append(str(source))
    code = (
        "from torch.utils.cpp_extension import load; "
        f"load({NAME!r}, {sources!r}, build_directory={str(folder)!r}, extra_cflags={FLAGS!r})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PATH": _path(), "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        message = (
            f"hwcore_sim: compiling the simulated device got exit status {done.returncode}; "
            f"expected this torch ({torch.__version__}) and compiler to build it. "
            f"Read the compiler's output:\n{done.stderr.strip()}"
        )
        raise CapabilityError(message)


def _path() -> str:
    """Return PATH with the place where pip put ninja, which is there only in an active venv."""
    before = os.environ.get("PATH", "")
    if importlib.util.find_spec("ninja") is None:
        return before
    ninja = importlib.import_module("ninja")
    return os.pathsep.join([ninja.BIN_DIR, before])


def _say(text: str) -> None:
    print(f"hwcore_sim: {text}", file=sys.stderr, flush=True)
