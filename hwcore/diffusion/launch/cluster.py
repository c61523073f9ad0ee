"""RayLauncher: a deployment as actors of a Ray cluster, which places and restarts them."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import msgspec

from hwcore import _env
from hwcore._checks import check_instance
from hwcore.diffusion.engines import Token
from hwcore.diffusion.launch.deployment import Deployment
from hwcore.diffusion.launch.process import Order, make_router, make_scheduler
from hwcore.diffusion.router.client import RouterClient
from hwcore.errors import ArgumentValueError, CapabilityError, PeerError, PeerTimeoutError, describe

if TYPE_CHECKING:
    from types import TracebackType

    from hwcore.diffusion.serving.scheduler import SchedulerDisaggMixin

__all__ = ["RayLauncher"]

_log = logging.getLogger("hwcore")
_ROUTER = "router"
# Ray takes 127.0.0.1 as a node's address for the machine's own, unless it knows of no clusters.
# Read when it is imported (ray._private.ray_constants, of Ray 2.60).
_LOOPBACK = ("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")


class _Member:
    """An actor: the router, or a worker. Ray makes it again, and so begins it again."""

    def __init__(self, order: bytes, token_file: str) -> None:
        logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        self._order = msgspec.json.decode(order, type=Order)
        token = Token.from_file(token_file) if token_file else Token.off()
        self._scheduler: SchedulerDisaggMixin | None = None
        if self._order.router is not None:
            self._router = make_router(self._order, token).start()
            return
        self._scheduler = make_scheduler(self._order, token)
        self._ended = threading.Event()
        threading.Thread(target=self._run, name="compute", daemon=True).start()

    def _run(self) -> None:
        assert self._scheduler is not None
        try:
            self._scheduler._disagg_prefetch_event_loop()
            self._ended.set()
        except BaseException:  # noqa: BLE001 - whatever it was, nothing goes on here
            _log.exception("%s ends", self._order.name)
            os._exit(1)  # Ray starts it again

    def ready(self, timeout_s: float) -> dict[str, str] | None:
        """Return a router's addresses; a worker's: nothing, when the router knows it."""
        if self._scheduler is None:
            router = self._router
            return {"clients": router.client_address, "workers": router.worker_address}
        return {} if self._scheduler.wait_registered(timeout_s) else None

    def pid(self) -> int:
        """Return the process's number."""
        return os.getpid()

    def stop(self, timeout_s: float) -> None:
        """End, after the request that it is at."""
        if self._scheduler is None:
            self._router.close()
        else:
            self._scheduler.stop_disagg()
            self._ended.wait(timeout_s)


class RayLauncher:
    """Starts a deployment's processes as actors of Ray. Use it in a ``with`` block.

    All on one machine, whose router and pools are at 127.0.0.1. Where Ray is not connected to a
    cluster yet, it starts one of this machine, without dashboard and usage statistics, and ends it
    in the end.

    Parameters
    ----------
    deployment : Deployment
        A role's ``backend`` goes to its actors as ``HWCORE_BACKEND``, its ``cpus`` and ``gpus`` are
        set aside for each; the router takes none.
    token : Token, optional
        By default a new one.
    token_file : path, optional
        Where it is, of mode 0600; see ``Token.save``. By default a new file, removed in the end.
    metrics_port : int, optional
        As for :class:`~hwcore.diffusion.launch.local.LocalLauncher`.

    Attributes
    ----------
    client_address : str
    token : Token

    Raises
    ------
    CapabilityError
        If Ray is not installed, or its cluster has several machines.
    PeerError, PeerTimeoutError
        If an actor ended before it was ready, or was not ready in time: a cluster without room
        leaves it waiting.
    """

    def __init__(
        self,
        deployment: Deployment,
        token: Token | None = None,
        *,
        token_file: str | Path = "",
        metrics_port: int | None = None,
    ) -> None:
        check_instance("RayLauncher", "deployment", deployment, Deployment, "Deployment()")
        self._ray = _import_ray()
        self.deployment = deployment
        self.client_address = ""
        self._actors: dict[str, Any] = {}
        self._undo = contextlib.ExitStack()
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            self._token_file = str(token_file)
            self.token = self._own_token(token)
            self._connect()
            self._start_all(metrics_port)
            undo.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def pids(self) -> dict[str, int]:
        """The processes that run, by name."""
        found = {}
        for name, actor in self._actors.items():
            with contextlib.suppress(self._ray.exceptions.RayError):
                found[name] = self._ray.get(actor.pid.remote(), timeout=30)
        return found

    def client(self) -> RouterClient:
        """Return a new client; close it when it has served."""
        return RouterClient(self.client_address, self.token)

    def kill(self, name: str) -> None:
        """End an actor's process at once; Ray starts it again.

        Raises
        ------
        ArgumentValueError
            If there is none of that name.
        """
        if name not in self._actors:
            fix, expected = "Take one of .pids", "the name of an actor"
            raise ArgumentValueError(describe("kill", "name", name, expected, fix))
        self._ray.kill(self._actors[name], no_restart=False)

    def close(self, timeout_s: float = 20.0) -> None:
        """End all: workers first, each after the request that it is at. Once is enough."""
        actors, self._actors = self._actors, {}
        router = actors.pop(_ROUTER, None)
        deadline = time.monotonic() + timeout_s
        self._end(list(actors.values()), deadline)
        if router is not None:
            self._end([router], max(deadline, time.monotonic() + 1.0))
        self._undo.close()

    # --- Parts ---

    def _own_token(self, token: Token | None) -> Token:
        if self._token_file:
            return token or Token.from_file(self._token_file)
        token = token or Token.create()
        if not token.is_off:
            folder = self._undo.enter_context(tempfile.TemporaryDirectory(prefix="hwcore-"))
            self._token_file = str(Path(folder, "token"))
            token.save(self._token_file)
        return token

    def _connect(self) -> None:
        if self._ray.is_initialized():
            alive = [node["NodeManagerAddress"] for node in self._ray.nodes() if node["Alive"]]
            if len(alive) > 1:
                message = (
                    f"RayLauncher: the cluster has the machines {', '.join(alive)}; expected one, "
                    f"for router and pools are at 127.0.0.1. Start the roles of each machine "
                    f"yourself, as docs/disaggregation.md says."
                )
                raise CapabilityError(message)
            return
        specs = self.deployment.roles
        self._ray.init(
            num_cpus=max(1, int(sum(spec.cpus * spec.count for spec in specs))),
            include_dashboard=False,
            logging_level=logging.WARNING,
        )
        self._undo.callback(self._ray.shutdown)
        address = self._ray.util.get_node_ip_address()
        if not ipaddress.ip_address(address).is_loopback:
            message = (
                f"RayLauncher: Ray listens at {address}; expected 127.0.0.1. Set "
                f"{_LOOPBACK[0]}={_LOOPBACK[1]} before ray is imported, or connect to a cluster by "
                f"ray.init() first."
            )
            raise CapabilityError(message)

    def _start_all(self, metrics_port: int | None) -> None:
        deadline = time.monotonic() + self.deployment.ready_timeout_s
        has_token = not self.token.is_off
        ports = _free_ports(2)  # started again it is where it was
        router = Order(
            name=_ROUTER,
            router=self.deployment.router,
            client_port=ports[0],
            worker_port=ports[1],
            metrics_port=metrics_port,
            has_token=has_token,
        )
        self._start(router, {}, 0, 0)
        addresses = self._wait_ready(_ROUTER, deadline)
        self.client_address = addresses["clients"]
        for name, spec in self.deployment.processes():
            environment = dict(spec.environment)
            if spec.backend:
                environment[_env.BACKEND] = spec.backend
            order = Order(
                name=name, role=spec, worker_address=addresses["workers"], has_token=has_token
            )
            self._start(order, environment, spec.cpus, spec.gpus)
        for name, _ in self.deployment.processes():
            self._wait_ready(name, deadline)

    def _start(self, order: Order, environment: dict[str, str], cpus: float, gpus: float) -> None:
        paths = os.pathsep.join(filter(None, sys.path))
        variables = {"PYTHONPATH": paths, "RAY_USAGE_STATS_ENABLED": "0", **environment}
        options: dict[str, Any] = {
            "num_cpus": cpus,
            "num_gpus": gpus,
            "max_restarts": self.deployment.restarts,
            "max_concurrency": 4,  # to be asked, and stopped, while it computes
            "runtime_env": {"env_vars": variables},
        }
        member = self._ray.remote(_Member).options(**options)
        order_bytes = msgspec.json.encode(order)
        self._actors[order.name] = member.remote(order_bytes, self._token_file)

    def _wait_ready(self, name: str, deadline: float) -> dict[str, str]:
        left_s = max(0.1, deadline - time.monotonic())
        try:
            said: dict[str, str] | None = self._ray.get(
                self._actors[name].ready.remote(left_s), timeout=left_s + 1.0
            )
        except self._ray.exceptions.GetTimeoutError:
            said = None
        except self._ray.exceptions.RayError as error:
            message = (
                f"RayLauncher: {name} ended before it was ready: {error}; expected it to load its "
                f"model and register. Look at its log in Ray's session folder."
            )
            raise PeerError(message) from error
        if said is None:
            message = (
                f"RayLauncher: {name} was not ready after {self.deployment.ready_timeout_s:g} s; "
                f"expected it to be placed, to load its model and to register. See whether the "
                f"cluster has the cpus and gpus that its RoleSpec asks for."
            )
            raise PeerTimeoutError(message)
        return said

    def _end(self, actors: list[Any], deadline: float) -> None:
        left_s = max(0.1, deadline - time.monotonic())
        stops = [actor.stop.remote(left_s) for actor in actors]
        for stop in stops:
            with contextlib.suppress(self._ray.exceptions.RayError):
                self._ray.get(stop, timeout=max(0.1, deadline - time.monotonic()) + 1.0)
        for actor in actors:
            self._ray.kill(actor)


def _free_ports(count: int) -> list[int]:
    """Return ports of 127.0.0.1 that are free now."""
    import socket

    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _import_ray() -> Any:
    """Return Ray; where nobody has imported it yet, as one that keeps to itself."""
    if "ray" not in sys.modules:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault(*_LOOPBACK)
    try:
        import ray
    except ImportError as error:
        message = (
            f"RayLauncher: `import ray` got {error!r}; expected Ray to be installed. Run "
            f"pip install 'hwcore[ray]', or use LocalLauncher."
        )
        raise CapabilityError(message) from error
    return ray
