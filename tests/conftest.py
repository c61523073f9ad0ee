"""Fixtures that every test may use. One process runs one backend: ``pytest --backend NAME``."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING

import pytest

import hwcore
from hwcore import activation, discovery

if TYPE_CHECKING:
    import pathlib


@pytest.fixture(scope="session")
def hw(request):
    """The backend of this run, selected for the whole process."""
    return hwcore.use(request.config.getoption("backend"))


@pytest.fixture(scope="session", autouse=True)
def _one_backend_a_process(request):
    """torch has room for one accelerator: no test may have loaded another backend's device."""
    yield
    chosen = request.config.getoption("backend")
    others = {origin.name for origin in discovery.installed()} - {chosen, discovery.BUILTIN.name}
    loaded = others & activation._process.loaded.keys()
    assert not loaded, f"a test loaded {loaded} in a run for {chosen}"
    if chosen != "sim":
        assert "hwcore_sim.device" not in sys.modules, f"a test used it in a run for {chosen}"


def pytest_generate_tests(metafunc):
    """`in_any_order`: on a device that simulates them, once for each order of work."""
    if "in_any_order" in metafunc.fixturenames:
        simulated = metafunc.config.getoption("backend") == "sim"
        orders = ["lazy", "eager", "random:1", "random:2", "random:3"] if simulated else ["its own"]
        metafunc.parametrize("in_any_order", orders, indirect=True)


@pytest.fixture(scope="session")
def once(request):
    """For tests of the host alone, or of children that choose their backends: a run for cpu's."""
    if request.config.getoption("backend") != "cpu":
        pytest.skip("of the host alone, or its processes choose their backends; see a run for cpu")


def pytest_collection_modifyitems(items):
    """Mark what asks for `once`, so that make can run it in a process of its own."""
    for item in items:
        if "once" in item.fixturenames:
            item.add_marker("children")


@pytest.fixture
def in_any_order(request):
    if request.param == "its own":
        yield
        return
    from hwcore_sim import device

    with device.drain_policy(request.param):
        yield


@pytest.fixture
def late(hw):
    """Work runs as late as it may, where that can be had."""
    if hw.info.name != "sim":
        yield
        return
    from hwcore_sim import device

    with device.drain_policy("lazy"):
        yield


@pytest.fixture
def watched(hw):
    """Fails a test in which streams race."""
    from hwcore.testing.sanitizer import Sanitizer

    with Sanitizer(hw):
        yield


@dataclasses.dataclass(frozen=True)
class Finished:
    """A finished Python process; ``error`` is the last line of its traceback."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def error(self) -> str:
        return self.stderr.strip().splitlines()[-1] if self.stderr.strip() else ""

    @property
    def output(self) -> list[str]:
        """The lines printed by a process that ended well and said nothing else."""
        assert self.returncode == 0, self.stderr
        assert self.stderr == ""
        return self.stdout.splitlines()

    def raised(self, kind: type[Exception], builtin: type[Exception], *parts: str) -> None:
        """Assert that the process died of ``kind``, and that its message holds every part."""
        assert issubclass(kind, hwcore.HwcoreError)
        assert issubclass(kind, builtin)
        assert self.returncode == 1, self.stdout + self.stderr
        assert self.error.startswith(f"{kind.__module__}.{kind.__qualname__}: "), self.stderr
        for part in parts:
            assert part in self.error, f"{part!r} is not in {self.error!r}"


class PluginSite:
    """A folder of installed distributions that processes started from here see.

    Each is what pip leaves behind: a module, and a ``dist-info`` folder with entry points.
    """

    GOOD = """
        import hwcore
        from hwcore.cpu import CpuPlugin
        from hwcore.types import *

        class Plugin(CpuPlugin):
            '''An accelerator for tests: the CPU under another name.'''

            info = dict(
                name="{name}", device_type="cpu", vendor="Test", api_version="1.0",
                quirks=frozenset({{"unindexed_device"}}),
            )

            @hwcore.hookimpl
            def backend_info(self):
                return BackendInfo(**self.info)
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self._hide_installed_plugins()

    def _hide_installed_plugins(self) -> None:
        """Put an empty distribution of the same name before each plugin of this environment."""
        for origin in discovery.installed():
            if origin != discovery.BUILTIN:
                info = self.folder / f"{origin.distribution.replace('-', '_')}-0.dist-info"
                info.mkdir(parents=True)
                (info / "METADATA").write_text(
                    f"Metadata-Version: 2.1\nName: {origin.distribution}\nVersion: 0\n"
                )
                (info / "entry_points.txt").write_text(f"[{discovery.GROUP}]\n")

    def add(
        self,
        name: str,
        body: str = "",
        *,
        module: str | None = None,
        distribution: str | None = None,
        version: str = "1.0",
        value: str | None = None,
        group: str = "hwcore.backends",
        good: bool = True,
    ) -> None:
        """Install a plugin.

        With ``good``, ``body`` goes on inside the class of a working plugin; without, it is the
        whole module. ``module=""`` installs no module: a stale distribution.
        """
        distribution = distribution or f"hwcore-{name}"
        module_name = distribution.replace("-", "_")
        if module is None:
            source = textwrap.dedent(self.GOOD).format(name=name) if good else ""
            source += textwrap.indent(textwrap.dedent(body), "    " if good else "")
            (self.folder / f"{module_name}.py").write_text(source)
        info = self.folder / f"{module_name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
        )
        value = value or (f"{module_name}:Plugin" if good else module_name)
        (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {value}\n")
        (info / "RECORD").write_text("")
        (info / "INSTALLER").write_text("pip\n")

    def run(self, code: str, timeout_s: float = 120, **variables: str) -> Finished:
        """Run Python code in a process of its own that sees the installed plugins."""
        return self.execute("-c", textwrap.dedent(code), timeout_s=timeout_s, **variables)

    def execute(self, *arguments: str, timeout_s: float = 120, **variables: str) -> Finished:
        """Run ``python`` with arguments, likewise."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("HWCORE_")}
        done = subprocess.run(
            [sys.executable, *arguments],
            env={**inherited, "PYTHONPATH": str(self.folder), **variables},
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        return Finished(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def refused(site):
    """Assert that selection names the installed plugin `acme` 3.1 as broken, and the way past."""

    def check(kind, builtin, *parts):
        code = "import hwcore; print(hwcore.current_backend())"
        done = site.run(code, timeout_s=60)
        done.raised(kind, builtin, "plugin `acme` (hwcore-acme 3.1): ", *parts)
        assert done.error.endswith("or set HWCORE_DISABLE_PLUGINS=acme to leave it out.")
        assert done.stdout == ""
        assert site.run(
            "import hwcore.selection as s; print(s.plan(None, '').to_probe)",
            HWCORE_DISABLE_PLUGINS="acme",
        ).output == ["()"]

    return check


@pytest.fixture
def site(once, processes):
    """An empty folder to install plugins into, and to run processes that see these alone."""
    return processes


@pytest.fixture
def processes(tmp_path):
    """The same for processes that load the backend of this run."""
    folder = tmp_path / "site"
    folder.mkdir()
    return PluginSite(folder)
