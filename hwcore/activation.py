"""The backend of this process: selected once, activated once, inherited by its children."""

from __future__ import annotations

import logging
import os
import sys
import threading
from typing import TYPE_CHECKING

from hwcore import _env, discovery
from hwcore.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    ForkError,
    PluginError,
    SelectionError,
    TorchImportError,
    describe,
)
from hwcore.probing import probe
from hwcore.selection import decide, plan

if TYPE_CHECKING:
    from hwcore.backend import Backend
    from hwcore.discovery import Origin
    from hwcore.selection import Decision

__all__ = ["current_backend", "load_backend", "use"]

_log = logging.getLogger("hwcore")


class _Process:
    """The selection of this process. One instance; replaced piecewise in a forked child."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.loading: set[str] = set()
        self.decision: Decision | None = None
        self.backend: Backend | None = None
        self.loaded: dict[str, Backend | PluginError] = {}
        self.live_at_fork: str | None = None
        self.forked_from_live: str | None = None


_process = _Process()


def current_backend() -> Backend:
    """Return this process's backend, selecting it at the first call.

    The order is :func:`hwcore.use`, then the variable ``HWCORE_BACKEND``, then automatic: of the
    installed plugins whose probe says that this machine can run them, the one of highest
    priority. Threads that call it at once select once; children of this process select the same.

    Returns
    -------
    Backend

    Raises
    ------
    SelectionError
        If the backend named is unknown, disabled or unavailable, or two plugins tie.
    PluginError
        If a plugin is broken: another device is never taken in its stead.
    ForkError
        In a child forked while a device context was live.
    """
    backend = _process.backend
    if backend is not None and _process.forked_from_live is None:
        return backend
    return _select(None)


def use(name: str) -> Backend:
    """Select the backend ``name`` for this process and return it.

    Parameters
    ----------
    name : str
        Any installed backend, the built-in ``"cpu"`` included.

    Raises
    ------
    ArgumentTypeError
        If ``name`` is not a string.
    SelectionError
        If another backend was selected before, or as for :func:`current_backend`.
    """
    return _select(_checked_name(name, "use"))


def load_backend(name: str) -> Backend:
    """Return the backend ``name`` without selecting it: for tools and tests.

    A backend is loaded once per process, so that its ``setup()`` runs once.

    Raises
    ------
    ArgumentTypeError, SelectionError, PluginError
        As :func:`use`.
    """
    name = _checked_name(name, "load_backend")
    with _process.lock:
        _check_fork()
        if discovery.in_probe:
            raise _asked_too_early()
        request = plan(name, "hwcore.load_backend")
        return _load(decide(request, probe(request.to_probe)).origin)


def _select(name: str | None) -> Backend:
    with _process.lock:
        _check_fork()
        if discovery.in_probe or _process.loading:  # by this thread, which holds the lock
            raise _asked_too_early()
        if _process.decision is None:
            source = "hwcore.use" if name else _env.BACKEND
            name = name or _env.requested_backend()
            request = plan(name, source if name else "automatic selection")
            results = probe(request.to_probe, only_automatic=name is None)
            decision = decide(request, results)
            if decision.warning:
                _log.warning(decision.warning)
            _process.decision = decision
            # Children read it; from here on it holds, whatever setup() does.
            os.environ[_env.BACKEND] = decision.origin.name
        chosen = _process.decision.origin.name
        if name is not None and name != chosen:
            message = (
                f'hwcore.use: `name` got "{name}"; expected "{chosen}", which this process '
                f"already runs on ({_process.decision.why}). Call hwcore.use before anything "
                f"else uses hwcore, or run one process per backend."
            )
            raise SelectionError(message)
        _process.backend = _load(_process.decision.origin)
        return _process.backend


def _load(origin: Origin) -> Backend:
    """Activate a plugin, once per process; a failure is remembered and raised again."""
    known = _process.loaded.get(origin.name)
    if isinstance(known, PluginError):
        raise type(known)(str(known), known.plugin, known.hook) from known
    if known is None:
        if origin.name in _process.loading:
            raise _asked_too_early()
        _process.loading.add(origin.name)
        try:
            _import_torch(origin)
            from hwcore.backend import Backend

            known = Backend(discovery.load(origin), origin)
        except PluginError as error:
            _process.loaded[origin.name] = error
            raise
        finally:
            _process.loading.discard(origin.name)
        _process.loaded[origin.name] = known
        _sanitize(known)
    return known


def _sanitize(backend: Backend) -> None:
    """Switch the race sanitizer on if the environment asks for it; imported only then."""
    on_race = _env.sanitize()
    if on_race is not None:
        from hwcore.testing.sanitizer import enable

        enable(backend, on_race)


def _import_torch(origin: Origin) -> None:
    """Import torch with its loading of device extensions off.

    An extension whose device is missing makes ``import torch`` itself fail and leaves the process
    unable to try again. The selected plugin's ``setup()`` imports what its device needs.
    """
    if "torch" in sys.modules:
        return
    extensions = sorted(entry.name for entry in discovery.declared("torch.backends"))
    before = os.environ.get(_env.AUTOLOAD)
    if extensions and before != "0":
        _log.info(
            "importing torch for backend %s without loading its device extensions (%s)",
            origin.name,
            ", ".join(extensions),
        )
    # Even where there are none: looking for them, torch fails at any package's damaged metadata.
    os.environ[_env.AUTOLOAD] = "0"
    try:
        import torch  # noqa: F401
    except Exception as error:
        message = (
            f"hwcore: `import torch`, needed for backend `{origin.name}`, failed: {error}. "
            f"Run `hwcore doctor`; it names the cause without importing torch."
        )
        raise TorchImportError(message) from error
    finally:
        if before is None:
            os.environ.pop(_env.AUTOLOAD, None)
        else:
            os.environ[_env.AUTOLOAD] = before


def _asked_too_early() -> SelectionError:
    message = (
        "hwcore: the backend was asked for while it is being selected or loaded, from a plugin's "
        "module, probe(), setup() or hooks. Use what the hook is given instead of "
        "hwcore.current_backend()."
    )
    return SelectionError(message)


def _checked_name(name: object, function: str) -> str:
    if isinstance(name, str) and name.strip():
        return name.strip()
    fix = 'Name an installed backend, such as "cpu"; `hwcore doctor` lists them'
    error = ArgumentValueError if isinstance(name, str) else ArgumentTypeError
    raise error(describe(f"hwcore.{function}", "`name`", name, "a backend's name", fix))


def _check_fork() -> None:
    if _process.forked_from_live is not None:
        message = (
            f"hwcore: this process was forked from one with a live `{_process.forked_from_live}` "
            f"device context, which a forked child cannot use. Start it with "
            f'multiprocessing.get_context("spawn").'
        )
        raise ForkError(message)


def _before_fork() -> None:
    """Note which device context is live; the child cannot find out any more."""
    _process.live_at_fork = None
    for name, backend in list(_process.loaded.items()):
        if not isinstance(backend, PluginError) and _is_live(backend):
            _process.live_at_fork = name


def _is_live(backend: Backend) -> bool:
    if "fork_unsafe" in backend.info.quirks:
        return True
    try:
        return backend.is_initialized()
    except Exception:  # noqa: BLE001 - a fork must not fail for what a driver says
        _log.exception("is_initialized() of backend %s failed; taken as live", backend.info.name)
        return True


def _after_fork() -> None:
    _process.lock = threading.RLock()  # its holder, if any, is not in this process
    _process.loading.clear()
    _process.forked_from_live = _process.forked_from_live or _process.live_at_fork


os.register_at_fork(before=_before_fork, after_in_child=_after_fork)
