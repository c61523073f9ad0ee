"""With any one operator missing the core gives the same, or says which, of whom, and what to do."""

import ast
import dataclasses
import pathlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hwcore
from hwcore.errors import CapabilityError
from hwcore.kernels import torch_ops
from hwcore.kernels.torch_ops import OPERATORS, asked
from hwcore.testing.sanitizer import Sanitizer

from ._backends import answering
from ._parts import PARTS

EVERY_DEVICE = {
    # what makes tensors
    *("arange", "empty", "empty_strided", "full", "full_like", "lift_fresh", "new_empty"),
    *(
        "empty_like",
        "new_full",
        "new_zeros",
        "ones",
        "ones_like",
        "scalar_tensor",
        "zeros",
        "zeros_like",
    ),
    *("fill_", "masked_fill_", "zero_"),
    # what copies them whole
    *("copy_", "_to_copy", "clone", "cat", "stack", "repeat", "constant_pad_nd", "_foreach_copy_"),
    "record_stream",
    # elementwise, and not tagged so by torch
    "floor_divide",
}


def on_device_only(request):
    if request.config.getoption("backend") != "sim":
        pytest.skip("only a simulated device can be without an operator")


@pytest.fixture
def denied(request):
    on_device_only(request)
    from hwcore_sim import device

    # torch makes one that works in place of the other, or not, as it sees fit.
    return lambda operator: device.denied(*{operator, asked(operator)})


@pytest.fixture(scope="module")
def uses(hw):
    """Names of operators, as the hook is asked, by the part that runs them."""
    found = {}
    for name, run in PARTS.items():
        backend, _ = answering(hw, on_cpu=map(asked, OPERATORS))
        run(backend)
        found[name] = {op for op, times in torch_ops(backend).on_cpu.items() if times}
    return found


def plain(results):
    """Return results as lists, with dtypes and shapes."""
    if dataclasses.is_dataclass(results):
        fields = dataclasses.fields(results)
        return [(field.name, plain(getattr(results, field.name))) for field in fields]
    if isinstance(results, (list, tuple)):
        return [plain(result) for result in results]
    if isinstance(results, torch.Tensor):
        return results.dtype, results.shape, results.device.type, results.tolist()
    return results


@pytest.fixture(scope="module")
def expected(hw):
    return {name: plain(run(hw)) for name, run in PARTS.items()}


def users(uses, operator):
    return [name for name in PARTS if asked(operator) in uses[name]]


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_operator_of_the_list_has_a_user(uses, operator):
    assert users(uses, operator), "take it off the list, or enter its user in STEPS or PARTS"


@pytest.mark.parametrize("name", PARTS)
def test_with_every_operator_on_the_cpu_the_results_are_the_same(hw, late, expected, name):
    backend, _ = answering(hw, on_cpu=map(asked, OPERATORS))
    assert plain(PARTS[name](backend)) == expected[name]


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_denied_operator_runs_on_the_cpu_with_the_same_results(
    hw, late, denied, uses, expected, operator
):
    for name in users(uses, operator):
        with denied(operator):
            backend, _ = answering(hw)
            assert plain(PARTS[name](backend)) == expected[name]
        counts = torch_ops(backend).on_cpu
        assert set(counts) == {asked(operator)}
        assert counts[asked(operator)] > 0


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_denied_operator_of_which_the_plugin_says_no_is_named_with_backend_and_hook(
    hw, denied, uses, operator
):
    for name in users(uses, operator):
        backend, _ = answering(hw, on_device=[asked(operator)])
        with denied(operator), pytest.raises(CapabilityError) as caught:
            PARTS[name](backend)
        message = str(caught.value)
        assert message.startswith(f"hwcore: backend `sim` has no `{asked(operator)}` (aten::")
        assert f"needs_cpu_fallback(tensor, '{asked(operator)}')" in message
        assert isinstance(caught.value.__cause__, NotImplementedError)


@pytest.mark.parametrize("name", PARTS)
def test_what_runs_on_the_cpu_does_not_race(hw, in_any_order, name):
    backend, _ = answering(hw, on_cpu=map(asked, OPERATORS))
    with Sanitizer(backend):
        PARTS[name](backend)


@pytest.mark.parametrize("name", PARTS)
def test_under_debugging_a_denied_operator_gives_the_same(
    hw, denied, uses, expected, monkeypatch, name
):
    monkeypatch.setenv("HWCORE_DEBUG", "1")
    for operator in OPERATORS:
        if asked(operator) in uses[name]:
            with denied(operator):
                backend, _ = answering(hw)
                assert plain(PARTS[name](backend)) == expected[name]


class Watch(TorchDispatchMode):
    """Collects the operators that are called with tensors of the device."""

    def __init__(self, device_type):
        super().__init__()
        self.device_type, self.seen = device_type, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs, result))
        if any(
            isinstance(it, torch.Tensor) and it.device.type == self.device_type for it in leaves
        ):
            self.seen.add(func)
        return result


@pytest.mark.parametrize("run", PARTS.values(), ids=PARTS)
def test_the_core_calls_nothing_that_a_device_may_lack_and_the_list_does_not_have(
    request, hw, run, monkeypatch
):
    on_device_only(request)
    monkeypatch.setenv("HWCORE_DEBUG", "0")  # debugging looks at what the tensors hold
    with Watch(hw.info.device_type) as watch:
        run(hw)
    assert watch.seen
    known = {*map(asked, OPERATORS), *EVERY_DEVICE}
    unknown = {
        func
        for func in watch.seen
        if torch.Tag.pointwise not in func.tags
        and not func.is_view
        and known.isdisjoint(forms(func))
    }
    assert not unknown, "put it into OPERATORS and call it through ops, or do without"


def forms(func):
    """Return the names under which an operator may be listed."""
    name = func.overloadpacket.__name__
    bare = name.strip("_").removesuffix("_impl")
    return {name, bare}


def test_the_core_reaches_the_operators_of_the_list_through_ops_alone():
    package = pathlib.Path(hwcore.__file__).parent
    direct = []
    for file in [*package.glob("kernels/*.py"), *package.glob("overlap/*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                of = ast.unparse(node.func.value)
                if node.func.attr in OPERATORS and not of.endswith("ops"):
                    direct.append(f"{file.name}:{node.lineno}: {ast.unparse(node)[:60]}")
    assert direct == []
