"""Both plugins on one host: the installed torch decides, and the two never tie."""

from __future__ import annotations

import pytest

from ._machines import AMD, BUILDS, NVIDIA, machine

PLUGIN = """
    import functools, pathlib
    import hwcore
    from hwcore import torch_build
    from hwcore.machine import Machine
    from hwcore_{name} import probe
    from hwcore_{name}.plugin import {plugin}

    ROOT = pathlib.Path({root!r})

    class Plugin({plugin}):
        @hwcore.hookimpl
        def probe(self):
            return probe.availability(Machine(
                root=ROOT, environ={{}}, load=lambda name: None, may_use=lambda node: True,
                torch=functools.partial(torch_build.installed, [str(ROOT / "site")]),
            ))
"""

SELECT = """
    from hwcore import probing, selection
    request = selection.plan(None, "automatic selection")
    decision = selection.decide(request, probing.probe(request.to_probe))
    print(decision.origin.name)
    print(decision.warning)
"""


def host(site, folder, build):
    """A host with GPUs of both makers, both plugins, and one torch."""
    machine(folder, (*NVIDIA, *AMD), build=build)
    for name, plugin in (("cuda", "CudaPlugin"), ("hip", "HipPlugin")):
        source = PLUGIN.format(name=name, plugin=plugin, root=str(folder))
        site.add(
            name, source, distribution=f"faked-{name}", value=f"faked_{name}:Plugin", good=False
        )


@pytest.mark.parametrize("build", BUILDS)
def test_the_plugin_that_torch_was_built_for_is_selected(build, site, tmp_path):
    host(site, tmp_path / "host", build)
    expected = {"a": "cuda", "c": "cuda", "r": "hip"}[build[0]] if build != "cpu" else "cpu"
    assert site.run(SELECT).output[0] == expected


def test_with_a_torch_for_neither_both_say_which_one_to_install(site, tmp_path):
    host(site, tmp_path / "host", "cpu")
    name, warning = site.run(SELECT).output
    assert name == "cpu"
    for built in ("without CUDA", "without ROCm"):
        assert f"the installed torch 2.13.0+cpu was built {built}" in warning
    for index in ("cu130", "rocm7.0"):
        assert f"--index-url https://download.pytorch.org/whl/{index}`" in warning
