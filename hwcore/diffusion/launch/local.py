"""LocalLauncher: a deployment as processes of this machine."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import subprocess
import sys
import threading
import time
from typing import IO, TYPE_CHECKING, Self

import msgspec

from hwcore import _env
from hwcore._checks import check_instance
from hwcore.diffusion.engines import Token
from hwcore.diffusion.launch.deployment import Deployment
from hwcore.diffusion.launch.process import Order
from hwcore.diffusion.router.client import RouterClient
from hwcore.errors import ArgumentValueError, PeerError, PeerTimeoutError, describe

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["LocalLauncher"]

_log = logging.getLogger("hwcore")
_ROUTER = "router"
_TURN_S = 0.05


@dataclasses.dataclass(eq=False)
class _Process:
    order: Order
    environment: dict[str, str]
    popen: subprocess.Popen[bytes] | None = None
    status: IO[str] | None = None
    deaths: int = 0


class LocalLauncher:
    """Starts a router and its workers, starts again what dies, and ends them in order.

    Each is a Python process of its own with the same interpreter and import path; none outlives
    this one, however it ends. Use it in a ``with`` block.

    Parameters
    ----------
    deployment : Deployment
    token : Token, optional
        By default a new one, handed to the processes by an inherited descriptor.
    metrics_port : int, optional
        Where the router's figures are for Prometheus, on 127.0.0.1; 0: any port.

    Attributes
    ----------
    client_address : str
        Where the router takes requests.
    token : Token
        What a client needs besides.
    deaths : dict of str to int
        How often each process died so far, by name.

    Raises
    ------
    PeerError
        If a process ended before it was ready.
    PeerTimeoutError
        If they were not ready in ``deployment.ready_timeout_s``.
    """

    def __init__(
        self, deployment: Deployment, token: Token | None = None, metrics_port: int | None = None
    ) -> None:
        check_instance("LocalLauncher", "deployment", deployment, Deployment, "Deployment()")
        self.deployment, self.token = deployment, token or Token.create()
        self._lock = threading.RLock()
        self._closing = False
        self._token_fd = -1 if self.token.is_off else self.token.descriptor()
        has_token = not self.token.is_off
        router = Order(
            name=_ROUTER, router=deployment.router, metrics_port=metrics_port, has_token=has_token
        )
        self._processes = {_ROUTER: _Process(router, {})}
        self.client_address = ""
        self._watcher = threading.Thread(target=self._watch, name="hwcore-launcher", daemon=True)
        deadline = time.monotonic() + deployment.ready_timeout_s
        try:
            self._start_all(deadline)
        except BaseException:
            self.close()
            raise
        self._watcher.start()

    def __repr__(self) -> str:
        return f"<hwcore LocalLauncher of {len(self._processes)} at {self.client_address}>"

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
        """The processes that run, by name: ``router``, ``encoder-0`` and so on."""
        with self._lock:
            running = {name: it.popen for name, it in self._processes.items()}
            return {n: it.pid for n, it in running.items() if it and it.poll() is None}

    @property
    def deaths(self) -> dict[str, int]:
        """How often each process died."""
        with self._lock:
            return {name: process.deaths for name, process in self._processes.items()}

    def client(self) -> RouterClient:
        """Return a new client; close it when it has served."""
        return RouterClient(self.client_address, self.token)

    def send_signal(self, name: str, number: int) -> None:
        """Send a process a signal: to have it end and be started again, or to stop it for a while.

        Raises
        ------
        ArgumentValueError
            If none of that name runs.
        """
        with self._lock:
            process = self._processes.get(name)
            popen = process.popen if process is not None else None
            if popen is None or popen.poll() is not None:
                fix, expected = "Take one of .pids", "the name of a process that runs"
                raise ArgumentValueError(describe("send_signal", "name", name, expected, fix))
            popen.send_signal(number)

    def close(self, timeout_s: float = 20.0) -> None:
        """End all: workers first, each after the request that it is at, then the router.

        Who waits for an answer gets a refusal. Processes that do not end in time are killed. Once
        is enough.
        """
        with self._lock:
            if self._closing:
                return
            self._closing = True
        if self._watcher.is_alive():
            self._watcher.join()
        deadline = time.monotonic() + timeout_s
        workers = [process for name, process in self._processes.items() if name != _ROUTER]
        _end(workers, deadline)
        _end([self._processes[_ROUTER]], max(deadline, time.monotonic() + 1.0))
        if self._token_fd >= 0:
            os.close(self._token_fd)
            self._token_fd = -1

    # --- Processes ---

    def _start_all(self, deadline: float) -> None:
        self._start(self._processes[_ROUTER])
        said = self._wait_ready(_ROUTER, deadline)
        addresses = msgspec.json.decode(said, type=dict[str, str])
        self.client_address, worker_address = addresses["clients"], addresses["workers"]
        router = self._processes[_ROUTER]  # started again it is where it was
        ports = {
            "client_port": int(self.client_address.rpartition(":")[2]),
            "worker_port": int(worker_address.rpartition(":")[2]),
        }
        router.order = msgspec.structs.replace(router.order, **ports)
        for name, spec in self.deployment.processes():
            environment = dict(spec.environment)
            if spec.backend:
                environment[_env.BACKEND] = spec.backend
            has_token = not self.token.is_off
            order = Order(name=name, role=spec, worker_address=worker_address, has_token=has_token)
            self._processes[name] = _Process(order, environment)
            self._start(self._processes[name])
        for name, _ in self.deployment.processes():
            self._wait_ready(name, deadline)

    def _start(self, process: _Process) -> None:
        reader, writer = os.pipe()
        inherited = [writer] if self._token_fd < 0 else [writer, self._token_fd]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        if self._token_fd >= 0:
            environment[_env.TOKEN_FD] = str(self._token_fd)
        try:
            process.popen = subprocess.Popen(
                [sys.executable, "-m", "hwcore.diffusion.launch", str(writer)],
                stdin=subprocess.PIPE,
                pass_fds=inherited,
                env={**environment, **process.environment},
                start_new_session=True,  # a terminal's Ctrl-C is the launcher's
            )
        finally:
            os.close(writer)
            if process.popen is None:
                os.close(reader)
        process.status = os.fdopen(reader)
        assert process.popen.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died at once; that is seen elsewhere
            process.popen.stdin.write(msgspec.json.encode(process.order) + b"\n")
            process.popen.stdin.flush()

    def _wait_ready(self, name: str, deadline: float) -> str:
        """Return what a process says when it is ready."""
        process = self._processes[name]
        assert process.popen is not None
        assert process.status is not None
        said: list[str] = []
        status = process.status
        reader = threading.Thread(target=lambda: said.append(status.readline()), daemon=True)
        reader.start()
        reader.join(max(0.0, deadline - time.monotonic()))
        if said and said[0]:
            return said[0]
        if not said:
            message = (
                f"LocalLauncher: {name} was not ready after "
                f"{self.deployment.ready_timeout_s:g} s; expected it to load its model and "
                f"register. Look at what it wrote, or raise Deployment.ready_timeout_s."
            )
            raise PeerTimeoutError(message)
        code = process.popen.wait()
        message = (
            f"LocalLauncher: {name} ended with {code} before it was ready; expected it to load its "
            f"model and register. Look at what it wrote."
        )
        raise PeerError(message)

    def _watch(self) -> None:
        """Start again what died."""
        while not self._closing:
            time.sleep(_TURN_S)
            with self._lock:
                for name, process in self._processes.items():
                    dead = process.popen is not None and process.popen.poll() is not None
                    if dead and not self._closing:
                        self._bury(name, process)

    def _bury(self, name: str, process: _Process) -> None:
        assert process.popen is not None
        code, process.deaths = process.popen.returncode, process.deaths + 1
        _forget(process)
        if process.deaths > self.deployment.restarts:
            _log.error("%s ended with %d, and is not started again", name, code)
            return
        _log.warning("%s ended with %d; it is started again", name, code)
        self._start(process)


def _forget(process: _Process) -> None:
    popen, process.popen = process.popen, None
    if popen is not None and popen.stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            popen.stdin.close()
    if process.status is not None:
        process.status.close()
        process.status = None


def _end(processes: list[_Process], deadline: float) -> None:
    running = [process for process in processes if process.popen is not None]
    for process in running:
        assert process.popen is not None
        process.popen.terminate()
    for process in running:
        assert process.popen is not None
        try:
            process.popen.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            _log.warning("%s did not end, and is killed", process.order.name)
            process.popen.kill()
            process.popen.wait()
        _forget(process)
