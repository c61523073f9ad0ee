"""Which backends are installed: the entry points of the group ``hwcore.backends``.

Nothing here imports torch, and nothing imports a plugin before it is asked for.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
import pathlib
import re
from typing import Any

from hwcore._env import DISABLE_PLUGINS
from hwcore._version import __version__
from hwcore.errors import PluginLoadError

__all__ = ["BUILTIN", "GROUP", "Origin", "installed", "load"]

GROUP = "hwcore.backends"

in_probe = False
"""True in the child process that probes plugins: nothing may be selected or loaded there."""


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a backend comes from.

    Attributes
    ----------
    name : str
        Its entry point's name, which is the backend's.
    value : str
        What the entry point names: ``"module"`` or ``"module:attribute"``.
    distribution, version : str
        The installed distribution that declares it.
    location : str
        The folder the distribution is installed in.
    """

    name: str
    value: str
    distribution: str
    version: str
    location: str

    def __str__(self) -> str:
        return f"plugin `{self.name}` ({self.distribution} {self.version})"

    @property
    def way_past(self) -> str:
        """The sentence that ends an error about this plugin."""
        if not self.location:  # passed as an object: there is nothing to uninstall
            return "Fix the plugin"
        return (
            f"Fix, upgrade or uninstall {self.distribution}, or set "
            f"{DISABLE_PLUGINS}={self.name} to leave it out"
        )

    def matches(self, name: str) -> bool:
        """Say whether ``name`` is this backend's name or its distribution's."""
        return name == self.name or _normalized(name) == _normalized(self.distribution)


BUILTIN = Origin(
    name="cpu",
    value="hwcore.cpu:CpuPlugin",
    distribution="hwcore",
    version=__version__,
    location=str(pathlib.Path(__file__).parent.parent),
)
"""The one backend that is part of the core."""


def installed() -> list[Origin]:
    """Return every backend that is installed, the built-in one first, then by name."""
    # Imported here: the probe's child loads plugins and never lists them.
    from importlib_metadata import entry_points

    found = []
    for entry in entry_points(group=GROUP):
        dist = entry.dist
        assert dist is not None, "entry points read from the environment carry their distribution"
        found.append(
            Origin(
                name=entry.name,
                value=entry.value,
                distribution=dist.name,
                version=dist.version or "unknown version",
                location=os.path.abspath(str(dist.locate_file(""))),  # sys.path may be relative
            )
        )
    return [BUILTIN, *sorted(found, key=lambda origin: (origin.name, origin.distribution))]


def load(origin: Origin) -> Any:
    """Import what an entry point names and return the plugin: a module or an object.

    A class is instantiated without arguments.

    Raises
    ------
    PluginLoadError
        If the module or the attribute is missing, or raises while it is imported or created.
    """
    module_name, _, attribute = origin.value.partition(":")
    try:
        plugin: Any = importlib.import_module(module_name.strip())
    except ModuleNotFoundError as error:
        if error.name != module_name and not module_name.startswith(f"{error.name}."):
            raise _load_error(origin, f"importing `{module_name}` raised {error!r}") from error
        what = (
            f"its module `{module_name}` is not there, though {origin.distribution} is "
            f"registered in {origin.location}; the installation is stale or broken"
        )
        raise _load_error(origin, what) from error
    except Exception as error:
        raise _load_error(origin, f"importing `{module_name}` raised {error!r}") from error
    try:
        for part in filter(None, attribute.strip().split(".")):
            plugin = getattr(plugin, part)
    except AttributeError as error:
        what = f"`{module_name}` has no attribute `{attribute}`"
        raise _load_error(origin, what) from error
    if inspect.isclass(plugin):
        try:
            return plugin()
        except Exception as error:
            raise _load_error(origin, f"creating `{attribute}()` raised {error!r}") from error
    return plugin


def _load_error(origin: Origin, what: str) -> PluginLoadError:
    message = f"{origin}: entry point `{origin.value}` cannot be loaded: {what}. {origin.way_past}."
    return PluginLoadError(message, origin.name)


def _normalized(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()
