"""Which torch is installed, and for what it was built, found out without importing it."""

from __future__ import annotations

import ast
import dataclasses
import importlib.metadata
import pathlib
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["TorchBuild", "installed"]


@dataclasses.dataclass(frozen=True)
class TorchBuild:
    """An installed torch.

    Attributes
    ----------
    version : str
        With its local part, such as ``"2.13.0+cpu"``, where metadata or ``torch/version.py`` has
        one: a package index may leave it out of the metadata.
    toolkits : Mapping of str to str
        What ``torch/version.py`` assigns a text to: toolkit names to versions, among others. None
        where the file is missing or cannot be read.
    folder : Path
        The package's folder.
    """

    version: str
    toolkits: Mapping[str, str] | None
    folder: pathlib.Path

    @property
    def local(self) -> str:
        """The version's local part, such as ``"cpu"``; empty where there is none."""
        return self.version.partition("+")[2]

    @property
    def release(self) -> str:
        """The version without its local part, such as ``"2.13.0"``."""
        return self.version.partition("+")[0]

    def toolkit(self, name: str, label: str) -> str:
        """Return the version of a toolkit that it was built with; empty where it was not.

        Parameters
        ----------
        name : str
            As ``torch/version.py`` has it, which says it of every build.
        label : str
            How the version's local part begins in builds with it: looked at where the file cannot
            be read.
        """
        if self.toolkits is not None:
            return self.toolkits.get(name, "")
        return self.local if self.local.startswith(label) else ""


def installed(path: Sequence[str] | None = None) -> TorchBuild | None:
    """Return the torch that ``import torch`` would find, or None where there is none.

    Parameters
    ----------
    path : sequence of str, optional
        Folders to look in; default: ``sys.path``.

    Notes
    -----
    Reads two files; imports and runs nothing of torch. A torch in a source tree, without metadata,
    counts as well.
    """
    path = [entry or "." for entry in (sys.path if path is None else path)]
    folders = [pathlib.Path(entry, "torch") for entry in path]
    folder = next((f for f in folders if (f / "__init__.py").is_file()), None)
    if folder is None:
        return None
    assigned = _assigned_texts(folder / "version.py")
    version = _metadata_version(str(folder.parent))
    of_the_file = (assigned or {}).get("__version__", "")
    if "+" not in version and of_the_file:
        version = of_the_file
    return TorchBuild(version, assigned, folder)


def _metadata_version(folder: str) -> str:
    for distribution in importlib.metadata.distributions(name="torch", path=[folder]):
        try:
            version: str | None = distribution.version
        except Exception:  # noqa: BLE001 - METADATA that is missing or cannot be read
            continue
        if version:
            return version
    return ""


def _assigned_texts(file: pathlib.Path) -> dict[str, str] | None:
    """Return the names that a Python file assigns a plain text to, without running it."""
    try:
        module = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return None
    texts = {}
    for statement in module.body:
        if isinstance(statement, ast.Assign):
            targets: list[ast.expr] = statement.targets
        elif isinstance(statement, ast.AnnAssign):
            targets = [statement.target]
        else:
            continue
        value = statement.value
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            texts.update({t.id: value.value for t in targets if isinstance(t, ast.Name)})
    return texts
