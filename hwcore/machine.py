"""What a probe looks at: files, variables and libraries of a machine, or others in their place."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import pathlib
from typing import TYPE_CHECKING

from hwcore import torch_build
from hwcore.types import Availability

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from hwcore.torch_build import TorchBuild

__all__ = ["Machine", "unavailable"]


def _may_use(node: pathlib.Path) -> bool:
    # Opened, some devices take seconds to wake up.
    return os.access(node, os.R_OK | os.W_OK)


@dataclasses.dataclass(frozen=True)
class Machine:
    """A machine: the one that runs this by default, or what a test makes of files and answers.

    Attributes
    ----------
    root : Path
        What paths are looked up below.
    environ : Mapping of str to str
    load : callable
        Loads a shared library by name; raises OSError where it cannot.
    may_use : callable
        Says whether this process may read and write a device node.
    torch : callable
        Returns the installed torch, or None; see :func:`hwcore.torch_build.installed`.
    """

    root: pathlib.Path = pathlib.Path("/")
    environ: Mapping[str, str] = dataclasses.field(default_factory=lambda: os.environ)
    load: Callable[[str], object] = ctypes.CDLL
    may_use: Callable[[pathlib.Path], bool] = _may_use
    torch: Callable[[], TorchBuild | None] = torch_build.installed

    def has(self, path: str) -> bool:
        """Say whether a file is there, such as ``"sys/module/driver"``."""
        return (self.root / path).exists()

    def text(self, path: str) -> str:
        """Return what a file says; nothing where there is none, or this user may not read it."""
        try:
            return (self.root / path).read_text()
        except OSError:
            return ""

    def nodes(self, pattern: str) -> list[pathlib.Path]:
        """Return the device nodes of a pattern, such as ``"dri/renderD*"``, sorted."""
        return sorted((self.root / "dev").glob(pattern))

    def shown(self, node: pathlib.Path) -> str:
        """Return a node's path as the user knows it."""
        return f"/{node.relative_to(self.root)}"

    @property
    def in_container(self) -> bool:
        """Whether this process runs in a container."""
        marks = (".dockerenv", "run/.containerenv")
        return any(map(self.has, marks)) or "KUBERNETES_SERVICE_HOST" in self.environ

    def hidden_by(self, variables: tuple[str, ...]) -> Availability | None:
        """Name the first of some visible-devices variables that hides every device.

        Runtimes read such a list up to the first entry that names no device.
        """
        for name in variables:
            value = self.environ.get(name)
            if value is not None and value.partition(",")[0].strip() in ("", "-1"):
                fix = f"Unset it, or name devices, such as {name}=0"
                return unavailable(f'{name}="{value}" hides every device', fix)
        return None


def unavailable(reason: str, fix: str) -> Availability:
    """Return a probe's answer where something is missing."""
    return Availability(ok=False, reason=reason, fix=fix)
