"""Which backend to take: by name, or the best of those whose probe says that they can run.

:func:`plan` reads what is installed and says what must be probed; :func:`decide` chooses among the
answers or says why it cannot. Neither changes anything, so that ``hwcore doctor`` asks them too.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import os
from typing import TYPE_CHECKING

from hwcore import _env, discovery
from hwcore.errors import (
    BackendUnavailableError,
    PluginLoadError,
    SelectionError,
    UnknownBackendError,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hwcore.discovery import Origin
    from hwcore.probing import ProbeResult

__all__ = ["Decision", "Request", "decide", "plan"]

_log = logging.getLogger("hwcore")


@dataclasses.dataclass(frozen=True)
class Request:
    """What is to be found out before a backend can be chosen.

    Attributes
    ----------
    name : str or None
        The backend asked for; None: automatic.
    source : str
        Who asked, for messages: ``hwcore.use``, a variable, or automatic selection.
    origins : tuple of Origin
        The candidates that were not disabled.
    to_probe : tuple of Origin
        Those of them that must be probed.
    """

    name: str | None
    source: str
    origins: tuple[Origin, ...]
    to_probe: tuple[Origin, ...]


@dataclasses.dataclass(frozen=True)
class Decision:
    """The backend chosen, why, and what the user should hear about it."""

    origin: Origin
    why: str
    warning: str | None = None


def plan(name: str | None, source: str) -> Request:
    """Return the candidates for a selection, and which of them must be probed.

    Parameters
    ----------
    name : str or None
        The backend asked for; None for automatic selection.
    source : str
        Who asked, for messages.

    Raises
    ------
    UnknownBackendError
        If no installed plugin has that name.
    SelectionError
        If it is disabled.
    PluginLoadError
        If two distributions offer one of the names in question.
    """
    found = discovery.installed()
    origins = tuple(discovery.enabled(found))
    _warn_of_unmatched(_env.disabled_plugins(), found)
    if name is None:
        for origin in origins:
            _check_unique(origin.name, origins)
        to_probe = tuple(o for o in origins if o != discovery.BUILTIN)
        return Request(None, source, origins, to_probe)
    matching = tuple(o for o in origins if o.name == name)
    if not matching:
        raise _unknown(name, source, found)
    _check_unique(name, matching)
    to_probe = tuple(o for o in matching if o != discovery.BUILTIN)
    return Request(name, source, matching, to_probe)


def decide(request: Request, results: Sequence[ProbeResult]) -> Decision:
    """Choose among probed candidates. Changes nothing, so that ``doctor`` can ask as well.

    Raises
    ------
    PluginError
        If a candidate is broken.
    SelectionError
        If none or several answer to the request.
    """
    broken = [result.error for result in results if result.error]
    if broken:
        for other in broken[1:]:
            broken[0].add_note(f"Also broken: {other}")
        raise broken[0]
    if request.name is not None:
        return _decide_named(request, results)
    ready = [r for r in results if r.info and r.info.automatic and r.availability.ok]  # type: ignore[union-attr]
    if ready:
        best = max(r.info.priority for r in ready if r.info)
        first, *others = [r for r in ready if r.info and r.info.priority == best]
        if others:
            names = ", ".join(f"`{r.origin.name}`" for r in (first, *others))
            message = (
                f"hwcore: automatic selection found {names}, available with the same priority "
                f"{best}; expected one best. Set HWCORE_BACKEND={first.origin.name}, or call "
                f'hwcore.use("{first.origin.name}"), or another of them.'
            )
            raise SelectionError(message)
        return Decision(first.origin, f"automatic: available, with the highest priority, {best}")
    if discovery.BUILTIN not in request.origins:
        message = (
            "hwcore: automatic selection found no backend: none of the plugins is available, and "
            f"`cpu` is disabled. {_missing(results)} Or take cpu out of HWCORE_DISABLE_PLUGINS."
        )
        raise BackendUnavailableError(message)
    missing = _missing(results)
    warning = missing and (
        f"hwcore runs on the CPU, though accelerator plugins are installed. {missing} "
        f"Set HWCORE_BACKEND=cpu to choose the CPU without this warning."
    )
    return Decision(discovery.BUILTIN, "automatic: no accelerator is available", warning or None)


def _decide_named(request: Request, results: Sequence[ProbeResult]) -> Decision:
    for result in results:
        answer = result.availability
        if answer is not None and not answer.ok:
            message = (
                f"hwcore: backend `{request.name}`, asked for by {request.source}, cannot run "
                f"on this machine: {answer.reason}. {answer.fix}."
            )
            raise BackendUnavailableError(message)
    return Decision(request.origins[0], f"named by {request.source}")


def _check_unique(name: str, origins: Sequence[Origin]) -> None:
    same = [origin for origin in origins if origin.name == name]
    if len(same) == 1:
        return
    who = " and ".join(f"{o.distribution} {o.version} ({o.location})" for o in same)
    foreign = next(o for o in reversed(same) if o != discovery.BUILTIN)
    reserved = " The name is that of the built-in backend." if discovery.BUILTIN in same else ""
    message = (
        f"hwcore: backend name `{name}` is offered by {who}; expected one distribution.{reserved} "
        f"Uninstall one, or set {_env.DISABLE_PLUGINS}={foreign.distribution} to leave it out."
    )
    raise PluginLoadError(message, name)


def _unknown(name: str, source: str, found: Sequence[Origin]) -> SelectionError:
    disabled = [origin for origin in found if origin.name == name]
    if disabled:
        message = (
            f"hwcore: backend `{name}`, asked for by {source}, is disabled by "
            f"{_env.DISABLE_PLUGINS}={os.environ.get(_env.DISABLE_PLUGINS)}. Take it out there, "
            f"or ask for another backend."
        )
        return SelectionError(message)
    names = [origin.name for origin in found]
    near = difflib.get_close_matches(name.lower(), names, n=1)
    hint = (
        f"Did you mean `{near[0]}`?" if near else f"Install its plugin: pip install hwcore-{name}."
    )
    message = (
        f'hwcore: {source} asks for backend "{name}"; expected an installed one: '
        f"{', '.join(names)}. {hint}"
    )
    return UnknownBackendError(message)


def _warn_of_unmatched(disabled: Sequence[str], found: Sequence[Origin]) -> None:
    names = sorted({origin.name for origin in found} | {origin.distribution for origin in found})
    for name in disabled:
        if not any(origin.matches(name) for origin in found):
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"Did you mean `{near[0]}`?" if near else f"Installed: {', '.join(names)}."
            _log.warning(
                "%s names `%s`, which is not installed, so it disables nothing. %s",
                _env.DISABLE_PLUGINS,
                name,
                hint,
            )


def _missing(results: Sequence[ProbeResult]) -> str:
    return " ".join(
        f"`{r.origin.name}` ({r.origin.distribution} {r.origin.version}): "
        f"{r.availability.reason}. {r.availability.fix}."
        for r in results
        if r.info and r.info.automatic and r.availability and not r.availability.ok
    )
