"""The real torch_npu, on stub libraries: it has what the plugin calls, as the plugin calls it.

Run by ``make contract``, in an environment of its own. Signatures alone: *not run on the device*.
"""

from __future__ import annotations

import ast
import inspect
import os
import pathlib
import re
import subprocess
import sys
import time
from importlib import metadata

import fake_torch_npu
import pytest
import torch

import hwcore
import hwcore_npu
from hwcore.errors import SetupError
from hwcore.graphs import native_captures
from hwcore.kernels import references
from hwcore.machine import Machine
from hwcore_npu import graphs, probe
from hwcore_npu.plugin import NpuPlugin

PACKAGE = pathlib.Path(hwcore_npu.__file__).parent
LOADER = "LD_LIBRARY_PATH"


@pytest.fixture(scope="session", autouse=True)
def npu():
    """Import torch_npu as the plugin does, and return ``torch.npu``."""
    with pytest.raises(SetupError, match=r"got 0 devices from torch_npu\.npu"):
        hwcore.Backend(NpuPlugin())
    assert "torch_npu" in sys.modules
    return torch.npu


def test_it_is_the_real_one():
    assert metadata.version("torch_npu") == "2.13.0"
    assert pathlib.Path(sys.modules["torch_npu"].__file__).with_name("lib").is_dir()


# --- Calls ----------------------------------------------------------------------------------------


def receivers(npu):
    """What each name in the plugin's source stands for."""
    graph = npu.NPUGraph
    return {
        **dict.fromkeys(MODULE, npu),
        "graph": graph,
        "self.native": graph,
        "mode": graph_dispatch_mode(),
        "graph.graph_dispatch_mode": graph_dispatch_mode(),
        "self.native.graph_dispatch_mode": graph_dispatch_mode(),
        "stream": npu.Stream,
        "side": npu.Stream,
        "event": npu.Event,
        "self._replayed": npu.Event,
        "self._updated": npu.Event,
    }


def graph_dispatch_mode():
    return sys.modules["torch_npu.npu.graphs"]._GraphDispatchMode


# What the core does with a device's module, for the plugin.
CORE = [
    pathlib.Path(hwcore.__file__).with_name("device_module.py"),
    pathlib.Path(native_captures.__file__),
]
MODULE = ("npu", "self._npu", "self._module", "module")

# Hooks hand a graph of the plugin's own to its methods of these names; `device` of a stream is
# torch's. `graph_dispatch_mode` and the records are attributes that an instance gets.
OWN = {("graph", "capture"): "device_module.py", ("graph", "replay"): "plugin.py"}
OF_INSTANCES = {"graph_dispatch_mode", "graph_dispatch_records"}


def uses():
    """Yield file, line, receiver, attribute and, for a call, its node."""
    for file in [*sorted(PACKAGE.glob("*.py")), *CORE]:
        tree = ast.parse(file.read_text())
        calls = {id(n.func): n for n in ast.walk(tree) if isinstance(n, ast.Call)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                place = f"{file.name}:{node.lineno}"
                yield place, ast.unparse(node.value), node.attr, calls.get(id(node))


def test_every_use_of_torch_npu_is_in_the_real_one(npu):
    found, checked = receivers(npu), set()
    for place, receiver, attribute, call in uses():
        if receiver not in found or attribute in OF_INSTANCES:
            continue
        if place.startswith(OWN.get((receiver, attribute), "-")):
            continue
        owner = found[receiver]
        assert hasattr(owner, attribute), f"{place}: torch_npu has no {receiver}.{attribute}"
        real = getattr(owner, attribute)
        checked.add((receiver, attribute))
        if call is None:
            continue
        signature = inspect.signature(real)
        unbound = [None] if inspect.isclass(owner) and inspect.isfunction(real) else []
        named = {keyword.arg: None for keyword in call.keywords}
        # Named as such: a `**kwargs` takes anything, and torch_npu's C++ does not.
        assert named.keys() <= signature.parameters.keys(), f"{place}: {receiver}.{attribute}"
        try:
            signature.bind(*unbound, *call.args, **named)
        except TypeError as error:
            pytest.fail(f"{place}: {receiver}.{attribute}{signature}: {error}")
    print("\nchecked:", ", ".join(sorted(f"{r}.{a}" for r, a in checked)))
    for needed in ("graph", "NPUGraph", "Stream", "Event", "graph_pool_handle", "mem_get_info"):
        assert {(name, needed) for name in MODULE} & checked, needed
    assert ("self.native", "update") in checked


def test_the_generic_calls_of_the_core_reach_it_too(npu):
    for name in ("device_count", "is_initialized", "synchronize", "set_device", "mem_get_info"):
        inspect.signature(getattr(npu, name))
    assert issubclass(npu.Stream, torch.Stream)
    assert issubclass(npu.Event, torch.Event)
    for method in ("record", "wait", "query", "synchronize", "elapsed_time"):
        assert callable(getattr(npu.Event, method))
    for method in ("wait_event", "wait_stream", "record_event", "query", "synchronize"):
        assert callable(getattr(npu.Stream, method))


def test_the_device_count_makes_no_context(npu):
    npu.device_count()
    assert not npu.is_initialized()


# --- Graphs ---------------------------------------------------------------------------------------


def test_each_operator_keeps_its_lengths_where_the_plugin_looks(npu):
    handlers = sys.modules["torch_npu.npu.graphs"]._NPU_GRAPH_OP_HANDLERS
    seen = set()
    for name, handler in handlers.items():
        operator = name.partition(".")[0]
        if operator in graphs.LENGTHS:
            key, place, _ = graphs.LENGTHS[operator]
            assert ("arg", place, key) in handler.UPDATE_SPECS[name]
            seen.add(operator)
    assert seen == graphs.LENGTHS.keys()


def test_records_hold_what_the_plugin_reads():
    record = sys.modules["torch_npu.npu.graphs"]._GraphDispatchRecord
    fields = {field.name for field in record.__dataclass_fields__.values()}
    assert fields == {
        field.name for field in fake_torch_npu.GraphDispatchRecord.__dataclass_fields__.values()
    }


def test_an_update_stream_and_records_belong_to_the_dispatch_mode():
    mode = graph_dispatch_mode()
    assert mode.update_stream is None  # until the first graph
    source = inspect.getsource(mode.__init__)
    assert "self.graph_dispatch_records = []" in source


# --- Fakes ----------------------------------------------------------------------------------------


def shape(function):
    """Return the names, kinds and defaults of parameters."""
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


def fakes(npu):
    """Yield each function that is faked, its name and the real one."""
    pairs = {
        fake_torch_npu.NPUGraph: npu.NPUGraph,
        fake_torch_npu.GraphDispatchMode: graph_dispatch_mode(),
        fake_torch_npu.graph: npu.graph,
        fake_torch_npu.Event: npu.Event,
    }
    for fake, real in pairs.items():
        for name, function in vars(fake).items():
            if inspect.isfunction(function):
                yield f"{fake.__name__}.{name}", function, getattr(real, name)
    yield "graph_pool_handle", fake_torch_npu.graph_pool_handle, npu.graph_pool_handle


def test_what_is_faked_has_the_signatures_of_the_real_one(npu):
    checked = []
    for name, fake, real in fakes(npu):
        assert shape(fake) == shape(real), name
        checked.append(name)
    assert "NPUGraph.update" in checked
    assert "graph.__init__" in checked


def test_the_faked_operators_are_those_that_torch_npu_records():
    handlers = sys.modules["torch_npu.npu.graphs"]._NPU_GRAPH_OP_HANDLERS
    known = {name.partition(".")[0] for name in handlers}
    assert fake_torch_npu.OPERATORS.keys() <= known
    for operator, key in fake_torch_npu.KEYS.items():
        specs = [
            spec
            for name, handler in handlers.items()
            if name.partition(".")[0] == operator
            for spec in handler.UPDATE_SPECS[name]
        ]
        assert key in {spec[2] for spec in specs}


def test_a_capture_that_cannot_begin_or_end_is_left_as_the_fake_leaves_it(npu):
    """The flaw that the plugin mends: what leaves stream and mode comes after what can raise."""
    begin, end = inspect.getsource(npu.graph.__enter__), inspect.getsource(npu.graph.__exit__)
    assert "try" not in begin + end
    assert begin.index("stream_ctx.__enter__") < begin.index("capture_begin")
    assert end.index("capture_end") < end.index("stream_ctx.__exit__")


# --- Kernels --------------------------------------------------------------------------------------


def test_it_has_no_operator_of_the_cores():
    known = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("npu::")}
    assert len(known) > 100
    assert not {f"npu::{name}" for name in references()} & {n.partition(".")[0] for n in known}
    assert NpuPlugin().kernels() == {}


# --- Without the libraries ------------------------------------------------------------------------


def child(code, **variables):
    kept = {
        k: v for k, v in os.environ.items() if k not in (LOADER, "TORCH_DEVICE_BACKEND_AUTOLOAD")
    }
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**kept, **variables},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_with_the_libraries_the_probe_finds_nothing_wrong_but_the_device(tmp_path):
    for name in ("davinci0", "davinci_manager"):
        (tmp_path / "dev").mkdir(exist_ok=True)
        (tmp_path / "dev" / name).touch()
    began = time.perf_counter()
    assert probe.availability(Machine(root=tmp_path)).ok
    assert time.perf_counter() - began < 2


def test_without_them_import_torch_fails_and_the_probe_foresees_it():
    assert "Failed to load the backend extension: torch_npu" in child("import torch").stderr
    done = child("from hwcore_npu import probe; print(probe.availability())")
    assert "`import torch` fails here" in done.stdout, done.stderr


def test_without_them_another_backend_runs():
    done = child("import hwcore; print(hwcore.use('cpu').info.name)")
    assert done.stdout.strip() == "cpu", done.stderr


def test_without_them_setup_names_the_library():
    code = "import hwcore; from hwcore_npu.plugin import NpuPlugin; hwcore.Backend(NpuPlugin())"
    done = child(code, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    last = done.stderr.strip().splitlines()[-1]
    assert re.match(r"hwcore\.errors\.SetupError: .*lib\w+\.so: cannot open shared object", last)
