"""Roles and router killed, or stopped, at each point of the protocol: nothing is lost or left."""

import contextlib
import dataclasses
import json
import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest

from hwcore.diffusion.launch import LocalLauncher
from tests.diffusion.serving import _roles

from . import _points
from ._deploy import HERE, deployment

pytestmark = pytest.mark.slow
ROUTER = {"heartbeat_s": 0.2, "dead_after_s": 1.5, "resend_after_s": 0.5, "max_rounds": 5}
SIZES = (10, 60_000, 10, 10, 20_000, 10)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two workers of each role, and a plan that they and the router follow."""
    folder = tmp_path_factory.mktemp("survival")
    plan, accounts = folder / "plan", folder / "accounts"
    accounts.mkdir()
    made = deployment((2, 2, 2), router=ROUTER, plan=str(plan), accounts=str(accounts))
    made = dataclasses.replace(made, restarts=1000)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(HERE))
        patch.syspath_prepend(str(HERE / "_dying"))
        patch.setenv("HWCORE_TEST_PLAN", str(plan))
        with LocalLauncher(made) as launcher, launcher.client() as client:
            yield World(launcher, client, plan, accounts)


class World:
    def __init__(self, launcher, client, plan, accounts):
        self.launcher, self.client, self.plan, self.accounts = launcher, client, plan, accounts

    def ask(self, number, size):
        tree = _roles.ask(number, size).to_tree()
        name = f"{number} {time.monotonic_ns()}"
        return self.client.submit(name, tree, deadline_s=60.0, enums=_roles.ENUMS)

    def serve(self):
        """Ask for some, and see that each comes right."""
        pending = [self.ask(number, size) for number, size in enumerate(SIZES)]
        for number, (one, size) in enumerate(zip(pending, SIZES, strict=True)):
            assert _roles.same(one.result(), number, size)

    def wake(self):
        """Have whoever was stopped go on."""
        for pid in self.launcher.pids.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                if psutil.Process(pid).status() == psutil.STATUS_STOPPED:
                    os.kill(pid, signal.SIGCONT)

    def wait_until_nothing_is_held(self):
        deadline = time.monotonic() + 20
        while any(held is None or any(held.values()) for held in self.held().values()):
            assert time.monotonic() < deadline, self.held()
            time.sleep(0.05)

    def held(self):
        """What the workers that run say that they hold; None of one that has said nothing yet."""
        pids = {name: pid for name, pid in self.launcher.pids.items() if name != "router"}
        found = {}
        for name, pid in pids.items():
            said = {"pid": None}
            with contextlib.suppress(OSError):
                said = json.loads(Path(self.accounts, name).read_text())
            found[name] = said["held"] if said["pid"] == pid else None
        return found


POINTS = [f"{who} {point}" for who, points in _points.POINTS.items() for point in points]


@pytest.mark.parametrize("point", POINTS)
def test_a_death_loses_no_request_and_leaves_nothing(world, point):
    world.plan.write_text(f"SIGKILL {point}")
    world.serve()
    assert not world.plan.exists(), "nobody came to this point"
    world.wait_until_nothing_is_held()


@pytest.mark.parametrize("point", POINTS[::3])
def test_a_stall_loses_no_request_and_leaves_nothing(world, point):
    world.plan.write_text(f"SIGSTOP {point}")
    release = threading.Timer(2.5, world.wake)  # by then it is taken for dead
    release.start()
    world.serve()
    release.join()
    assert not world.plan.exists(), "nobody came to this point"
    world.wait_until_nothing_is_held()
