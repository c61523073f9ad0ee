"""``hwcore.compile``: the policy decides, once; what it leaves alone is the plain function."""

from __future__ import annotations

import itertools
import logging
import threading
import time

import pytest
import torch

import hwcore
from hwcore import compilation
from hwcore.errors import ArgumentTypeError, PluginReturnError
from hwcore.types import CompilePolicy, CompileRequest

from ._plugins import Acme

ON = CompilePolicy(enabled=True, backend="eager")


class Plugin(Acme):
    """A device with a compiler; ``asked`` holds the requests."""

    def __init__(self, policy):
        self.policy = policy
        self.asked = []

    @hwcore.hookimpl
    def compile_policy(self, request):
        if request.name != "hwcore.validation":
            self.asked.append(request)
        return self.policy


def device(policy=ON):
    plugin = Plugin(policy)
    return plugin, hwcore.Backend(plugin)


@pytest.fixture
def compiled(monkeypatch):
    """Stand in for torch.compile: what it was given, and a function that says it was compiled."""
    calls = []

    def fake(model, **options):
        calls.append((model, options))
        return lambda *args, **kwargs: ("compiled", model(*args, **kwargs))

    monkeypatch.setattr(torch, "compile", fake)
    return calls


@pytest.fixture(autouse=True)
def no_reason_was_logged():
    compilation._log_once.cache_clear()


# --- Forms ----------------------------------------------------------------------------------------


def test_a_decorator_with_and_without_arguments(hw):
    @hwcore.compile
    def one(x):
        """One."""
        return x + 1

    @hwcore.compile(dynamic=True)
    def two(x, *, by=2):
        return x + by

    assert one(1) == 2
    assert two(1) == 3
    assert two(1, by=5) == 6
    assert one.__doc__ == "One."
    assert one.__name__ == "one"
    assert one.__qualname__.endswith("<locals>.one")
    assert one.__wrapped__(1) == 2


def test_a_method_is_compiled_as_a_method(compiled):
    plugin, backend = device()

    class Model:
        @hwcore.compile(backend=backend)
        def double(self, x):
            assert isinstance(self, Model)
            return 2 * x

        @staticmethod
        @hwcore.compile(backend=backend)
        def static(x):
            return 3 * x

        @classmethod
        @hwcore.compile(backend=backend)
        def of_class(cls, x):
            assert cls is Model
            return 4 * x

    assert Model().double(2) == Model().double(2) == ("compiled", 4)
    assert Model.static(2) == ("compiled", 6)
    assert Model().of_class(2) == ("compiled", 8)
    bound = Model()
    assert hwcore.compile(Model.double.__wrapped__.__get__(bound), backend=backend)(3)[1] == 6
    names = [request.name.rpartition("<locals>.")[2] for request in plugin.asked]
    assert names == ["Model.double", "Model.static", "Model.of_class", "Model.double"]


def test_a_module_is_resolved_at_once(compiled):
    plugin, backend = device()
    module = torch.nn.Linear(2, 2)
    result = hwcore.compile(module, backend=backend)
    assert [request.name for request in plugin.asked] == ["Linear"]
    assert compiled[0][0] is module
    assert result(torch.zeros(2))[0] == "compiled"
    off = device(CompilePolicy(enabled=False, reason="no compiler"))[1]
    assert hwcore.compile(module, backend=off) is module
    assert hwcore.compile(backend=off)(module) is module


def test_disable_returns_what_it_was_given():
    def function():
        pass

    plugin, backend = device()
    module = torch.nn.Linear(2, 2)
    assert hwcore.compile(function, disable=True, backend=backend) is function
    assert hwcore.compile(disable=True)(function) is function
    assert hwcore.compile(module, disable=True) is module
    assert plugin.asked == []


def test_a_callable_object_is_compiled(compiled):
    class Adder:
        def __call__(self, x):
            return x + 1

    plugin, backend = device()
    assert hwcore.compile(Adder(), backend=backend)(1) == ("compiled", 2)
    assert plugin.asked[0].name.endswith("Adder")


# --- Policy ---------------------------------------------------------------------------------------


def test_options_pass_through(compiled):
    plugin, backend = device()
    options = {"dynamic": False, "fullgraph": True, "mode": "max-autotune"}
    hwcore.compile(len, backend=backend, **options)("ab")
    hwcore.compile(len, backend=backend)("ab")
    assert plugin.asked == [CompileRequest("len", **options), CompileRequest("len")]
    assert compiled == [
        (len, {"backend": "eager", **options}),
        (len, {"backend": "eager", "dynamic": None, "fullgraph": False, "mode": None}),
    ]


def test_the_policys_mode_and_dynamic_win(compiled):
    policy = CompilePolicy(enabled=True, backend="acme", mode="reduce-overhead", dynamic=False)
    _, backend = device(policy)
    hwcore.compile(len, backend=backend, dynamic=True, mode="default")("ab")
    assert compiled[0][1] == {
        "backend": "acme",
        "dynamic": False,
        "fullgraph": False,
        "mode": "reduce-overhead",
    }


def test_torch_compiles_what_the_policy_enables():
    def compiler(graph, inputs):
        graphs.append(graph)
        return graph.forward

    graphs = []
    torch._dynamo.register_backend(compiler, name="hwcore_test")
    try:
        _, backend = device(CompilePolicy(enabled=True, backend="hwcore_test"))

        @hwcore.compile(fullgraph=True, backend=backend)
        def function(x):
            return x.sin() + 1

        x = torch.arange(3.0)
        for _ in range(2):
            assert torch.equal(function(x), x.sin() + 1)
        assert len(graphs) == 1
        module = hwcore.compile(torch.nn.Linear(3, 2), backend=backend)
        assert module(x).shape == (2,)
        assert len(graphs) == 2
    finally:
        torch._dynamo.reset()
        torch._dynamo.backends.registry._BACKENDS.pop("hwcore_test")
        torch._dynamo.backends.registry._COMPILER_FNS.pop("hwcore_test")


def test_a_policy_that_says_no_gives_its_reason_once_a_backend(caplog, compiled):
    off = CompilePolicy(enabled=False, reason="the compiler hangs")
    (_, one), (_, two) = device(off), device(CompilePolicy(enabled=False, reason="none"))
    with caplog.at_level(logging.WARNING, "hwcore"):
        for backend in (one, one, two):
            for _ in range(2):
                assert hwcore.compile(len, backend=backend)("ab") == 2
    assert [record.getMessage() for record in caplog.records] == [
        "torch.compile is off on backend acme: the compiler hangs. Functions run as written.",
        "torch.compile is off on backend acme: none. Functions run as written.",
    ]
    assert compiled == []


def test_the_policy_is_asked_at_the_first_call_and_not_again(compiled):
    plugin, backend = device()
    function = hwcore.compile(len, backend=backend)
    assert plugin.asked == []
    assert [function("ab") for _ in range(3)] == [("compiled", 2)] * 3
    assert len(plugin.asked) == len(compiled) == 1


def test_threads_that_call_at_once_resolve_alike(compiled):
    class Slow(Plugin):
        @hwcore.hookimpl
        def compile_policy(self, request):
            time.sleep(0.05)
            return super().compile_policy(request)

    plugin = Slow(ON)
    function = hwcore.compile(len, backend=hwcore.Backend(plugin))
    barrier, results = threading.Barrier(16), []

    def call():
        barrier.wait()
        results.append(function("ab"))

    threads = [threading.Thread(target=call) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [("compiled", 2)] * 16
    assert 1 <= len(plugin.asked) <= 16


def test_of_threads_that_call_at_once_the_first_to_resolve_decides_for_all(monkeypatch):
    barrier, numbers, results = threading.Barrier(4), itertools.count(), []

    def compile_slowly(model, **_):
        number = next(numbers)
        barrier.wait()  # all threads are past the question whether anybody has resolved yet
        time.sleep(0.05 * number)
        return lambda *_: number

    monkeypatch.setattr(torch, "compile", compile_slowly)
    function = hwcore.compile(len, backend=device()[1])
    threads = [threading.Thread(target=lambda: results.append(function("ab"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert {*results, function("ab")} == {results[0]}


def test_a_wrong_answer_for_one_function_is_named_and_asked_for_again(compiled):
    plugin, backend = device()
    function = hwcore.compile(len, backend=backend)
    plugin.policy = None
    with pytest.raises(PluginReturnError, match=r"compile_policy\(\) got None"):
        function("ab")
    plugin.policy = CompilePolicy(enabled=False)
    with pytest.raises(PluginReturnError, match=r"compile_policy\(\) field `reason` got ''"):
        function("ab")
    plugin.policy = ON
    assert function("ab") == ("compiled", 2)


def test_decorating_selects_no_backend(site):
    site.add("acme", "import pathlib; pathlib.Path('imported').touch()")
    code = """
        import os, sys, hwcore
        @hwcore.compile
        def one(x): return x
        @hwcore.compile(dynamic=True, fullgraph=True)
        def two(x): return x
        class Model:
            @hwcore.compile
            def forward(self, x): return x
        print("torch" in sys.modules, "HWCORE_BACKEND" in os.environ)
        print(two(3), os.environ["HWCORE_BACKEND"])
    """
    assert site.run(code, HWCORE_DISABLE_PLUGINS="acme").stdout == "False False\n3 cpu\n"
    assert not (site.folder / "imported").exists()


# --- Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model",
    [3, "f", torch.nn.Linear, dict, staticmethod(len), classmethod(len), property(len)],
    ids=lambda model: type(model).__name__,
)
@pytest.mark.parametrize("form", ["call", "decorator", "disabled"])
def test_what_is_no_function_is_refused(model, form):
    compiler = hwcore.compile if form == "call" else hwcore.compile(disable=form == "disabled")
    with pytest.raises(ArgumentTypeError) as caught:
        compiler(model)
    message = str(caught.value)
    assert message.startswith("hwcore.compile: `model` got ")
    assert "expected a function, method or torch.nn.Module instance" in message
    assert "below @staticmethod or @classmethod" in message


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("dynamic", 1, "expected True, False or None. Pass True, False or None."),
        ("dynamic", "yes", "expected True, False or None"),
        ("fullgraph", None, "expected True or False"),
        ("fullgraph", 1, "expected True or False"),
        ("mode", 3, "expected a mode of torch.compile, or None"),
        ("disable", "no", "expected True or False"),
        ("disable", None, "expected True or False"),
        ("backend", "inductor", "Pass hwcore.load_backend(name); the compiler is the compile pol"),
        ("backend", len, "expected a hwcore Backend, or None"),
    ],
)
def test_an_option_of_the_wrong_type_is_refused(option, value, expected):
    for arguments in ((len,), ()):
        with pytest.raises(ArgumentTypeError) as caught:
            hwcore.compile(*arguments, **{option: value})
        assert str(caught.value).startswith(f"hwcore.compile: `{option}` got {value!r}")
        assert expected in str(caught.value)
