"""``hwcore conformance``: it always ends, names hooks at fault, and has an exit status."""

from __future__ import annotations

import json
import pathlib
from xml.etree import ElementTree

import msgspec
import pytest

from hwcore.testing.conformance.report import Report

from ...conftest import PluginSite  # noqa: TID252 - tests are no package

COMMAND = ("-m", "hwcore.cli", "conformance", "--backend")
ACME = "plugin `acme` (hwcore-acme 1.0)"


def conformance(site, backend, *options, **variables):
    """Run the command and return its exit status and its report, checked by the schema."""
    done = site.execute(*COMMAND, backend, "--json", "-", *options, **variables)
    report = msgspec.json.decode(done.stdout, type=Report)
    assert report.exit_code == done.returncode, done.stderr
    return done.returncode, report


def failures(report):
    return {failure.hook: failure for failure in report.failures}


@pytest.fixture(scope="module")
def cpu(tmp_path_factory):
    """What a whole run on the cpu wrote: status, text, report and JUnit file."""
    site = PluginSite(tmp_path_factory.mktemp("site"))
    files = ("--json", str(site.folder / "r.json"), "--junit", str(site.folder / "r.xml"))
    done = site.execute(*COMMAND, "cpu", *files)
    report = msgspec.json.decode((site.folder / "r.json").read_bytes(), type=Report)
    return done, report, ElementTree.parse(site.folder / "r.xml").getroot()


# --- A backend that conforms ----------------------------------------------------------------------


def test_the_cpu_conforms(cpu):
    done, report, _ = cpu
    assert done.returncode == 0, done.stdout + done.stderr
    assert (report.exit_code, report.failures, report.error) == (0, [], None)
    assert report.backend.name == "cpu"
    assert report.backend.distribution == "hwcore"


def test_what_the_cpu_lacks_is_skipped_and_counted(cpu):
    _, report, _ = cpu
    skipped = {feature.name: feature.tests for feature in report.features_skipped}
    assert {"async_streams", "pinned_memory", "multi_device", "compile"} <= set(skipped)
    assert "float64" not in skipped
    counted = sum(group.skipped for group in report.groups)
    assert counted == sum(map(len, skipped.values())) > 0


def test_quirks_are_listed_with_the_tests_they_adapted(cpu):
    _, report, _ = cpu
    adapted = {quirk.name: quirk.tests for quirk in report.quirks}
    assert set(adapted) == {"capture_executes", "unindexed_device"}
    assert "identity::test_torch_takes_every_device_string" in adapted["unindexed_device"]
    assert sum(group.adapted for group in report.groups) == 2


def test_the_text_fits_80_columns_and_has_every_group(cpu):
    done, report, _ = cpu
    assert max(map(len, done.stdout.splitlines())) <= 80
    for group in report.groups:
        assert group.name in done.stdout
    assert "conforms (exit status 0" in done.stdout


def test_junit_says_what_the_json_says(cpu):
    _, report, root = cpu
    (suite,) = root
    assert suite.get("tests") == str(len(report.tests)) == str(len(suite))
    assert suite.get("failures") == "0"
    skipped = [case.get("name") for case in suite if case.find("skipped") is not None]
    assert sorted(skipped) == sorted(t.name for t in report.tests if t.outcome == "skipped")


def test_groups_stand_in_their_own_order(cpu):
    _, report, _ = cpu
    assert [group.name for group in report.groups][:4] == [
        "identity",
        "memory",
        "streams",
        "waiting",
    ]


def test_some_tests_can_be_run_alone(site):
    status, report = conformance(site, "cpu", "-k", "wait_event and ordering")
    assert status == 0
    assert {test.hook for test in report.tests} == {"wait_event"}
    assert {test.group for test in report.tests} == {"ordering"}


WRONG = """
    @hwcore.hookimpl
    def needs_cpu_fallback(self, tensor, purpose):
        return True
"""

# --- A plugin that does not conform ---------------------------------------------------------------


def test_a_failure_names_the_hook_and_what_to_do(site):
    site.add("acme", WRONG)
    status, report = conformance(site, "acme", "-k", "cpu_fallback")
    assert status == 1
    (message,) = set(failures(report)["needs_cpu_fallback"].messages)
    assert message.startswith("needs_cpu_fallback: for a CPU tensor and `serialize` got True")
    assert message.endswith("expected False. Look at where the tensor is.")


def test_text_groups_failures_by_hook(site):
    site.add("acme", WRONG)
    done = site.execute(*COMMAND, "acme", "-k", "cpu_fallback")
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert lines.count("needs_cpu_fallback") == 1
    assert "does not conform (exit status 1" in done.stdout
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    ("body", "hook"),
    [
        ("@hwcore.hookimpl\ndef device_string(self, index=None): return 'disk'\n", "device_string"),
        ("@hwcore.hookimpl\ndef memory_info(self, index=None): return 3\n", "memory_info"),
        ("@hwcore.hookimpl\ndef setup(self): raise OSError('no driver')\n", "setup"),
        ("@hwcore.hookimpl\ndef probe(self): raise OSError('no driver')\n", "probe"),
    ],
)
def test_a_plugin_refused_at_activation_is_a_failure_of_the_hook(site, body, hook):
    site.add("acme", body)
    status, report = conformance(site, "acme")
    assert status == 1
    assert list(failures(report)) == [hook]
    assert failures(report)[hook].tests == [f"activation::{hook}"]
    assert failures(report)[hook].messages[0].startswith(f"{hook}: {ACME}: {hook}() ")


def test_a_plugin_that_cannot_be_imported_does_not_conform(site):
    site.add("acme", "import no_such_module", good=False)
    status, report = conformance(site, "acme")
    assert status == 1
    assert "no_such_module" in failures(report)["plugin"].messages[0]


def test_a_hook_that_raises_is_named_though_another_was_tested(site):
    site.add(
        "acme", "@hwcore.hookimpl\ndef synchronize(self, device=None): raise KeyError('gone')\n"
    )
    status, report = conformance(site, "acme", "-k", "wait_event")
    assert status == 1
    assert list(failures(report)) == ["synchronize"]
    (message,) = failures(report)["synchronize"].messages
    assert message.startswith(
        "synchronize: the call raised KeyError: 'gone'; expected no exception"
    )


# --- A hook that hangs, or ends the process -------------------------------------------------------

HANGS = """
    @hwcore.hookimpl
    def synchronize(self, device=None):
        import threading
        threading.Event().wait()
"""
HOLDS_THE_LOCK = """
    @hwcore.hookimpl
    def record_stream(self, tensor, stream):
        import ctypes
        ctypes.PyDLL(None).sleep(10_000)
"""
CRASHES = """
    @hwcore.hookimpl
    def record_stream(self, tensor, stream):
        import os
        os.write(2, b"firmware gone")
        os.abort()
"""


def test_a_hook_that_hangs_fails_by_name_and_limit_and_the_run_goes_on(site):
    site.add("acme", HANGS)
    status, report = conformance(site, "acme", "--timeout", "2", "-k", "streams or waiting")
    assert status == 1
    assert list(failures(report)) == ["synchronize"]
    first, *others = failures(report)["synchronize"].messages
    assert "synchronize: the call got no answer within 2 s" in first
    assert others
    assert all("is not called again" in message for message in others)
    assert sum(test.outcome == "passed" for test in report.tests) > 10
    assert report.duration_s < 60


@pytest.mark.slow
def test_a_hook_that_hangs_with_the_interpreters_lock_held_is_ended_from_outside(site):
    site.add("acme", HOLDS_THE_LOCK)
    code = """
        from hwcore.cli import main
        from hwcore.testing.conformance import runner
        runner.GRACE_S = 1.0
        main(["conformance", "--backend", "acme", "--json", "-", "--timeout", "2",
              "-k", "memory"])
    """
    done = site.run(code)
    report = msgspec.json.decode(done.stdout, type=Report)
    assert done.returncode == 1
    assert list(failures(report)) == ["record_stream"]
    first, *others = failures(report)["record_stream"].messages
    assert "gave no answer within 3 s and was ended" in first
    assert all("is not called again" in message for message in others)
    assert any(test.outcome == "passed" for test in report.tests)


def test_a_hook_that_ends_the_process_fails_by_name_and_the_run_goes_on(site):
    site.add("acme", CRASHES)
    status, report = conformance(site, "acme", "-k", "memory")
    assert status == 1
    assert list(failures(report)) == ["record_stream"]
    first = failures(report)["record_stream"].messages[0]
    assert "killed by SIGABRT" in first
    assert "firmware gone" in first
    assert len({test.name for test in report.tests}) == len(report.tests), "each ran once"
    assert any(test.outcome == "passed" for test in report.tests)


@pytest.mark.slow
def test_a_plugin_that_crashes_everywhere_ends_the_run_which_says_so(site):
    crashing = {
        "set_device": "index",
        "manual_seed": "seed",
        "pin_memory": "tensor",
        "register_host_memory": "buffer",
        "record_stream": "tensor",
        "synchronize": "device",
    }
    hooks = (
        f"@hwcore.hookimpl\ndef {hook}(self, {argument}):\n    import os; os.abort()\n"
        for hook, argument in crashing.items()
    )
    site.add("acme", "\n".join(hooks))
    status, report = conformance(site, "acme", "-k", " or ".join(crashing))
    assert status == 1
    assert report.error == "stopped after 6 processes had to be ended; some tests did not run"
    assert set(failures(report)) == set(crashing)


def test_a_setup_that_ends_the_process_is_named(site):
    site.add("acme", "@hwcore.hookimpl\ndef setup(self):\n    import os\n    os._exit(7)\n")
    status, report = conformance(site, "acme")
    assert status == 1
    assert "exit status 7" in failures(report)["setup"].messages[0]


# --- What cannot run ------------------------------------------------------------------------------


def refused(site, backend, *options, **variables):
    """Run the command where it cannot run; return what the report says of it."""
    status, report = conformance(site, backend, *options, **variables)
    assert status == 2
    assert report.tests == report.failures == []
    return report.error


def test_an_unknown_backend_gives_exit_status_2(site):
    assert "Did you mean `cpu`" in refused(site, "cpuu")


def test_an_unavailable_backend_gives_exit_status_2_and_the_fix(site):
    answer = "Availability(ok=False, reason='no acme device node', fix='Load the acme driver')"
    site.add("acme", f"@hwcore.hookimpl\ndef probe(self): return {answer}\n")
    assert "no acme device node. Load the acme driver." in refused(site, "acme")


def test_an_expression_that_matches_nothing_gives_exit_status_2(site):
    assert "`-k` got 'no_such_test'" in refused(site, "cpu", "-k", "no_such_test")


def test_a_malformed_expression_gives_exit_status_2(site):
    error = refused(site, "cpu", "-k", "wait_event and")
    assert "`-k` got 'wait_event and'" in error
    assert "Use a hook, a group or words of a test's name" in error


def test_pytest_missing_gives_exit_status_2_and_what_to_install(site):
    code = """
        import sys
        sys.modules["pytest"] = None
        from hwcore.cli import main
        main(["conformance", "--backend", "cpu"])
    """
    done = site.run(code)
    assert done.returncode == 2
    assert "pip install 'hwcore[conformance]'" in " ".join(done.stdout.split())


def test_a_broken_torch_gives_exit_status_2(site):
    (site.folder / "torch.py").write_text("raise ImportError('libtorch.so is damaged')")
    assert "libtorch.so is damaged" in refused(site, "cpu")


def test_a_report_that_cannot_be_written_is_said_before_the_run(site):
    done = site.execute(*COMMAND, "cpu", "--junit", str(site.folder / "none" / "r.xml"))
    assert done.returncode == 2
    assert "its folder does not exist" in " ".join(done.stderr.split())


def test_a_report_that_cannot_be_written_is_said_and_the_table_is_printed(site):
    files = ("--json", "/dev/full", "--junit", "/proc/none.xml")
    done = site.execute(*COMMAND, "cpu", "-k", "probe", *files)
    assert done.returncode == 2
    assert "identity" in done.stdout
    assert "hwcore: `/dev/full`: No space left on device. Write the report" in done.stderr
    assert "hwcore: `/proc/none.xml`: " in done.stderr
    assert "Traceback" not in done.stderr


def test_junit_goes_to_standard_output_too(site):
    done = site.execute(*COMMAND, "cpu", "-k", "probe", "--junit", "-")
    assert ElementTree.fromstring(done.stdout).tag == "testsuites"
    assert "identity" in done.stderr
    assert not (site.folder / "-").exists()


def test_two_reports_on_one_standard_output_are_refused(site):
    done = site.execute(*COMMAND, "cpu", "--json", "-", "--junit", "-")
    assert done.returncode == 2
    assert "cannot both be standard output" in " ".join(done.stderr.split())


@pytest.mark.parametrize("limit", ["nan", "inf", "-inf", "0"])
def test_a_limit_that_is_none_is_refused(site, limit):
    done = site.execute(*COMMAND, "cpu", "--timeout", limit)
    assert done.returncode == 2
    assert "Invalid value for '--timeout'" in done.stderr


def test_raw_access_that_cannot_be_imported_gives_exit_status_2(site):
    error = refused(site, "cpu", "--raw", "nosuch:Thing")
    assert error.startswith("conformance: `raw` got 'nosuch:Thing' (str); expected an object of")
    assert "No module named 'nosuch'" in error
    assert error.endswith("Name it as module:Class.")


def test_the_callers_pytest_options_do_not_matter(site):
    (site.folder / "conftest.py").write_text("raise RuntimeError('was loaded')")
    (site.folder / "pytest.ini").write_text("[pytest]\naddopts = --no-such-option\n")
    variables = {"PYTEST_ADDOPTS": "--no-such-option", "PYTEST_PLUGINS": "no_such_plugin"}
    status, report = conformance(site, "cpu", "-k", "backend_info", **variables)
    assert (status, report.error) == (0, None)


def test_the_race_sanitizer_of_the_caller_is_off_in_the_run(site):
    status, report = conformance(site, "cpu", "-k", "wait_stream", HWCORE_SANITIZE="1")
    assert (status, report.failures) == (0, [])


def test_the_command_imports_neither_torch_nor_pytest_itself(site):
    code = """
        import sys
        from click.testing import CliRunner
        from hwcore.cli import main
        result = CliRunner().invoke(main, ["conformance", "--backend", "cpu", "-k", "probe"])
        print(result.exit_code, "torch" in sys.modules, "pytest" in sys.modules)
    """
    assert site.run(code).output == ["0 False False"]


def test_the_documented_schema_is_the_one_written():
    documented = pathlib.Path(__file__).parents[3] / "docs" / "conformance.schema.json"
    assert json.loads(documented.read_text()) == msgspec.json.schema(Report)
