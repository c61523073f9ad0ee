"""Plugins made on the spot: the CPU under another name, with some hooks exchanged."""

from __future__ import annotations

import pytest

import hwcore
from hwcore.cpu import CpuPlugin
from hwcore.errors import PluginReturnError
from hwcore.types import Availability, BackendInfo

INFO = {
    "name": "acme",
    "device_type": "cpu",
    "vendor": "Test",
    "api_version": "1.0",
    "quirks": frozenset({"unindexed_device"}),
}


class Acme(CpuPlugin):
    @hwcore.hookimpl
    def backend_info(self):
        return BackendInfo(**INFO)


class Minimal:
    """As few hooks as a plugin may have: for the rest there are the defaults."""

    @hwcore.hookimpl
    def backend_info(self):
        return BackendInfo(**INFO)

    @hwcore.hookimpl
    def probe(self):
        return Availability(ok=True)

    @hwcore.hookimpl
    def is_initialized(self):
        return False


def backend(**hooks):
    """Bind a plugin with some hooks replaced: by a function, or by what one answers."""
    namespace = {}
    for hook, value in hooks.items():
        function = value if callable(value) or hasattr(value, "__func__") else answers(value)
        marked = hasattr(function, "hwcore_impl") or hasattr(function, "__func__")
        namespace[hook] = function if marked else hwcore.hookimpl(function)
    return hwcore.Backend(type("Acme", (Acme,), namespace)())


def live_backend(**hooks):
    """Bind one whose device is in use, so that it is checked at once."""
    return backend(**{"is_initialized": True, **hooks})


def answers(value):
    """Return an implementation that answers with a value."""
    return lambda self: value


def refused(hook, got, *parts, **hooks):
    """Assert that a live backend with these hooks is refused for ``hook``, and how."""
    with pytest.raises(PluginReturnError) as caught:
        live_backend(**hooks)
    message = str(caught.value)
    assert message.startswith(f"plugin `acme` (Acme passed as an object): {hook}() ")
    for part in (got, *parts, " Fix the plugin."):
        assert part in message
    assert caught.value.plugin == "acme"
    assert caught.value.hook == hook
