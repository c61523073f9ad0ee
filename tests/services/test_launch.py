"""Processes: a launch, deaths, and ends. Each test's processes choose their backends."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time

import psutil
import pytest

from hwcore.diffusion.launch import Deployment, LocalLauncher, RoleSpec
from hwcore.diffusion.roles import PIPELINE, RoleType
from hwcore.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    PeerError,
    PeerTimeoutError,
    RequestError,
)
from tests.diffusion.serving import _roles

from ._deploy import PATHS, deployment


def ask(client, number, size=16, name=None, deadline_s=60.0):
    tree = _roles.ask(number, size).to_tree()
    name = name or f"{number} {time.monotonic_ns()}"
    return client.submit(name, tree, deadline_s=deadline_s, enums=_roles.ENUMS)


@pytest.fixture(scope="module")
def launched():
    with LocalLauncher(deployment((1, 2, 1))) as launcher, launcher.client() as client:
        yield launcher, client


def test_requests_of_all_sizes_come_back_right(launched):
    _, client = launched
    sizes = [1, 1000, 1, 300_000, 17, 0, 64_000]
    pending = [ask(client, number, size) for number, size in enumerate(sizes)]
    assert all(
        _roles.same(one.result(), number, size)
        for number, (one, size) in enumerate(zip(pending, sizes, strict=True))
    )


@pytest.mark.parametrize("name", ["encoder-0", "denoiser-1", "decoder-0", "router"])
def test_a_process_that_is_killed_is_started_again_and_no_request_is_lost(launched, name):
    launcher, client = launched
    before = launcher.pids[name]
    pending = [ask(client, number) for number in range(40)]
    launcher.send_signal(name, signal.SIGKILL)
    assert all(_roles.same(one.result(), number) for number, one in enumerate(pending))
    assert _roles.until(lambda: launcher.pids.get(name, before) != before)
    assert launcher.deaths[name] == 1


def test_a_process_that_is_stopped_for_a_while_is_passed_over_and_comes_back(launched):
    launcher, client = launched
    launcher.send_signal("denoiser-0", signal.SIGSTOP)
    pending = [ask(client, number) for number in range(10)]
    assert all(_roles.same(one.result(), number) for number, one in enumerate(pending))
    launcher.send_signal("denoiser-0", signal.SIGCONT)
    assert launcher.deaths["denoiser-0"] == 0
    pending = [ask(client, number) for number in range(10)]
    assert all(_roles.same(one.result(), number) for number, one in enumerate(pending))


def test_the_same_pipeline_runs_on_another_backend():
    with LocalLauncher(deployment(backend="sim")) as launcher, launcher.client() as client:
        pending = [ask(client, number, 1000) for number in range(5)]
        assert all(_roles.same(one.result(), number, 1000) for number, one in enumerate(pending))


@pytest.mark.parametrize("engine", ["tcp", "mooncake"])
def test_the_same_pipeline_runs_on_another_engine(engine):
    if engine == "mooncake":
        pytest.importorskip("mooncake.engine", exc_type=ImportError)
    made = deployment(worker={"engines": [engine]})
    with LocalLauncher(made) as launcher, launcher.client() as client:
        pending = [ask(client, number, 100_000) for number in range(5)]
        assert all(_roles.same(one.result(), number, 100_000) for number, one in enumerate(pending))


def test_a_push_whose_bytes_may_land_late_has_its_sender_begin_again(capfd):
    slots = {"slot_bytes": [17 << 20] * 2, "pool_bytes": 128 << 20}
    worker = {"engines": ["tcp"], "push_timeout_s": 1.0} | slots
    made = deployment((1, 1, 2), worker=worker)
    size = 4_000_000  # 16 MB: more than lies in the sockets of one that does not read
    with LocalLauncher(made) as launcher, launcher.client() as client:
        pending = [ask(client, number, size) for number in range(4)]  # by both: it is connected
        assert all(_roles.same(one.result(), number, size) for number, one in enumerate(pending))
        launcher.send_signal("decoder-0", signal.SIGSTOP)
        pending = [ask(client, number, size) for number in range(4)]
        assert all(_roles.same(one.result(), number, size) for number, one in enumerate(pending))
        launcher.send_signal("decoder-0", signal.SIGCONT)
        pending = [ask(client, number, size) for number in range(4)]
        assert all(_roles.same(one.result(), number, size) for number, one in enumerate(pending))
        assert launcher.deaths == dict.fromkeys(launcher.deaths, 0)
    assert "denoiser-0: it begins again, with another pool" in capfd.readouterr().err


def test_a_close_ends_every_process_and_leaves_no_socket_or_folder():
    folder = tempfile.mkdtemp(prefix="hw-")  # short, for it is in the name of a socket
    launcher = LocalLauncher(deployment(environment={"TMPDIR": folder}))
    with launcher.client() as client:
        assert _roles.same(ask(client, 1).result(), 1)
        pids = launcher.pids
        assert os.listdir(folder)
        waiting = ask(client, 2, deadline_s=60.0)
        launcher.close()
        with_answer = waiting.done or _roles.until(lambda: waiting.done)
    assert with_answer
    assert not any(map(psutil.pid_exists, pids.values()))
    os.rmdir(folder)
    launcher.close()  # once more is harmless


def test_who_waits_when_all_is_closed_gets_an_error():
    launcher = LocalLauncher(deployment(seconds=0.5))
    with launcher.client() as client:
        waiting = [ask(client, number) for number in range(6)]
        launcher.close()
        with pytest.raises(RequestError):
            waiting[-1].result()


def test_no_process_outlives_a_launcher_that_is_killed(tmp_path):
    program = textwrap.dedent("""
        import json, sys, time
        from _deploy import deployment
        from hwcore.diffusion.launch import LocalLauncher
        launcher = LocalLauncher(deployment())
        print(json.dumps(launcher.pids), flush=True)
        time.sleep(600)
    """)
    environment = {**os.environ, "PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True
    )
    pids = json.loads(child.stdout.readline())
    assert len(pids) == 4
    child.kill()
    child.communicate()
    assert _roles.until(lambda: not any(map(running, pids.values())))


def test_a_factory_that_fails_is_an_error_at_once():
    roles = deployment().roles
    broken = RoleSpec(role=RoleType.DECODER, factory="_roles:nothing")
    with pytest.raises(PeerError, match=r"decoder-0 ended with 1 before it was ready"):
        LocalLauncher(Deployment(roles=(*roles[:2], broken)))


def test_a_role_that_is_not_ready_in_time_is_named():
    made = deployment()
    environment = made.roles[0].environment
    slow = RoleSpec(role=RoleType.DECODER, factory="_roles:sleep", environment=environment)
    made = Deployment(roles=(*made.roles[:2], slow), ready_timeout_s=8.0)
    with pytest.raises(PeerTimeoutError, match=r"decoder-0 was not ready after 8 s"):
        LocalLauncher(made)


def test_a_process_that_dies_too_often_is_left_and_requests_are_told(caplog):
    made = dataclasses.replace(deployment(), restarts=0)
    with LocalLauncher(made) as launcher, launcher.client() as client:
        launcher.send_signal("decoder-0", signal.SIGKILL)
        with pytest.raises(RequestError):
            ask(client, 1, deadline_s=3.0).result()
        assert "decoder-0 ended with -9, and is not started again" in caplog.text


BAD_ROLES = {
    "factory": ({"factory": "no_function"}, ArgumentValueError),
    "count": ({"count": 0}, ArgumentValueError),
    "options": ({"options": {"x": object()}}, ArgumentTypeError),
    "worker": ({"worker": {"name": "mine"}}, ArgumentValueError),
    "role": ({"role": "encoder"}, ArgumentTypeError),
}


@pytest.mark.parametrize("what", BAD_ROLES)
def test_a_bad_role_is_refused(what):
    options, kind = BAD_ROLES[what]
    with pytest.raises(kind, match=f"RoleSpec: {what}"):
        RoleSpec(**{"role": RoleType.ENCODER, "factory": "a:b"} | options)


@pytest.mark.parametrize("roles", [PIPELINE[:2], (*PIPELINE, PIPELINE[0]), ()], ids=str)
def test_a_deployment_without_one_spec_for_each_role_is_refused(roles):
    specs = tuple(RoleSpec(role=role, factory="a:b") for role in roles)
    with pytest.raises(ArgumentValueError, match="one RoleSpec for each of encoder, denoiser"):
        Deployment(roles=specs)


def running(pid):
    """Whether a process is there, and more than what is left of one that nobody waited for."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
