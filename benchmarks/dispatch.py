"""What a Backend's hooks cost, against torch's own calls and against calling through pluggy."""

from __future__ import annotations

from typing import Any

import pluggy
import torch

import hwcore
from hwcore.cli.measurement import Row, nanoseconds, statements
from hwcore.cpu import CpuPlugin, CpuStream
from hwcore.hookspecs import HOOKS, PROJECT, HookSpecs
from hwcore.types import CompileRequest


def run(quick: bool = False) -> list[Row]:
    """Return the rows of this subject."""
    rounds, calls = (5, 2_000) if quick else (25, 20_000)
    return [
        *_against_torch(rounds, calls),
        _against_pluggy("the hook's own arguments", _full, rounds, calls // 4),
        _against_pluggy("no arguments, so adapted", _bare, rounds, calls // 4),
    ]


def _against_torch(rounds: int, calls: int) -> list[Row]:
    """Compare with what an engine writes today: torch's device module, looked up by device."""
    hw = hwcore.current_backend()
    device = hw.device()
    module = torch.get_device_module(device)
    names = {
        "hw": hw,
        "torch": torch,
        "device": device,
        "event": hw.create_event(),
        "torch_event": module.Event(),
    }
    engine = "torch.get_device_module(device).current_stream()"
    rows = []
    for what, ours, theirs, target in (
        ("current_stream, as an engine writes it", "hw.current_stream()", engine, 1.1),
        (
            "record_event on the current stream",
            "hw.record_event(event)",
            f"torch_event.record({engine})",
            1.1,
        ),
        # On the CPU torch's event is a stub: an empty method. The row shows what is left of a
        # hook call when the peer does nothing.
        (
            "record_event over a bare record(), no target",
            "hw.record_event(event)",
            "torch_event.record()",
            None,
        ),
    ):
        medians = statements({"hwcore": ours, "torch": theirs}, names, rounds, calls)
        ratio = medians["hwcore"] / medians["torch"]
        rows.append(Row(what, ratio, "x", target, True, nanoseconds(medians)))
    return rows


def _against_pluggy(what: str, define: Any, rounds: int, calls: int) -> Row:
    """Compare each hook's overhead over the plugin's function with pluggy's over the same."""
    answers = _answers()
    functions = {hook: hwcore.hookimpl(define(hook, answers[hook])) for hook in HOOKS}
    plugin = type("Constant", (), functions)()
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(HookSpecs)
    manager.register(plugin)
    names = {"plugin": plugin, "backend": hwcore.Backend(plugin), "hook": manager.hook}
    worst, share, detail = "", -1.0, ""
    for hook, signature in HOOKS.items():
        arguments = ", ".join(f"{name}=None" for name in signature.parameters)
        positional = ", ".join("None" for _ in signature.parameters)
        medians = statements(
            {
                "own": f"plugin.{hook}({positional if define is _full else ''})",
                "bound": f"backend.{hook}({positional})",
                "pluggy": f"hook.{hook}({arguments})",
            },
            names,
            rounds,
            calls,
        )
        overhead = medians["bound"] - medians["own"]
        found = overhead / (medians["pluggy"] - medians["own"])
        if found > share:
            worst, share, detail = hook, found, nanoseconds(medians)
    title = f"overhead over pluggy's, worst of {len(HOOKS)} hooks; {what}"
    return Row(title, share, "x", 1 / 20, True, f"{worst}: {detail}")


def _full(hook: str, answer: Any) -> Any:
    """Define a hook with the contract's parameters that returns a constant."""
    names = ", ".join(["self", *HOOKS[hook].parameters])
    return eval(f"lambda {names}: answer", {"answer": answer})


def _bare(hook: str, answer: Any) -> Any:
    """Define a hook that takes nothing and returns a constant."""
    return eval("lambda self: answer", {"answer": answer})


class _Anywhere(CpuStream):
    """A stream equal to every other, so that constant answers pass the self-check."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = CpuStream.__hash__


def _answers() -> dict[str, Any]:
    """Return for each hook a value that passes validation."""
    cpu = hwcore.load_backend("cpu")
    stream = _Anywhere(cpu.device())
    answers: dict[str, Any] = dict.fromkeys(HOOKS)
    for hook in (
        "device_string",
        "device_count",
        "memory_info",
        "generator",
        "create_event",
        "is_capturing",
        "distributed_backend",
        "kernels",
        "host_memory_policy",
        "plan_stream_policy",
        "transfer_engines",
    ):
        answers[hook] = getattr(cpu, hook)()
    return answers | {
        "backend_info": CpuPlugin().backend_info(),
        "is_initialized": True,
        "create_stream": stream,
        "current_stream": stream,
        "stream_context": stream,
        "query_event": True,
        "needs_cpu_fallback": False,
        "compile_policy": cpu.compile_policy(CompileRequest("benchmark")),
    }
