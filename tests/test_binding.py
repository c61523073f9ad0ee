"""A plugin's functions become the backend's attributes: as they are, or adapted once."""

from __future__ import annotations

import functools
import inspect

import pytest
import torch

import hwcore
from hwcore import binding
from hwcore.hookspecs import HOOKS
from hwcore.types import BackendInfo

from ._plugins import INFO, Minimal, backend

# --- Plugin or default ----------------------------------------------------------------------------


def test_every_hook_is_an_attribute_with_the_contracts_signature(hw):
    hw.create_stream()  # now the device has been checked, and nothing is guarded any more
    for hook, signature in HOOKS.items():
        bound = inspect.signature(getattr(hw, hook)).parameters.values()
        if [p.kind for p in bound] == [
            inspect.Parameter.VAR_POSITIONAL,
            inspect.Parameter.VAR_KEYWORD,
        ]:
            continue  # still guarded: the device has not been checked
        expected = signature.parameters.values()
        assert [(p.name, p.default) for p in bound] == [(p.name, p.default) for p in expected]


def test_a_default_runs_only_where_the_plugin_lacks_the_hook():
    sources = hwcore.Backend(Minimal()).hook_sources()
    plugin = {hook for hook, source in sources.items() if source == "plugin"}
    assert plugin == {"backend_info", "probe", "is_initialized"}
    assert set(sources) == set(HOOKS)
    assert {source for hook, source in sources.items() if hook not in plugin} == {"default"}


def test_a_hook_that_returns_none_is_still_the_one_that_ran():
    replays = []

    class Graph:
        def replay(self):
            replays.append("default")

    @hwcore.hookimpl
    def graph_replay(self, graph):
        replays.append("plugin")

    hw = backend(graph_replay=graph_replay)
    assert hw.graph_replay(Graph()) is None
    assert replays == ["plugin"]

    class Tracer:
        @hwcore.hookimpl(wrapper=True)
        def graph_replay(self):
            return (yield)

    hw.register(Tracer())
    assert hw.graph_replay(Graph()) is None
    assert replays == ["plugin", "plugin"]
    backend().graph_replay(Graph())
    assert replays == ["plugin", "plugin", "default"]


def test_two_backends_share_nothing():
    class Tracer:
        @hwcore.hookimpl(wrapper=True)
        def device_count(self):
            yield
            return 7

    plugin = Minimal()
    one, two = hwcore.Backend(plugin), hwcore.Backend(plugin)
    one.register(Tracer())
    assert one.device_count() == 7
    assert two.device_count() == 1
    assert one._pluggy is not two._pluggy


# --- The forms of an implementation ---------------------------------------------------------------


def test_a_full_implementation_is_bound_as_it_is():
    @hwcore.hookimpl
    def wait_stream(self, waiter, producer):
        pass

    hw = backend(wait_stream=wait_stream)
    assert hw.wait_stream.__func__ is wait_stream


def test_a_full_implementation_without_defaults_runs_in_no_second_frame():
    @hwcore.hookimpl
    def synchronize(self, device):
        seen.append((device, inspect.stack()[1].function))

    seen = []
    hw = backend(synchronize=synchronize)
    hw.synchronize()
    hw.synchronize(torch.device("cpu"))
    hw.synchronize(device=torch.device("cpu"))
    here = "test_a_full_implementation_without_defaults_runs_in_no_second_frame"
    cpu = torch.device("cpu")
    assert seen == [(None, here), (cpu, here), (cpu, here)]
    assert inspect.signature(synchronize).parameters["device"].default is inspect.Parameter.empty


def test_the_callers_defaults_are_the_contracts():
    @hwcore.hookimpl
    def synchronize(self, device=3):
        seen.append(device)

    seen = []
    backend(synchronize=synchronize).synchronize()
    assert seen == [None]


def fewer(self, fn):
    return fn, None, None, None


def none(self):
    return None, None, None, None


def reordered(self, stream, pool, fn, graph):
    return fn, graph, pool, stream


def only_last(self, stream):
    return None, None, None, stream


def in_order(self, graph, fn, pool, stream):
    return fn, graph, pool, stream


def own_defaults(self, graph, fn, pool=1, stream=2):
    return fn, graph, pool, stream


def positional_only(self, graph, fn, pool, stream, /):
    return fn, graph, pool, stream


@functools.wraps(in_order)
def wrapped(*args, **kwargs):
    return in_order(*args, **kwargs)


def closure(extra):
    def implementation(self, graph, fn, pool, stream):
        assert extra == 1
        return fn, graph, pool, stream

    return implementation


@pytest.mark.parametrize(
    "function",
    [
        fewer,
        none,
        reordered,
        only_last,
        in_order,
        own_defaults,
        positional_only,
        wrapped,
        closure(1),
    ],
    ids=lambda function: function.__name__,
)
@pytest.mark.parametrize("kind", ["method", "classmethod", "staticmethod"])
def test_each_argument_arrives_at_its_parameter(function, kind):
    names = set(inspect.signature(function).parameters)
    if kind == "classmethod":
        marked = classmethod(hwcore.hookimpl(function))
    elif kind == "staticmethod":
        static = functools.partial(function, None)
        parameters = list(inspect.signature(function).parameters)[1:]
        marked = staticmethod(
            hwcore.hookimpl(
                eval(
                    f"lambda {', '.join(parameters)}: static({', '.join(parameters)})",
                    {"static": static},
                )
            )
        )
    else:
        marked = hwcore.hookimpl(function)
    hw = backend(graph_capture=marked)

    def expected(pool, stream):
        given = {"fn": "f", "graph": "g", "pool": pool, "stream": stream}
        return tuple(given[name] if name in names else None for name in given)

    assert hw.graph_capture("g", "f") == expected(None, None)
    assert hw.graph_capture("g", "f", "p", "s") == expected("p", "s")
    assert hw.graph_capture(stream="s", fn="f", graph="g") == expected(None, "s")
    with pytest.raises(TypeError):
        hw.graph_capture("g")
    with pytest.raises(TypeError):
        hw.graph_capture("g", "f", size=3)


def test_an_implementation_may_have_another_name():
    class Plugin(Minimal):
        @hwcore.hookimpl(specname="graph_pool")
        def make_pool(self):
            return "pool"

    hw = hwcore.Backend(Plugin())
    assert hw.graph_pool() == "pool"
    assert hw.hook_sources()["graph_pool"] == "plugin"


def test_a_hook_of_a_newer_contract_may_be_optional():
    class Plugin(Minimal):
        @hwcore.hookimpl(optionalhook=True)
        def teleport(self, tensor):
            pass

    assert "teleport" not in hwcore.Backend(Plugin()).hook_sources()


def test_bind_gives_every_default_hook_the_contracts_signature():
    from hwcore.defaults import Defaults

    for hook, signature in HOOKS.items():
        if hook in ("backend_info", "probe"):
            continue
        bound = binding.bind(hook, getattr(Defaults(BackendInfo(**INFO)), hook))
        got = [(p.name, p.default) for p in inspect.signature(bound).parameters.values()]
        assert got == [(p.name, p.default) for p in signature.parameters.values()]


def test_device_is_a_torch_device(hw):
    assert hw.device() == torch.device(hw.device_string())
    assert hw.device(0).type == hw.info.device_type
    assert repr(hw) == f"<hwcore.Backend {hw.info.name!r} from {hw.origin.distribution}>"
