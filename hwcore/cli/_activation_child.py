"""The child of ``hwcore doctor`` that imports torch and activates a backend.

Writes one JSON object a line: ``{"torch": error or null}`` and ``{"activation": {...}}``.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


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
        send(activation=_activate(arguments[0]))


def _activate(name: str) -> dict[str, Any]:
    import hwcore
    from hwcore.types import CompileRequest

    try:
        backend = hwcore.load_backend(name)
    except hwcore.HwcoreError as error:
        return {"ok": False, "error": str(error)}
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is the finding
        return {"ok": False, "error": f"activating the plugin of `{name}` raised {error!r}"}
    policy = backend.compile_policy(CompileRequest(name="hwcore doctor"))
    return {
        "ok": True,
        "device_count": backend.device_count(),
        "compile_enabled": policy.enabled,
        "compile_reason": policy.reason or None,
        "hooks": backend.hook_sources(),
    }


if __name__ == "__main__":
    main()
