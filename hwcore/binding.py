"""From a plugin's functions to plain callables with the contract's signature.

Everything here happens once, when a plugin is activated. What a step calls afterwards is the
plugin's own function, or a one-line adapter where it takes other arguments than the hook has.
"""

from __future__ import annotations

import difflib
import inspect
import types
from typing import TYPE_CHECKING, Any

import pluggy

from hwcore.errors import PluginDefinitionError
from hwcore.hookspecs import HOOKS, PROJECT, REQUIRED_HOOKS, hookimpl

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from hwcore.discovery import Origin

__all__ = ["bind", "check_definitions", "hook_functions", "through_pluggy", "unbound"]

_PLAIN_PARAMETERS = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
)


def hook_functions(plugin: object, origin: Origin) -> dict[str, Callable[..., Any]]:
    """Return a plugin's hook implementations by hook name, unchecked but for their kind.

    Raises
    ------
    PluginDefinitionError
        If one hook is implemented twice, or by a wrapper.
    """
    parser = pluggy.PluginManager(PROJECT)
    found: dict[str, Callable[..., Any]] = {}
    for name in dir(plugin):
        options = parser.parse_hookimpl_opts(plugin, name)
        if options is None:
            continue
        hook = options["specname"] or name
        if options["optionalhook"] and hook not in HOOKS:
            continue  # a hook of a newer contract, which the plugin can do without
        if options["wrapper"] or options["hookwrapper"]:
            what = f"`{name}` is a hook wrapper"
            raise _error(
                origin, hook, what, "Implement the hook itself; Backend.register takes wrappers"
            )
        if hook in found:
            what = f"`{name}` implements hook `{hook}` a second time"
            raise _error(origin, hook, what, "Keep one of the two")
        found[hook] = getattr(plugin, name)
    return found


def check_definitions(
    plugin: object, functions: dict[str, Callable[..., Any]], origin: Origin
) -> None:
    """Check a plugin's hooks against the contract: names, arguments, completeness.

    Raises
    ------
    PluginDefinitionError
        If a required hook is missing, a hook or one of its arguments is unknown, or a callable
        has a hook's name without being a function marked as its implementation.
    """
    for hook, function in functions.items():
        if hook not in HOOKS:
            what = f"hook `{hook}` does not exist in the contract"
            raise _error(origin, hook, what, _nearest(hook, HOOKS, "hook"))
        _check_parameters(hook, function, origin)
    for hook in HOOKS:
        if hook in functions or not callable(getattr(plugin, hook, None)):
            continue
        what = f"`{hook}` is not a function marked as a hook implementation, so it would never run"
        fix = "Decorate a function of that name with @hwcore.hookimpl, or rename it"
        raise _error(origin, hook, what, fix)
    for hook in REQUIRED_HOOKS:
        if hook not in functions:
            what = f"required hook `{hook}` is not implemented"
            raise _error(origin, hook, what, f"Add `@hwcore.hookimpl def {hook}{HOOKS[hook]}`")


def bind(hook: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function`` with the parameters and defaults that the contract gives ``hook``.

    The function itself where it has them; the same code with the defaults filled in where it has
    only the parameters; an adapter where it takes fewer, in another order, or by position only.
    """
    spec = list(HOOKS[hook].parameters.values())
    own = _parameters(function)
    if [(p.name, p.kind) for p in own] == [(p.name, p.kind) for p in spec]:
        if [parameter.default for parameter in own] == [parameter.default for parameter in spec]:
            return function
        defaults = tuple(p.default for p in spec if p.default is not p.empty)
        if copy := _with_defaults(function, defaults):
            return copy
    return _compiled(HOOKS[hook], "function", (parameter.name for parameter in own), function)


def unbound(hook: str, bound: Callable[..., Any]) -> Callable[..., Any]:
    """Return a bound hook in the form pluggy calls: marked, and without defaults.

    pluggy never passes an argument for which an implementation has a default.
    """
    parameters = HOOKS[hook].parameters.values()
    bare = inspect.Signature(
        [parameter.replace(default=parameter.empty) for parameter in parameters]
    )
    return hookimpl(_compiled(bare, "bound", bare.parameters, bound))


def through_pluggy(hook: str, caller: pluggy.HookCaller) -> Callable[..., Any]:
    """Return a callable with the contract's signature that runs the hook with its wrappers."""
    names = HOOKS[hook].parameters
    return _compiled(HOOKS[hook], "caller", (f"{name}={name}" for name in names), caller)


def _compiled(
    signature: inspect.Signature, target: str, arguments: Iterable[str], function: Any
) -> Callable[..., Any]:
    """Compile ``lambda <signature>: function(<arguments>)``; defaults are looked up by name.

    Generated code because a call through ``*args, **kwargs`` costs several times as much.
    """
    namespace: dict[str, Any] = {target: function}
    parameters = []
    for name, parameter in signature.parameters.items():
        if parameter.default is parameter.empty:
            parameters.append(name)
        else:
            namespace[f"default_{name}"] = parameter.default
            parameters.append(f"{name}=default_{name}")
    source = f"lambda {', '.join(parameters)}: {target}({', '.join(arguments)})"
    adapter: Callable[..., Any] = eval(source, namespace)
    return adapter


def _with_defaults(
    function: Callable[..., Any], defaults: tuple[Any, ...]
) -> Callable[..., Any] | None:
    """Copy a plain function or method with other defaults; None for any other callable."""
    plain = function.__func__ if isinstance(function, types.MethodType) else function
    if not isinstance(plain, types.FunctionType) or hasattr(plain, "__wrapped__"):
        return None
    copy = types.FunctionType(
        plain.__code__, plain.__globals__, plain.__name__, defaults, plain.__closure__
    )
    copy.__doc__, copy.__qualname__ = plain.__doc__, plain.__qualname__
    return (
        types.MethodType(copy, function.__self__)
        if isinstance(function, types.MethodType)
        else copy
    )


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())


def _check_parameters(hook: str, function: Callable[..., Any], origin: Origin) -> None:
    allowed = HOOKS[hook].parameters
    for parameter in _parameters(function):
        if parameter.name not in allowed or parameter.kind not in _PLAIN_PARAMETERS:
            what = f"hook `{hook}` takes argument `{parameter}`, which the contract does not have"
            expected = f"it is `{hook}({', '.join(allowed)})`"
            raise _error(origin, hook, f"{what}; {expected}", "Remove or rename the argument")


def _nearest(name: str, known: Iterable[str], kind: str) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"Rename it to `{near[0]}`" if near else f"See hwcore/hookspecs.py for every {kind}"


def _error(origin: Origin, hook: str, what: str, fix: str) -> PluginDefinitionError:
    return PluginDefinitionError(f"{origin}: {what}. {fix}. {origin.way_past}.", origin.name, hook)
