"""A pipeline without a model, in threads of this process."""

import contextlib
import threading
import time

import pytest

from hwcore.diffusion.engines import Token
from hwcore.diffusion.roles import PIPELINE
from hwcore.diffusion.router.client import RouterClient
from hwcore.diffusion.router.server import Router
from hwcore.diffusion.serving.config import WorkerConfig

from . import _roles


class Served:
    """A pipeline in threads of this process."""

    def __init__(self, hw, roles, **worker):
        self.token = Token.create()
        self.router = Router(self.token).start()
        self.roles = roles
        self.threads = []
        for number, role in enumerate(roles):
            config = WorkerConfig(
                role=role.role,
                router=self.router.worker_address,
                name=f"{role.role}-{number}",
                **{"pool_bytes": 1 << 20, "slot_bytes": (1 << 12,) * 4} | worker,
            )
            role._init_disagg_state(config, self.token, backend=hw)
            loop = threading.Thread(target=role._disagg_prefetch_event_loop)
            loop.start()
            self.threads.append(loop)
        for role in roles:
            assert role.wait_registered(10)
        self.client = RouterClient(self.router.client_address, self.token)

    def ask(self, number, size=16, deadline_s=30.0, **extra):
        tree = _roles.ask(number, size, **extra).to_tree()
        name = f"{number} {time.monotonic_ns()}"
        return self.client.submit(name, tree, deadline_s=deadline_s, enums=_roles.ENUMS)

    def close(self):
        for role in self.roles:
            role.stop_disagg()
        for thread in self.threads:
            thread.join(20)
            assert not thread.is_alive()
        self.client.close()
        self.router.close()


@pytest.fixture
def serve(hw):
    """Serve roles in threads; by default one of each."""
    with contextlib.ExitStack() as undo:

        def start(roles=None, **worker):
            served = Served(hw, roles or [_roles.Role(role) for role in PIPELINE], **worker)
            undo.callback(served.close)
            return served

        yield start
