"""The simulated device conforms, under every name and drain policy that it has."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import msgspec
import pytest

from hwcore.testing.conformance.report import Report

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("hwcore_sim") is None, reason="hwcore-sim is not installed"
)

DOCS = pathlib.Path(__file__).parents[3] / "docs" / "conformance.md"
COMMAND = ("-m", "hwcore.cli", "conformance", "--json", "-", "--backend")
FAULTY = """
    import hwcore
    from hwcore_sim.plugin import SimPlugin

    class Plugin(SimPlugin):
        @hwcore.hookimpl
        def backend_info(self):
            info = SimPlugin.backend_info(self)
            return type(info)(**{**vars(info), "name": "acme"})

        @hwcore.hookimpl
        def setup(self):
            import torch
            SimPlugin.setup(self)
            torch.ones(1, device="sim")
"""


def conformance(backend, *options, **variables):
    """Run the command; return its report, checked by the schema."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("HWCORE_")}
    done = subprocess.run(
        [sys.executable, *COMMAND, backend, *options],
        env={**inherited, **variables},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.stdout, done.stderr
    return msgspec.json.decode(done.stdout, type=Report)


@pytest.mark.slow
def test_the_simulated_device_conforms():
    report = conformance("sim")
    assert [failure.messages for failure in report.failures] == []
    assert report.exit_code == 0
    assert report.backend.distribution == "hwcore-sim"
    assert {f.name for f in report.features_skipped} == {"triton", "host_registration", "compile"}
    assert [quirk.name for quirk in report.quirks if quirk.tests] == ["capture_stream_limit"]


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["eager", "random:1"])
def test_it_conforms_under_every_drain_policy(policy):
    groups = "memory or streams or waiting or ordering or graphs or graph_runner"
    report = conformance("sim", "-k", groups, HWCORE_SIM_DRAIN=policy)
    assert [failure.messages for failure in report.failures] == []
    assert len(report.tests) > 50


@pytest.mark.slow
def test_it_conforms_under_a_vendors_name():
    report = conformance("sim", "-k", "identity or streams or waiting", HWCORE_SIM_NAME="npu")
    assert [failure.messages for failure in report.failures] == []
    assert report.backend.device_type == "npu"


def test_the_docs_example_of_a_vendors_own_test_runs(tmp_path):
    examples = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    (own,) = (example for example in examples if "@conforms" in example)
    (tmp_path / "test_sim.py").write_text(own.replace('"acme"', '"sim"'))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", str(tmp_path), "-k", "priorities", "-rA"],
        env={k: v for k, v in os.environ.items() if not k.startswith("HWCORE_")},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert re.search("PASSED .*::test_five_priorities", done.stdout)


def test_a_setup_that_creates_a_device_context_is_found_out(site):
    site.add("acme", FAULTY, good=False, value="hwcore_acme:Plugin")
    options = ("--raw", "hwcore_sim.device.raw:SimRawAccess", "-k", "setup")
    report = conformance("acme", *options, PYTHONPATH=str(site.folder))
    assert [failure.hook for failure in report.failures] == ["setup"]
    (message,) = report.failures[0].messages
    assert "setup: is_initialized() just after it got True (bool); expected False" in message
