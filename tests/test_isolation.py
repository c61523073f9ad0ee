"""Installed backends leave each other's processes alone. These tests see them all."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from hwcore import discovery

PLUGINS = [origin for origin in discovery.installed() if origin != discovery.BUILTIN]


def python(code, **variables):
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("HWCORE_")}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**inherited, **variables},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout.strip()


@pytest.mark.parametrize("plugin", PLUGINS, ids=str)
def test_a_process_of_the_cpu_loads_no_other_backend(plugin):
    code = f"""if True:
        import sys, torch, hwcore
        hw = hwcore.use("cpu")
        torch.zeros(2, device=hw.device()).sum().item()
        print({plugin.value.partition(".")[0]!r} in sys.modules)
        print(torch._C._get_privateuse1_backend_name())
    """
    assert python(code).split() == ["False", "privateuseone"]


@pytest.mark.parametrize("plugin", PLUGINS, ids=str)
def test_probing_a_backend_loads_it_in_the_child_alone(plugin):
    code = f"""if True:
        import sys
        from hwcore import discovery
        from hwcore.probing import probe
        results = probe(discovery.installed())
        print(len(results) > 0, {plugin.value.partition(".")[0]!r} in sys.modules)
    """
    assert python(code) == "True False"
