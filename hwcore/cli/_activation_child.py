"""The child of ``hwcore doctor`` that imports torch and activates a backend.

Writes one JSON object a line: ``{"torch": error or null}``, ``{"activation": {...}}``, and
``{"operators": {...}}``, which may have to use the device.
"""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hwcore.backend import Backend


def main() -> None:
    """Do what the arguments ask: ``[--torch-first] [BACKEND]``."""
    reports = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what plugins print is not a report
    arguments = sys.argv[1:]

    def send(**report: Any) -> None:
        print(json.dumps(report), file=reports, flush=True)

    if "--torch-first" in arguments:
        arguments.remove("--torch-first")
        try:
            import torch  # noqa: F401
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is the finding
            cause = f" (caused by {error.__cause__!r})" if error.__cause__ else ""
            send(torch=f"{error!r}{cause}")
            return
        send(torch=None)
    if arguments:
        backend, answer = _activate(arguments[0])
        send(activation=answer)
        if backend is not None:
            send(operators=_operators(backend))


def _activate(name: str) -> tuple[Backend | None, dict[str, Any]]:
    import hwcore
    from hwcore.types import CompileRequest

    try:
        backend = hwcore.load_backend(name)
    except hwcore.HwcoreError as error:
        return None, {"ok": False, "error": str(error)}
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is the finding
        return None, {"ok": False, "error": f"activating the plugin of `{name}` raised {error!r}"}
    policy = backend.compile_policy(CompileRequest(name="hwcore doctor"))
    return backend, {
        "ok": True,
        "device_count": backend.device_count(),
        "compile_enabled": policy.enabled,
        "compile_reason": policy.reason or None,
        "hooks": backend.hook_sources(),
    }


def _operators(backend: Backend) -> dict[str, Any]:
    """Return what runs elsewhere than one might think: on the CPU, or as the plugin's kernel."""
    from hwcore.kernels import references, torch_ops

    own, known = backend.kernels(), references()
    kernels = {name: "plugin" if name in own else "reference" for name in known}
    found: dict[str, Any] = {
        "kernels": {**kernels, **{name: "unknown" for name in own if name not in known}},
        "on_cpu": [],
    }
    if backend.hook_sources()["needs_cpu_fallback"] != "default":
        # Only a plugin's own word takes a tensor of the device, and so a context.
        try:
            ops = torch_ops(backend)
            ops.bind()
            found["on_cpu"] = sorted(ops.on_cpu)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the finding
            found.update(on_cpu=None, on_cpu_error=repr(error))
    return found


if __name__ == "__main__":
    main()
