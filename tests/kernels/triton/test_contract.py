"""What a plugin relies on: names, arguments, and the conformance kit's word on them."""

import inspect
import subprocess
import sys

import pytest

import hwcore
from hwcore.cpu import CpuPlugin
from hwcore.kernels import references
from hwcore.kernels.triton import tuning
from hwcore.testing.conformance import RawAccess, run


def test_every_operation_of_the_core_has_a_kernel(kernels):
    assert set(kernels) == set(references())
    assert all(kernels[name] is not reference for name, reference in references().items())


@pytest.mark.parametrize("name", references())
def test_a_kernel_takes_what_its_reference_takes(kernels, name):
    # `ops` and `processor` are no part of a kernel's contract: the references say so.
    wanted = [
        (parameter.name, parameter.kind, parameter.default)
        for parameter in inspect.signature(references()[name]).parameters.values()
        if parameter.name not in ("ops", "processor")
    ]
    ours = inspect.signature(kernels[name]).parameters.values()
    assert [(parameter.name, parameter.kind, parameter.default) for parameter in ours] == wanted


def test_every_kernel_has_tuned_figures_that_say_where_they_were_measured(kernels):
    assert set(tuning.TUNED) == set(kernels)
    assert all(figures.measured for figures in tuning.TUNED.values())


@pytest.mark.parametrize(
    ("batch", "vocab", "splits"),
    [
        (0, 131072, 16),
        (1, 131072, 16),
        (8, 131072, 16),
        (16, 131072, 8),
        (128, 131072, 1),
        (1, 24576, 2),
        (1, 8192, 1),
        (1, 100, 1),
    ],
)
def test_a_row_is_read_by_several_programs_where_there_are_few_requests(batch, vocab, splits):
    assert tuning.splits_of_a_row(batch, vocab) == splits


class Interpreted(CpuPlugin):
    """The CPU, with Triton's interpreter for its kernels.

    Without build_tree: for the kit's large trees the interpreter takes half a minute. test_tree
    has smaller batches of them.
    """

    @hwcore.hookimpl
    def kernels(self):
        from hwcore.kernels import triton

        return {name: own for name, own in triton.kernels().items() if name != "build_tree"}


def test_the_conformance_kit_finds_no_fault(kernels, monkeypatch):
    """But for what it samples by the thousands, which test_sampling does with fewer."""
    monkeypatch.setitem(
        tuning.TUNED, "verify_tree_sampling", tuning.Tuning(block=1024, num_warps=4)
    )
    report = run(
        lambda: hwcore.Backend(Interpreted()),
        raw=RawAccess(),
        timeout_s=60.0,
        keyword="every_kernel_is or random_inputs or kernels_take_an_empty or coin",
    )
    assert report.failures == []
    assert [result.outcome for result in report.tests] == ["passed"] * 5


def python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    return done.stdout.strip() or done.stderr


def test_importing_the_package_imports_neither_triton_nor_torch():
    code = "import sys, hwcore.kernels.triton as t; print('triton' in sys.modules)"
    assert python(code) == "False"


def test_where_triton_is_missing_the_error_says_what_to_install():
    code = """if True:
        import sys
        sys.modules["triton"] = None
        import hwcore.kernels.triton
        try:
            hwcore.kernels.triton.kernels()
        except hwcore.errors.CapabilityError as error:
            print(error)
    """
    found = python(code)
    assert found.startswith("hwcore.kernels.triton: `triton` got ")
    assert "pip install 'hwcore[triton]'" in found
