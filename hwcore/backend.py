"""Backend: one plugin's hooks, resolved once to plain attributes."""

from __future__ import annotations

import threading
import weakref
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pluggy

from hwcore import binding
from hwcore.discovery import Origin
from hwcore.errors import ArgumentValueError, PluginDefinitionError, SetupError, describe
from hwcore.hookspecs import HOOKS, PROJECT, HookSpecs
from hwcore.validation import DEVICE_HOOKS, Validator

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from hwcore.types import BackendInfo

    _Hooks = HookSpecs
else:
    # The hooks are instance attributes; type checkers read their signatures off the contract.
    _Hooks = object

__all__ = ["Backend", "backends_of"]

_made: weakref.WeakSet[Backend] = weakref.WeakSet()


def backends_of(device_type: str) -> list[Backend]:
    """Return the backends of a device type that this process has, selected or not."""
    return [backend for backend in list(_made) if backend.info.device_type == device_type]


class Backend(_Hooks):
    """A device as hwcore's core sees it. Every hook of the contract is a method of this object.

    Get the process's own from :func:`hwcore.current_backend`, another from
    :func:`hwcore.load_backend`. Creating one runs the plugin's ``setup()`` and checks what its
    hooks return. Checks that would create a device context run there only if one is live;
    otherwise at the first call of a hook that needs one.

    Parameters
    ----------
    plugin : object
        A module or object with functions marked :data:`hwcore.hookimpl`.
    origin : Origin, optional
        The entry point that the plugin came from, for messages.

    Attributes
    ----------
    info : BackendInfo
        The plugin's checked ``backend_info()``.
    origin : Origin
        Where the plugin comes from.

    Raises
    ------
    PluginError
        If the plugin breaks the contract; the subclass and the message say how.
    """

    info: BackendInfo
    origin: Origin

    def __init__(self, plugin: object, origin: Origin | None = None) -> None:
        functions = binding.hook_functions(plugin, origin or _nameless(plugin))
        self.origin = origin or _origin_of(plugin, functions)
        if "backend_info" in functions:
            # Before the other checks: a plugin for a newer contract may well have newer hooks.
            self.info = Validator(self.origin, functions).info()
        binding.check_definitions(plugin, functions, self.origin)
        self._setup(functions.get("setup"))
        # Imported only now: it imports torch, and setup may decide how torch starts.
        from hwcore.defaults import Defaults

        defaults = Defaults(self.info)
        self._lock = threading.RLock()
        self._checking = False
        self._plugin_hooks = frozenset(functions)
        self._functions = {
            hook: binding.bind(
                hook, functions[hook] if hook in functions else getattr(defaults, hook)
            )
            for hook in HOOKS
        }
        self._pluggy = self._manager()
        self._unchecked = frozenset(DEVICE_HOOKS)
        self._validator = Validator(self.origin, self._functions)
        self._validator.host_hooks(self.info, self._plugin_hooks)
        if self._functions["is_initialized"]():
            self._check_device_hooks()
        self._bind(HOOKS)
        _made.add(self)

    def __repr__(self) -> str:
        return f"<hwcore.Backend {self.info.name!r} from {self.origin.distribution}>"

    def device(self, index: int | None = None) -> torch.device:
        """Return device ``index``, or the current one, as a :class:`torch.device`."""
        import torch

        return torch.device(self.device_string(index))

    def register(self, wrappers: object, name: str | None = None) -> None:
        """Run hook wrappers around this backend's hooks, from the next call on.

        Parameters
        ----------
        wrappers : object
            A module or object whose hook implementations are all marked
            ``hookimpl(wrapper=True)``; they may take any of the hook's arguments, and see the
            defaults filled in.
        name : str, optional
            A name for :meth:`hook_sources`.

        Raises
        ------
        PluginDefinitionError
            If it implements a hook rather than wrap one, or wraps one that does not exist.
        ArgumentValueError
            If it wraps nothing, it is registered already, or the name is taken.
        """
        hooks = self._wrapped_hooks(wrappers)
        where = "Backend.register"
        if not hooks:
            expected = "an object with functions marked @hwcore.hookimpl(wrapper=True)"
            raise ArgumentValueError(
                describe(where, "`wrappers`", wrappers, expected, "Mark its functions so")
            )
        with self._lock:
            if self._pluggy.is_registered(wrappers):
                expected = "an object that is not registered"
                raise ArgumentValueError(
                    describe(where, "`wrappers`", wrappers, expected, "Unregister it first")
                )
            try:
                self._pluggy.register(wrappers, name)
            except pluggy.PluginValidationError as error:
                if self._pluggy.is_registered(wrappers):  # pluggy 1.7 undoes it by itself
                    self._pluggy.unregister(wrappers)
                message = f"{self.origin}: wrapper {wrappers!r} does not fit the contract: {error}."
                raise PluginDefinitionError(message, self.info.name) from error
            except ValueError as error:
                expected = "a name that is not taken"
                raise ArgumentValueError(
                    describe(where, "`name`", name, expected, "Choose another, or none")
                ) from error
            self._bind(hooks)

    def unregister(self, wrappers: object) -> None:
        """Stop running the wrappers of :meth:`register`; their hooks are plain calls again.

        Raises
        ------
        ArgumentValueError
            If they are not registered.
        """
        with self._lock:
            if not self._pluggy.is_registered(wrappers):
                raise ArgumentValueError(
                    describe(
                        "Backend.unregister",
                        "`wrappers`",
                        wrappers,
                        "an object that was registered",
                        "Register it first",
                    )
                )
            self._pluggy.unregister(wrappers)
            self._bind(self._wrapped_hooks(wrappers))

    def hook_sources(self) -> dict[str, str]:
        """Return for each hook whose function runs: ``"plugin"`` or ``"default"``, and wrappers."""
        sources = {}
        for hook in HOOKS:
            source = "plugin" if hook in self._plugin_hooks else "default"
            wrappers = self._wrappers(hook)
            sources[hook] = f"{source}, wrapped by {', '.join(wrappers)}" if wrappers else source
        return sources

    def _setup(self, setup: Callable[[], Any] | None) -> None:
        if setup is None:
            return
        try:
            setup()
        except (Exception, SystemExit) as error:
            message = f"{self.origin}: setup() raised {error!r}. {self.origin.way_past}."
            raise SetupError(message, self.info.name, "setup") from error

    def _manager(self) -> pluggy.PluginManager:
        manager = pluggy.PluginManager(PROJECT)
        manager.add_hookspecs(HookSpecs)
        for source in ("plugin", "default"):
            chosen = {
                hook: binding.unbound(hook, function)
                for hook, function in self._functions.items()
                if (hook in self._plugin_hooks) == (source == "plugin")
            }
            manager.register(SimpleNamespace(**chosen), source)
        return manager

    def _wrappers(self, hook: str) -> list[str]:
        implementations = getattr(self._pluggy.hook, hook).get_hookimpls()
        return [it.plugin_name for it in implementations if it.wrapper or it.hookwrapper]

    def _bind(self, hooks: Any) -> None:
        """Point attributes at what runs now: a guard, pluggy with its wrappers, or the function."""
        for hook in hooks:
            if hook in self._unchecked:
                target = self._guard(hook)
            elif self._wrappers(hook):
                target = binding.through_pluggy(hook, getattr(self._pluggy.hook, hook))
            else:
                target = self._functions[hook]
            setattr(self, hook, target)

    def _guard(self, hook: str) -> Callable[..., Any]:
        def check_device_first(*arguments: Any, **named: Any) -> Any:
            with self._lock:
                if self._checking:  # by this thread: a hook under check calls its own backend
                    return self._functions[hook](*arguments, **named)
                if self._unchecked:
                    self._check_device_hooks()
                    self._bind(DEVICE_HOOKS)
            return getattr(self, hook)(*arguments, **named)

        return check_device_first

    def _check_device_hooks(self) -> None:
        self._checking = True
        try:
            self._validator.device_hooks(self.info)
        finally:
            self._checking = False
        self._unchecked = frozenset()

    def _wrapped_hooks(self, wrappers: object) -> list[str]:
        """Return the hooks that an object wraps; refuse one that implements or invents a hook."""
        hooks = []
        for name in dir(wrappers):
            options = self._pluggy.parse_hookimpl_opts(wrappers, name)
            if options is None:
                continue
            hook = options["specname"] or name
            if hook not in HOOKS or not (options["wrapper"] or options["hookwrapper"]):
                problem = "implements a hook" if hook in HOOKS else "names an unknown hook"
                message = (
                    f"{self.origin}: wrapper {wrappers!r} {problem}, `{hook}`; expected hook "
                    f"wrappers only. Mark it @hwcore.hookimpl(wrapper=True), or put it into the "
                    f"backend's plugin."
                )
                raise PluginDefinitionError(message, self.info.name, hook)
            hooks.append(hook)
        return hooks


def _nameless(plugin: object) -> Origin:
    return Origin("unnamed", repr(plugin), f"object {plugin!r}", "no version", "")


def _origin_of(plugin: object, functions: dict[str, Callable[..., Any]]) -> Origin:
    """Describe a plugin that came as an object, by the name that it gives itself."""
    origin = _nameless(plugin)
    if "backend_info" not in functions:
        return origin
    try:
        name = getattr(functions["backend_info"](), "name", origin.name)
    except Exception:  # noqa: BLE001 - the check of backend_info() says so, in the usual form
        return origin
    return Origin(str(name), origin.value, type(plugin).__name__, "passed as an object", "")
