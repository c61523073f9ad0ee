"""A pipeline without a model, in processes or in threads of this one."""

import contextlib
import os
import pathlib
import sys
import threading
import time

import pytest

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE))  # `_roles`, as its processes import it

import _roles  # noqa: E402
from hwcore.diffusion.router.client import RouterClient  # noqa: E402
from hwcore.diffusion.router.server import Router  # noqa: E402

from hwcore.diffusion.engines import Token  # noqa: E402
from hwcore.diffusion.launch import Deployment, RoleSpec  # noqa: E402
from hwcore.diffusion.roles import PIPELINE  # noqa: E402
from hwcore.diffusion.router.config import RouterConfig  # noqa: E402
from hwcore.diffusion.serving.config import WorkerConfig  # noqa: E402

WORKER = {"pool_bytes": 16 << 20, "slot_bytes": [1 << 16] * 4}


def deployment(counts=(1, 1, 1), worker=(), backend="cpu", router=(), **options):
    """Three roles, as many of each as `counts` says; the rest goes to each role."""
    paths = os.pathsep.join([str(HERE), *filter(None, sys.path)])
    environment = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return Deployment(
        roles=tuple(
            RoleSpec(
                role=role,
                factory="_roles:make",
                options={"role": role, **options},
                count=count,
                backend=backend,
                environment=environment,
                worker=WORKER | dict(worker),
            )
            for role, count in zip(PIPELINE, counts, strict=True)
        ),
        router=RouterConfig(**dict(router)),
    )


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
