"""The contract is complete, and says of every hook what a plugin author needs to know."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys

import pluggy
import pytest

from hwcore import hookspecs, types
from hwcore.hookspecs import API_VERSION, HOOKS, PROJECT, REQUIRED_HOOKS, HookSpecs

DESIGNED = re.findall(
    r"\w+",
    """
    backend_info probe setup
    device_string device_count set_device memory_info manual_seed generator synchronize
    create_stream create_event current_stream stream_context
    record_event wait_event wait_stream synchronize_stream synchronize_event query_event
    record_stream compile_policy needs_cpu_fallback pin_memory register_host_memory
    host_memory_policy create_graph graph_pool graph_capture is_capturing graph_replay
    plan_stream_policy kernels distributed_backend transfer_engines
    """,
)


# Parameters whose name says what they are.
OBVIOUS = {"device", "request", "seed", "pool", "stream", "tensor", "index"}


def test_every_hook_of_the_design_is_there():
    assert set(DESIGNED) <= set(HOOKS)
    assert set(HOOKS) - set(DESIGNED) == {"is_initialized"}
    functions = {name for name in vars(HookSpecs) if not name.startswith("_")}
    assert functions == set(HOOKS), "every function of the class is in the contract"


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_is_documented_and_typed(hook):
    function = getattr(HookSpecs, hook)
    text = inspect.getdoc(function)
    assert re.match(r"[A-Z][^\n]+\.\n|[A-Z][^\n]+\.$", text), "one summary line"
    assert ("*Required.*" in text) == (hook in REQUIRED_HOOKS)
    assert ("Default: " in text) == (hook not in REQUIRED_HOOKS)
    for name in HOOKS[hook].parameters:
        assert name in function.__annotations__, name
        assert name in text or name in OBVIOUS, name
    assert "return" in function.__annotations__


def test_annotations_name_what_exists():
    source = inspect.getsource(hookspecs)
    block = re.search(r"from hwcore.types import \((.*?)\)", source, re.DOTALL).group(1)
    names = {name.strip() for name in block.split(",") if name.strip()}
    assert names <= set(types.__all__)
    used = " ".join(
        str(annotation)
        for hook in HOOKS
        for annotation in getattr(HookSpecs, hook).__annotations__.values()
    )
    assert all(re.search(rf"\b{name}\b", used) for name in names)


def test_the_version_has_two_numbers():
    assert re.fullmatch(r"\d+\.\d+", API_VERSION)


def test_the_required_hooks_are_those_without_a_default():
    from hwcore.defaults import Defaults

    implemented = {
        name for name in dir(Defaults) if hasattr(getattr(Defaults, name), "hwcore_impl")
    }
    assert implemented == set(HOOKS) - set(REQUIRED_HOOKS)


def test_pluggy_sees_no_defaults_and_takes_the_first_result():
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(HookSpecs)
    for hook, signature in HOOKS.items():
        spec = getattr(manager.hook, hook).spec
        assert spec.argnames == tuple(signature.parameters)
        assert not spec.kwargnames
        assert spec.opts["firstresult"] is True


def test_callers_see_the_defaults():
    assert HOOKS["create_stream"].parameters["priority"].default == 0
    assert HOOKS["create_event"].parameters["blocking"].default is False
    assert HOOKS["graph_replay"].parameters["batch"].default is None
    assert HOOKS["set_device"].parameters["index"].default is inspect.Parameter.empty


TYPED = """
import hwcore
from hwcore.types import Stream

hw = hwcore.current_backend()
reveal_type(hw.create_stream)
reveal_type(hw.create_event())
reveal_type(hwcore.compile(len))
stream: Stream = hw.create_stream(priority=-1)
hw.wait_event(hw.create_event(enable_timing=True), stream)


@hwcore.compile(dynamic=True)
def double(x: int) -> int:
    return 2 * x


reveal_type(double)
hw.create_stream(priority="high")
hw.create_stream(speed=3)
hw.create_straem()
hw.wait_event(stream)
double("x")
"""


@pytest.mark.usefixtures("once")
@pytest.mark.slow
def test_a_type_checker_sees_the_signatures(tmp_path):
    file = tmp_path / "engine.py"
    file.write_text(TYPED)
    options = ("--strict", "--no-error-summary", "--no-pretty", "--cache-dir", tmp_path / "cache")
    config = ("--config-file", tmp_path / "none.ini")
    (tmp_path / "none.ini").write_text("[mypy]\n")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *map(str, (*options, *config, file))],
        capture_output=True,
        text=True,
        check=False,
    )
    lines = {}
    for line in done.stdout.splitlines():
        number, _, message = line.partition("engine.py:")[2].partition(": ")
        lines.setdefault(TYPED.splitlines()[int(number) - 1], []).append(message)
    (stream,) = lines.pop("reveal_type(hw.create_stream)")
    assert "device: torch._C.device | None =" in stream
    assert "priority: int =" in stream
    assert "-> hwcore.types.Stream" in stream
    (event,) = lines.pop("reveal_type(hw.create_event())")
    assert '"hwcore.types.Event"' in event
    assert "def (" in lines.pop("reveal_type(hwcore.compile(len))")[0]
    assert '"def (x: int) -> int"' in lines.pop("reveal_type(double)")[0].replace("builtins.", "")
    assert "[arg-type]" in lines.pop('hw.create_stream(priority="high")')[0]
    assert "[call-arg]" in lines.pop("hw.create_stream(speed=3)")[0]
    assert "[attr-defined]" in lines.pop("hw.create_straem()")[0]
    assert "[arg-type]" in lines.pop("hw.wait_event(stream)")[0]
    assert "[arg-type]" in lines.pop('double("x")')[0]
    assert lines == {}, "and nothing else is wrong"
