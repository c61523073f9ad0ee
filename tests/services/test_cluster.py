"""Actors of Ray, on 127.0.0.1."""

import importlib.util
import os
import sys
import time
import types

import pytest

from hwcore.diffusion.launch.cluster import RayLauncher
from hwcore.errors import CapabilityError
from tests.diffusion.serving import _roles

from ._deploy import deployment


def ask(client, number, size=16):
    tree = _roles.ask(number, size).to_tree()
    name = f"{number} {time.monotonic_ns()}"
    return client.submit(name, tree, deadline_s=90.0, enums=_roles.ENUMS)


@pytest.fixture(scope="module")
def launched():
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed: pip install 'hwcore[ray]'")
    with RayLauncher(deployment()) as launcher, launcher.client() as client:
        yield launcher, client


@pytest.mark.slow
def test_requests_go_through_actors(launched):
    _, client = launched
    pending = [ask(client, number, 1000) for number in range(8)]
    assert all(_roles.same(one.result(), number, 1000) for number, one in enumerate(pending))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["denoiser-0", "router"])
def test_an_actor_that_is_killed_is_restarted_and_no_request_is_lost(launched, name):
    launcher, client = launched
    before = launcher.pids
    pending = [ask(client, number) for number in range(8)]
    launcher.kill(name)
    assert all(_roles.same(one.result(), number) for number, one in enumerate(pending))
    assert launcher.pids[name] != before[name]


@pytest.mark.slow
def test_ray_is_local_and_says_nothing_to_anybody(launched):
    import ray

    (node,) = ray.nodes()
    assert node["NodeManagerAddress"] == "127.0.0.1"
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


@pytest.mark.slow
def test_it_ends_the_cluster_that_it_started(launched):
    import ray

    launcher, _ = launched
    launcher.close()
    assert not ray.is_initialized()
    launcher.close()  # once more is harmless


def test_a_cluster_of_several_machines_is_refused(monkeypatch):
    nodes = [{"NodeManagerAddress": f"10.0.0.{n}", "Alive": n < 3} for n in range(1, 4)]
    ray = types.SimpleNamespace(is_initialized=lambda: True, nodes=lambda: nodes)
    monkeypatch.setitem(sys.modules, "ray", ray)
    with pytest.raises(CapabilityError, match=r"machines 10\.0\.0\.1, 10\.0\.0\.2; expected one"):
        RayLauncher(deployment())


def test_without_ray_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(CapabilityError, match=r"pip install 'hwcore\[ray\]', or use LocalLauncher"):
        RayLauncher(deployment())
