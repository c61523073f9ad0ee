"""Which backends are installed: the entry points of the group ``hwcore.backends``.

Nothing here imports torch, and nothing imports a plugin before it is asked for.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import logging
import os
import pathlib
import re
from typing import TYPE_CHECKING, Any

from hwcore._env import DISABLE_PLUGINS, disabled_plugins
from hwcore._version import __version__
from hwcore.errors import PluginLoadError
from hwcore.hookspecs import API_VERSION

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "BUILTIN",
    "GROUP",
    "NEWER_CONTRACT",
    "Origin",
    "declared",
    "enabled",
    "installed",
    "load",
]

_log = logging.getLogger("hwcore")

GROUP = "hwcore.backends"
NAMELESS = "a distribution without METADATA"
UNREADABLE = "(unreadable)"
NEWER_CONTRACT = (
    f"this hwcore's contract is {API_VERSION}, and if the plugin was written for a newer one, "
    "`pip install -U hwcore` helps"
)
"""Said where a plugin uses what this hwcore lacks: its own version cannot be asked any more."""

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
    found = declared(GROUP)
    return [BUILTIN, *sorted(found, key=lambda origin: (origin.name, origin.distribution))]


def enabled(origins: Iterable[Origin]) -> list[Origin]:
    """Return those of ``origins`` that ``HWCORE_DISABLE_PLUGINS`` does not leave out."""
    disabled = disabled_plugins()
    return [o for o in origins if not any(o.matches(name) for name in disabled)]


def declared(group: str) -> list[Origin]:
    """Return what installed distributions declare in a group of entry points.

    Metadata that cannot be read is passed over where it has nothing to do with the group, and
    otherwise stands as one entry that cannot be loaded: the leftovers of a plugin are an error of
    that plugin, not of every program. Where nobody can tell, it is passed over with a warning.
    """
    # Imported here: the probe's child loads plugins and never lists them.
    from importlib_metadata import distributions

    found: dict[str, list[Origin]] = {}
    for dist in distributions():
        try:
            text = dist.read_text("entry_points.txt") or ""
        except (OSError, UnicodeError):
            _log_unreadable(_location(dist))
            continue
        if group not in text:
            continue
        name = _field(dist, "name")
        # Nameless ones are told apart by what they declare.
        key = text if name is None else _normalized(name)
        name = name or NAMELESS
        version = _field(dist, "version") or "unknown version"
        try:
            entries = [(entry.name, entry.value) for entry in dist.entry_points.select(group=group)]
        except Exception:  # noqa: BLE001 - importlib fails in several ways on such a file
            entries = [(_normalized(name), UNREADABLE)]
        # The first on the path is the one that Python imports.
        location = _location(dist)
        found.setdefault(key, [Origin(*entry, name, version, location) for entry in entries])
    return [origin for origins in found.values() for origin in origins]


@functools.cache  # a process reads all metadata several times
def _log_unreadable(location: str) -> None:
    _log.warning("entry_points.txt of a distribution in %s cannot be read", location)


# Any: what importlib_metadata says that it lists differs between the versions allowed.
def _location(dist: Any) -> str:
    return os.path.abspath(str(dist.locate_file("")))  # sys.path may be relative


def _field(dist: Any, field: str) -> str | None:
    """Return a distribution's ``name`` or ``version``, or None where its METADATA gives none."""
    try:
        value: str | None = getattr(dist, field)
    except Exception:  # noqa: BLE001 - a folder without METADATA, left over or half written
        return None
    return value or None


def load(origin: Origin) -> Any:
    """Import what an entry point names and return the plugin: a module or an object.

    A class is instantiated without arguments.

    Raises
    ------
    PluginLoadError
        If the module or the attribute is missing, or raises while it is imported or created.
    """
    if origin.value == UNREADABLE:
        what = f"entry_points.txt of {origin.distribution} in {origin.location} cannot be read"
        raise _load_error(origin, what)
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
    except (Exception, SystemExit) as error:
        what = f"importing `{module_name}` raised {error!r}"
        if isinstance(error, ImportError) and str(error.name).partition(".")[0] == "hwcore":
            what += f"; {NEWER_CONTRACT}"
        raise _load_error(origin, what) from error
    try:
        for part in filter(None, attribute.strip().split(".")):
            plugin = getattr(plugin, part)
    except AttributeError as error:
        what = f"`{module_name}` has no attribute `{attribute}`"
        raise _load_error(origin, what) from error
    if inspect.isclass(plugin):
        try:
            return plugin()
        except (Exception, SystemExit) as error:
            raise _load_error(origin, f"creating `{attribute}()` raised {error!r}") from error
    return plugin


def _load_error(origin: Origin, what: str) -> PluginLoadError:
    message = f"{origin}: entry point `{origin.value}` cannot be loaded: {what}. {origin.way_past}."
    return PluginLoadError(message, origin.name)


def _normalized(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()
