"""The groups themselves, and how a vendor's own test file runs them."""

from __future__ import annotations

import inspect
import pathlib

import pytest

from hwcore.hookspecs import HOOKS
from hwcore.testing.conformance.suite import GROUPS, ConformanceSuite, group_of

DOCS = pathlib.Path(__file__).parents[3] / "docs" / "conformance.md"


def conformance_tests():
    """Every test of every group: name to function."""
    return {
        name: function
        for group in GROUPS
        for name, function in vars(group).items()
        if name.startswith("test_")
    }


def test_every_hook_of_the_contract_has_a_test():
    about = {hook: [] for hook in HOOKS}
    for name, function in conformance_tests().items():
        about[function.conforms_to].append(name)
    assert [hook for hook, tests in about.items() if not tests] == []


def test_no_two_groups_have_a_test_of_one_name():
    count = sum(name.startswith("test_") for group in GROUPS for name in vars(group))
    assert count == len(conformance_tests())


def test_every_test_names_its_hook_and_its_group():
    names = {group.__module__.rpartition(".")[2] for group in GROUPS}
    for name, function in conformance_tests().items():
        assert function.conforms_to in HOOKS, name
        assert group_of(function) in names, name


def test_every_group_module_is_in_the_suite_and_in_the_docs():
    folder = pathlib.Path(inspect.getfile(ConformanceSuite)).parent / "groups"
    modules = {file.stem for file in folder.glob("[a-z]*.py")}
    assert modules == {group.__module__.rpartition(".")[2] for group in GROUPS}
    text = DOCS.read_text()
    for module in modules:
        assert f"| `{module}` |" in text


# --- A vendor's own test file ---------------------------------------------------------------------

VENDORS = """
    from hwcore.testing.conformance import ConformanceSuite


    class TestAcme(ConformanceSuite):
        backend = "acme"
"""


@pytest.fixture
def vendor(site):
    """Install `acme` with some body, and run a vendor's test file on it with pytest."""

    def run(body="", source=VENDORS, *options):
        site.add("acme", body)
        tests = site.folder / "tests"
        tests.mkdir()
        (tests / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
        (tests / "test_acme.py").write_text(inspect.cleandoc(source))
        return site.execute("-m", "pytest", "-q", str(tests), *options)

    return run


def test_a_file_of_five_lines_runs_every_test(vendor):
    done = vendor("", VENDORS, "-k", "not processes")  # which the command's tests run
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout.splitlines()[-1]
    assert "skipped" in done.stdout.splitlines()[-1]


def test_a_failure_in_a_vendors_file_names_the_hook(vendor):
    body = "@hwcore.hookimpl\ndef needs_cpu_fallback(self, tensor, purpose): return True\n"
    done = vendor(body, VENDORS, "-k", "cpu_tensors", "-p", "no:cacheprovider")
    assert done.returncode == 1
    assert "ConformanceError: needs_cpu_fallback: for a CPU tensor and `serialize` got True" in (
        done.stdout
    )


def test_a_plugin_that_is_refused_is_an_error_of_the_fixture(vendor):
    done = vendor("@hwcore.hookimpl\ndef memory_info(self, index=None): return 3\n")
    assert done.returncode == 1
    assert "PluginReturnError" in done.stdout
    assert "memory_info() got 3" in done.stdout
    assert done.stdout.splitlines()[-1].count("1 error") == 1, "said once"


def test_assertions_of_the_groups_are_rewritten(vendor):
    source = """
        import sys
        from hwcore.testing.conformance import ConformanceSuite

        def test_rewritten():
            for name, module in sys.modules.items():
                if name.startswith("hwcore.testing.conformance.groups."):
                    assert "@pytest_ar" in vars(module), name
    """
    done = vendor("", source)
    assert done.returncode == 0, done.stdout


def test_a_vendors_own_test_runs_in_the_same_class(vendor):
    source = """
        import hwcore
        from hwcore.cpu import CpuPlugin
        from hwcore.testing.conformance import ConformanceSuite, RawAccess, conforms

        class TestAcme(ConformanceSuite):
            backend = hwcore.Backend(CpuPlugin())
            raw = RawAccess()
            timeout_s = 7.0

            @conforms("create_stream")
            def test_own(self, kit, tmp_path):
                kit.same("the limit", kit.timeout_s, 7.0, "as set", "Hand it on")
                kit.same("priority", kit.hw.create_stream(priority=3).priority, 4, "no", "Fix it")
    """
    done = vendor("", source, "-k", "test_own or processes")
    assert done.returncode == 1
    assert "create_stream: priority got 3 (int); expected 4, no. Fix it." in done.stdout
    assert "1 failed" in done.stdout.splitlines()[-1]


def test_the_example_in_the_docs_is_the_one_tested_here():
    text = DOCS.read_text()
    assert inspect.cleandoc(VENDORS) in text
