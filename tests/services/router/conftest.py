"""A router, workers without compute and clients, in threads of this process; all are closed."""

from __future__ import annotations

import contextlib
import threading

import pytest

from hwcore.diffusion.engines import Token
from hwcore.diffusion.router import Router, RouterClient, RouterConfig

from ._peers import FAST, Child, Echo, router_process


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    before = set(threading.enumerate())
    yield
    left = {thread for thread in threading.enumerate() if "hwcore" in thread.name} - before
    assert not left


@pytest.fixture
def token():
    return Token.create()


@pytest.fixture
def stack():
    """What is entered or called back here ends in the opposite order, after the test."""
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.fixture
def router_of(stack, token):
    """Start a router in this process."""

    def start(token=token, metrics_port=None, **config):
        made = Router(token, RouterConfig(**FAST | config), metrics_port=metrics_port)
        return stack.enter_context(made)

    return start


@pytest.fixture
def router(router_of):
    return router_of()


@pytest.fixture
def worker(stack, token):
    """Start a worker in this process."""

    def start(router, role, token=token, wait=True, **options):
        address = router if isinstance(router, str) else router.worker_address
        echo = Echo(address, token, role, **options)
        stack.callback(echo.close)
        assert not wait or echo.link.wait_registered(10)
        return echo

    return start


@pytest.fixture
def workers(worker):
    """Start one worker of each role."""

    def start(router, **options):
        return [worker(router, role, **options) for role in ("encoder", "denoiser", "decoder")]

    return start


@pytest.fixture
def client_of(stack, token):
    """Start a client."""

    def start(router, token=token, **options):
        address = router if isinstance(router, str) else router.client_address
        return stack.enter_context(RouterClient(address, token, **options))

    return start


@pytest.fixture
def client(router, client_of):
    return client_of(router)


@pytest.fixture
def child(stack, token):
    """Start a process that runs Python code after ``from _peers import *``."""

    def start(code):
        made = Child(token, code)
        stack.callback(made.close)
        return made

    return start


@pytest.fixture
def other_router(stack, token):
    """Start a router in another process; return the process and the router's addresses."""

    def start(*ports):
        made, *addresses = router_process(token, ports or (0, 0))
        stack.callback(made.close)
        return made, *addresses

    return start
