"""The examinations of ``hwcore doctor``, each torch-free in this process and proof against plugins.

What must import torch or run a plugin's code happens in a child process, so that a plugin that
raises, hangs or crashes becomes a line of the report.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from typing import TYPE_CHECKING, Any, Literal

from importlib_metadata import PackageNotFoundError, version

from hwcore import _env, binding, discovery
from hwcore.cli import report
from hwcore.errors import ApiVersionError, HwcoreError, PluginError
from hwcore.probing import ProbeResult, child_environment, kill, last_words, probe, status_text
from hwcore.selection import decide, plan
from hwcore.validation import Validator

if TYPE_CHECKING:
    from hwcore.discovery import Origin

__all__ = [
    "activate",
    "distribution_version",
    "exit_code",
    "probe_all",
    "select",
    "torch_extensions",
]

ACTIVATION_DEADLINE_S = 120.0


def distribution_version(name: str) -> str | None:
    """Return a distribution's version from its metadata, or None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def torch_extensions() -> list[report.TorchExtension]:
    """Return the device extensions that ``import torch`` would load."""
    return [
        report.TorchExtension(
            name=entry.name,
            entry_point=entry.value,
            distribution=entry.distribution,
            version=entry.version,
        )
        for entry in discovery.declared("torch.backends")
    ]


def probe_all() -> dict[Origin, ProbeResult | None]:
    """Probe every backend installed; None for a disabled one."""
    found = discovery.installed()
    results: dict[Origin, ProbeResult | None] = dict.fromkeys(found)
    enabled = discovery.enabled(found)
    foreign = [o for o in enabled if o != discovery.BUILTIN]
    if foreign:
        results.update(zip(foreign, probe(foreign), strict=True))
    if discovery.BUILTIN in enabled:
        results[discovery.BUILTIN] = _examine_builtin()
    return results


def describe_plugin(origin: Origin, result: ProbeResult | None) -> report.Plugin:
    """Return a plugin's part of the report."""
    state: Literal["available", "unavailable", "broken", "disabled"] = "disabled"
    api: Literal["compatible", "incompatible", "unknown"] = "unknown"
    if result is not None:
        answer = result.availability
        state = "broken" if answer is None else "available" if answer.ok else "unavailable"
        if isinstance(result.error, ApiVersionError):
            api = "incompatible"
        elif result.info:
            api = "compatible"
    info = result.info if result else None
    answer = result.availability if result else None
    return report.Plugin(
        name=origin.name,
        distribution=origin.distribution,
        version=origin.version,
        entry_point=origin.value,
        location=origin.location,
        file=result.file if result else None,
        state=state,
        api=api,
        api_version=info.api_version if info else None,
        priority=info.priority if info else None,
        automatic=info.automatic if info else None,
        reason=(answer.reason or None) if answer else None,
        fix=(answer.fix or None) if answer else None,
        error=str(result.error) if result and result.error else None,
        hooks=list(result.hooks) if result else [],
    )


def select() -> tuple[report.Selection, HwcoreError | None]:
    """Return what would be selected, by the steps that selection itself takes, or the error."""
    requested = _env.requested_backend()
    try:
        request = plan(requested, _env.BACKEND if requested else "automatic selection")
        decision = decide(request, probe(request.to_probe, only_automatic=requested is None))
    except HwcoreError as error:
        return report.Selection(requested=requested, error=str(error)), error
    return (
        report.Selection(
            requested=requested,
            backend=decision.origin.name,
            why=decision.why,
            warning=decision.warning,
        ),
        None,
    )


def activate(backend: str | None) -> tuple[report.TorchImport, report.Activation | None]:
    """Import torch in a child as a user would, and activate the backend where there is one."""
    heard = _run_child(backend, "--torch-first")
    torch_import = report.TorchImport(ok=True)
    # A child that ended before it said anything about torch ended while importing it.
    failure = heard["torch"] if "torch" in heard else _end(heard)
    if failure is not None:
        torch_import = report.TorchImport(ok=False, error=failure, fix=_torch_fix())
        # hwcore's own import of torch may still work: it loads no device extensions.
        heard = _run_child(backend) if backend else {}
    if backend is None:
        return torch_import, None
    answer = heard.get("activation", {"ok": True})
    answer = {**answer, **heard.get("operators", {})}
    if answer["ok"] and ("activation" not in heard or "died" in heard):
        # One that answered and died afterwards has not worked either.
        answer = {**answer, "ok": False, "error": _end(heard)}
    return torch_import, report.Activation(**answer)


def exit_code(
    plugins: list[report.Plugin],
    selection: report.Selection,
    failure: HwcoreError | None,
    torch_import: report.TorchImport,
    activation: report.Activation | None,
) -> Literal[0, 1, 2]:
    """Return 2 if selection would fail, else 1 if a plugin is broken, else 0.

    Automatic selection that stops at a broken plugin counts as the latter: that is its cause.
    """
    broken_stops_automatic = selection.requested is None and isinstance(failure, PluginError)
    if failure is not None and not broken_stops_automatic:
        return 2
    if not torch_import.ok or (activation is not None and not activation.ok):
        return 2
    return 1 if failure or any(plugin.state == "broken" for plugin in plugins) else 0


def _examine_builtin() -> ProbeResult:
    origin = discovery.BUILTIN
    plugin = discovery.load(origin)
    functions = binding.hook_functions(plugin, origin)
    checked = Validator(origin, functions)
    return ProbeResult(
        origin,
        info=checked.info(),
        hooks=tuple(sorted(functions)),
        availability=checked.availability(),
        file=getattr(sys.modules.get(type(plugin).__module__), "__file__", None),
    )


def _torch_fix() -> str:
    extensions = torch_extensions()
    if not extensions:
        return "Reinstall torch; no device extension is involved"
    names = ", ".join(f"{e.name} ({e.distribution} {e.version})" for e in extensions)
    return (
        f"Set {_env.AUTOLOAD}=0, or install what the device extension needs, or uninstall it: "
        f"torch loads {names} by itself"
    )


def _end(heard: dict[str, Any]) -> str:
    """Return how a child ended that did not say all that it was asked."""
    end: str = heard.get("died", "the child process ended without an answer")
    return end


def _run_child(backend: str | None, *options: str) -> dict[str, Any]:
    """Run the activation child and return its reports by kind, with ``died`` if it did not end.

    What a child said before it died or hung is kept.
    """
    command = [sys.executable, "-P", "-m", "hwcore.cli._activation_child", *options]
    heard: dict[str, Any] = {}
    died = ""
    with tempfile.TemporaryFile() as noise:
        child = subprocess.Popen(
            command if backend is None else [*command, backend],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=noise,
            env=child_environment(),
            start_new_session=True,
        )
        try:
            output, _ = child.communicate(timeout=ACTIVATION_DEADLINE_S)
        except subprocess.TimeoutExpired as expired:
            output = expired.output or b""
            died = f"the process hung for {ACTIVATION_DEADLINE_S:g} s and was ended"
        finally:
            kill(child)  # an interrupted doctor leaves nothing behind that holds the device
        if not died and child.returncode:
            died = f"the process ended: {status_text(child.returncode)}"
        if died:
            heard["died"] = f"{died}.{last_words(noise)}"
    for line in output.splitlines(keepends=True):
        if line.endswith(b"\n"):  # a child that was ended may leave half a line
            heard.update(json.loads(line))
    return heard
