"""The child process of ``hwcore conformance``: loads the backend, runs the tests, reports each.

Writes one JSON object a line to what was its standard output. Kept apart because a hook may crash
the interpreter, or hang in native code with the interpreter's lock held.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import Any

import msgspec

from hwcore.errors import HwcoreError, PluginError

__all__ = ["main"]


def main() -> None:
    """Run what the options, a JSON object in the first argument, say."""
    descriptor = os.dup(1)
    os.dup2(2, 1)  # what plugins print is no report
    lock = threading.Lock()

    def send(**report: Any) -> None:
        line = json.dumps(report).encode() + b"\n"
        with lock:
            while line:
                line = line[os.write(descriptor, line) :]

    try:
        _run(json.loads(sys.argv[1]), send)
    except HwcoreError as error:
        send(refused=str(error))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # a thread that hangs in native code would keep an ordinary exit from ending


def _run(options: dict[str, Any], send: Any) -> None:
    from hwcore.activation import load_backend

    try:
        backend = load_backend(options["backend"])
        # The kit and the groups come only now: they import torch, which the backend decides about.
        import torch

        from hwcore.testing.conformance import session, subject

        raw = subject.find_raw(options["backend"], options["raw"])
        with subject.open_kit(
            backend,
            raw,
            options["timeout_s"],
            f"hwcore.load_backend({options['backend']!r})",
            on_enter=lambda hook: send(hook=hook),
        ) as kit:
            for hook, test in options["avoid"].items():
                kit.avoid(hook, test)
            about = msgspec.to_builtins(session.facts(backend))
            send(backend=about, torch=torch.__version__)
            session.run_tests(
                kit,
                lambda result: send(result=msgspec.to_builtins(result)),
                keyword=options["keyword"],
                leave_out=options["leave_out"],
                on_start=lambda test, hook, limit_s: send(start=test, hook=hook, limit_s=limit_s),
            )
    except PluginError as error:
        send(broken={"hook": error.hook or "plugin", "message": str(error)})
    send(end=True)


if __name__ == "__main__":
    main()
