"""The child process of :mod:`hwcore.probing`: load each plugin, say who it is, ask its probe.

Started as ``python -m hwcore._probe_child``; reads one JSON job from standard input, writes one
JSON line a report to a pipe of its own, apart from whatever is printed.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import sys
import traceback
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from typing import TYPE_CHECKING, Any

import msgspec

from hwcore import binding, discovery
from hwcore.errors import PluginError
from hwcore.validation import Validator

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    Send = Callable[..., None]


class _NoTorch(Loader):
    """An import hook that refuses torch, so that no plugin gets to depend on it before setup()."""

    def find_spec(
        self, name: str, path: object = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        # A spec, so that libraries may ask whether torch is there; loading it is what fails.
        is_torch = name.partition(".")[0] == "torch"
        return ModuleSpec(name, self) if is_torch else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        message = (
            "torch must not be imported before setup(): a probe runs where importing torch, "
            "or the vendor's extension of it, may fail. Move the import into setup()"
        )
        raise ImportError(message, name=spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Stand for what create_module never lets happen."""


def main() -> None:
    """Probe every plugin of the job and report on each."""
    # A plugin that asked for the backend here would start a child, in which it asks again.
    discovery.in_probe = True
    job = json.load(sys.stdin)
    sys.stdin = open(os.devnull)  # noqa: SIM115 - for the life of the process
    os.set_inheritable(job["reports"], False)  # what a plugin starts must not hold it open
    reports = os.fdopen(job["reports"], "w")
    sys.path[:] = job["path"]
    sys.meta_path.insert(0, _NoTorch())

    def send(**report: Any) -> None:
        print(json.dumps(report), file=reports, flush=True)

    for index, fields in enumerate(job["origins"]):
        origin = discovery.Origin(**fields)
        report: dict[str, Any] = {
            "kind": "result",
            "index": index,
            "info": None,
            "hooks": (),
            "availability": None,
            "error": None,
            "file": None,
        }
        try:
            enter = functools.partial(send, kind="phase", index=index)
            _probe(origin, report, enter, job["only_automatic"])
        except PluginError as error:
            report["error"] = {
                "type": type(error).__name__,
                "message": str(error),
                "hook": error.hook,
                "traceback": traceback.format_exc(),
            }
        send(**report)


def _probe(
    origin: discovery.Origin, report: dict[str, Any], enter: Send, only_automatic: bool
) -> None:
    """Fill in a report as far as the plugin lets us; raise PluginError where it is broken."""
    enter(phase="import")
    plugin = discovery.load(origin)
    module = sys.modules.get(origin.value.partition(":")[0].strip())
    report["file"] = getattr(module, "__file__", None)
    functions = binding.hook_functions(plugin, origin)
    report["hooks"] = sorted(functions)
    if "backend_info" in functions:
        info = Validator(origin, functions).info()
        report["info"] = msgspec.to_builtins(info)
    binding.check_definitions(plugin, functions, origin)
    if only_automatic and not info.automatic:
        return
    enter(phase="probe")
    report["availability"] = dataclasses.asdict(Validator(origin, functions).availability())


if __name__ == "__main__":
    main()
