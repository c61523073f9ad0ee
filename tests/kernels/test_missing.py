"""An operator that the device lacks, and of which its plugin has not said so, is named."""

import functools
import types

import pytest
import torch

import hwcore
from hwcore import discovery
from hwcore.errors import CapabilityError
from hwcore.kernels import explain_missing, explains_missing, gather_rows, kernel, torch_ops
from hwcore.overlap import FutureMap, RelayPayload, RelaySpec

from ._backends import answering

SPARSE = torch.eye(3).to_sparse()
INDEX = torch.tensor([0])

# torch's own words, of a kind of tensor that really lacks these.
REALLY_MISSING = {
    "cumsum": lambda: torch.cumsum(SPARSE, 0),
    "index_copy": lambda: torch.index_copy(SPARSE, 0, INDEX, SPARSE),
    "scatter": lambda: torch.Tensor.scatter_(SPARSE, 0, INDEX.view(1, 1), 1.0),
    "searchsorted": lambda: torch.searchsorted(SPARSE, SPARSE),
    "softmax": lambda: torch.softmax(SPARSE, 0),  # it is _softmax that is missing
    "sort": lambda: torch.sort(SPARSE),  # sort.stable
    "topk": lambda: torch.topk(SPARSE, 2),
}
IN_WORDS = {
    "Could not run 'aten::cumsum.out' with arguments from the 'acme' backend.": "cumsum",
    "Could not run 'aten::topk.values' with arguments from the 'AutogradAcme' backend.": "topk",
    "The operator 'aten::sort.stable' is not currently implemented for the X device.": "sort",
    "aten::searchsorted.Tensor: attempted to run this operator with X tensors": "searchsorted",
}
OTHERS_WORDS = [
    "\"topk\" not implemented for 'Half'",
    "the derivative for 'topk' is not implemented",
    "There were no tensor arguments, but no fallback function is registered for schema aten::_cat",
    "Could not run 'acme::topk' with arguments from the 'CPU' backend.",
    "acme: no kernel for aten::topk yet",
]


def as_the_core(function):
    """Return a function of this file as one of the core's."""
    core = {**function.__globals__, "__name__": "hwcore.part"}
    return types.FunctionType(function.__code__, core, closure=function.__closure__)


def explained(hw, call):
    with pytest.raises(CapabilityError) as caught, explains_missing(hw):
        as_the_core(call)()
    assert isinstance(caught.value.__cause__, NotImplementedError)
    return str(caught.value)


def raises(words):
    raise NotImplementedError(words)


raise_in_core = as_the_core(raises)


@pytest.mark.parametrize("name", REALLY_MISSING)
def test_torchs_error_names_operator_backend_and_hook(hw, name):
    message = explained(hw, REALLY_MISSING[name])
    assert message.startswith(f"hwcore: backend `{hw.info.name}` has no `{name}` (aten::")
    assert f"Return True from the plugin's needs_cpu_fallback(tensor, '{name}')" in message


@pytest.mark.parametrize(("words", "name"), IN_WORDS.items())
def test_every_way_to_say_so_is_understood(hw, words, name):
    message = explained(hw, lambda: raise_in_core(words))
    assert f"has no `{name}` (aten::" in message


@pytest.mark.parametrize("words", OTHERS_WORDS)
def test_what_says_something_else_is_left_as_it_is(hw, words):
    with pytest.raises(NotImplementedError) as caught, explains_missing(hw):
        raises(words)
    assert str(caught.value) == words


def test_other_errors_pass(hw):
    with pytest.raises(KeyError), explains_missing(hw):
        raise KeyError


def test_of_an_operator_that_is_never_asked_for_it_is_not_the_hook_that_helps(hw):
    message = explained(hw, lambda: torch.ops.aten._index_put_impl_(SPARSE, [INDEX], torch.ones(1)))
    assert "has no `index_put` (aten::_index_put_impl_)" in message
    assert "without asking needs_cpu_fallback" in message
    assert "Return True" not in message


def test_of_an_operator_that_runs_on_the_cpu_where_the_core_asks_it_is_not_either(hw):
    backend, _ = answering(hw, on_cpu=["topk"])
    torch.ones(1, device=hw.device())
    torch_ops(backend).bind()
    message = explained(backend, REALLY_MISSING["topk"])
    assert "said False" not in message


def test_the_clause_for_hot_paths_says_the_same(hw):
    def part():
        try:
            torch.topk(SPARSE, 2)
        except NotImplementedError as error:
            explain_missing(hw, error)
            raise

    with pytest.raises(CapabilityError, match="has no `topk`"):
        part()


def test_a_block_may_be_entered_again(hw):
    block = explains_missing(hw)
    for _ in range(2):
        with pytest.raises(CapabilityError), block:
            torch.sort(SPARSE)


# --- What a plugin or a user calls ----------------------------------------------------------------


def own_kernel(*_):
    return REALLY_MISSING["topk"]()


def with_kernel(hw, function):
    plugin = discovery.load(hw.origin)
    own = {"gather_rows": function}
    named = type("Own", (type(plugin),), {"kernels": hwcore.hookimpl(lambda self: own)})
    return hwcore.Backend(named())


@pytest.mark.parametrize(
    "function",
    [own_kernel, functools.partial(torch.topk, SPARSE), lambda *_: raises("aten::topk: no")],
    ids=["written in Python", "native", "raising itself"],
)
def test_what_a_plugins_own_kernel_lacks_is_not_laid_to_the_hook(hw, function):
    backend = with_kernel(hw, function)
    with pytest.raises(NotImplementedError), explains_missing(backend):
        kernel(backend, gather_rows)(2)


def test_nor_by_the_part_that_runs_the_kernel(hw):
    backend = with_kernel(hw, own_kernel)
    rows = torch.tensor([1], device=hw.device())
    with FutureMap(RelaySpec(pool_size=3), backend=backend) as relay:
        relay.stash(rows, RelayPayload(rows))
        with pytest.raises(NotImplementedError, match="topk"):
            relay.resolve(rows)


def test_a_plugins_kernel_is_called_with_what_it_is_given_and_keeps_its_name(hw):
    backend = with_kernel(hw, lambda *given: given)
    assert kernel(backend, gather_rows)(1, 2, 3) == (1, 2, 3)
    assert kernel(with_kernel(hw, own_kernel), gather_rows).__name__ == "own_kernel"


def test_what_a_users_function_lacks_is_not_laid_to_the_hook_either(hw):
    def processor():
        torch.topk(SPARSE, 2)

    with pytest.raises(NotImplementedError), explains_missing(hw):
        processor()
