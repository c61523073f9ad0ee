"""Processes: a spawned child has the device, and a forked one has it or an error that says why."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import textwrap
from typing import TYPE_CHECKING, Any

from hwcore.probing import kill, status_text
from hwcore.testing.conformance.kit import conforms
from hwcore.testing.conformance.subject import environment

if TYPE_CHECKING:
    from hwcore.testing.conformance.kit import Kit

_FRESH = """
    hw = {loader}
    import torch
    answers = {{"initialized": hw.is_initialized()}}
    answers["value"] = (torch.ones(3, device=hw.device(0)) * 2).sum().item()
    answers["backend"] = hw.info.name
"""

_FORKED = """
    import os
    hw = {loader}
    import torch

    def forked(work):
        reader, writer = os.pipe()
        if os.fork() == 0:
            try:
                said = work()
            except BaseException as error:
                said = type(error).__name__
            os.write(writer, str(said).encode())
            os._exit(0)
        os.close(writer)
        said = os.fdopen(reader).read()
        os.wait()
        return said

    def use():
        again = {loader}
        return (torch.ones(3, device=again.device(0)) * 2).sum().item()

    answers = {{"before": forked(use)}}
    use()
    answers["initialized"] = hw.is_initialized()
    answers["after"] = forked(use)
"""

_RIGHT = "6.0"
_PATIENCE = 4  # importing torch and a vendor's libraries takes its time


class Processes:
    @conforms("setup", patience=_PATIENCE)
    def test_setup_creates_no_device_context(self, kit: Kit) -> None:
        answers = _run(kit, _FRESH)
        fix = "Import and register only; a fork would break a live context"
        got = answers["initialized"]
        kit.that(not got, "is_initialized() just after it", got, "False", fix)

    @conforms("setup", patience=_PATIENCE)
    def test_a_new_process_computes_on_the_device(self, kit: Kit) -> None:
        answers = _run(kit, _FRESH)
        fix = "Let setup() do all that the device needs in a new process"
        kit.same("a sum in a child process", answers["value"], float(_RIGHT), "as here", fix)
        kit.same("its backend", answers["backend"], kit.hw.info.name, "the one named", fix)

    @conforms("is_initialized", patience=_PATIENCE)
    def test_a_forked_child_has_the_device_or_is_told_to_spawn(self, kit: Kit) -> None:
        answers = _run(kit, _FORKED)
        unsafe = kit.has_quirk("fork_unsafe")
        expected = "ForkError" if unsafe else _RIGHT
        why = f"{'with' if unsafe else 'without'} the quirk `fork_unsafe`"
        fix = "Declare the quirk if a child cannot use the device even before it is initialised"
        kit.same("a child forked before any device work", answers["before"], expected, why, fix)
        live = answers["initialized"] or unsafe
        expected = "ForkError" if live else _RIGHT
        why = f"since is_initialized() said {answers['initialized']}"
        fix = "Say True once the process holds what a forked child cannot use"
        kit.same("a child forked after device work", answers["after"], expected, why, fix)


_ran: dict[tuple[str, str], dict[str, Any]] = {}


def _run(kit: Kit, body: str) -> dict[str, Any]:
    """Run code in a new Python process; importing torch takes seconds, so each body runs once."""
    if kit.loader is None:
        kit.skip("loader", "the backend was passed as an object, which no other process can load")
    key = kit.loader, body
    if key not in _ran:
        code = textwrap.dedent(body).format(loader=kit.loader)
        code = f"import json\nimport hwcore\n{code}\nprint(json.dumps(answers))\n"
        with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
            child = subprocess.Popen(
                [sys.executable, "-c", code],
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                start_new_session=True,
            )
            limit_s = kit.timeout_s * (_PATIENCE - 1)
            fix = "Make the backend usable in a new process"
            try:
                status = child.wait(limit_s)
            except subprocess.TimeoutExpired:
                expected = f"an end within {limit_s:g} s"
                kit.fail("a child process", "no end", expected, fix)
            finally:
                kill(child)  # with what it forked
            output.seek(0)
            errors.seek(0)
            if status:
                last = (errors.read().strip().splitlines() or ["no message"])[-1]
                got = f"{status_text(status)}: {last}"
                kit.fail("a child process", got, "exit status 0", fix)
            _ran[key] = json.loads(output.read().splitlines()[-1])
    return _ran[key]
