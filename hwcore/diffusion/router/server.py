"""The router: its mind on sockets, with a clock."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import secrets
import time
import typing
from typing import TYPE_CHECKING, Any, Self, TypeVar

from hwcore.diffusion import messages
from hwcore.diffusion.messages import (
    Finished,
    FromClient,
    FromWorker,
    Heartbeat,
    Pushed,
    Register,
    Submit,
    ToClient,
)
from hwcore.diffusion.router.config import RouterConfig
from hwcore.diffusion.router.core import RouterCore
from hwcore.diffusion.router.doors import Doors
from hwcore.diffusion.router.libraries import zmq
from hwcore.diffusion.router.metrics import Metrics
from hwcore.diffusion.router.sockets import Drops, Loop, as_name, send
from hwcore.diffusion.router.stats import RouterStats, stats_of
from hwcore.errors import ArgumentValueError, CapabilityError, ClosedError, PeerError, describe

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from hwcore.diffusion.engines.token import Token
    from hwcore.diffusion.router.security import Party

__all__ = ["Router"]

_T = TypeVar("_T")
_LEAST_S = 0.005  # between two looks at all requests
_LOOK_S = 0.5  # between two looks for the metrics, and at most between two turns
_MOST_CLIENTS = 16384
_TO_CLIENT = frozenset(typing.get_args(ToClient))


class Router:
    """Takes requests of clients through workers.

    Its sockets are bound when it is made; :meth:`start` serves them in a thread,
    :meth:`serve_forever` in the caller's.

    Parameters
    ----------
    token : Token
        The launch's; who lacks it gets no connection.
    config : RouterConfig, optional
    host : str
        The address of this machine that it binds to.
    client_port, worker_port : int
        0 for any.
    allow_remote : bool
        Whether ``host`` may be one that other machines reach.
    metrics_port : int, optional
        Where Prometheus finds its figures, on 127.0.0.1; 0 for any port. None: nowhere.

    Attributes
    ----------
    metrics : Metrics

    Raises
    ------
    ArgumentTypeError, ArgumentValueError, CapabilityError
    OSError
        If a port is taken.
    """

    def __init__(
        self,
        token: Token,
        config: RouterConfig | None = None,
        *,
        host: str = "127.0.0.1",
        client_port: int = 0,
        worker_port: int = 0,
        allow_remote: bool = False,
        metrics_port: int | None = None,
    ) -> None:
        config = config or RouterConfig()
        self._seen: collections.OrderedDict[str, float] = collections.OrderedDict()
        self._turned = self._ticked = self._looked = 0.0
        self._closed = False
        self.metrics = Metrics(metrics_port)
        self._drops = Drops("Router", self.metrics.dropped)
        ports = (client_port, worker_port)
        try:
            self._doors = Doors(token, config, host, ports, allow_remote, self._drops)
        except BaseException:
            self.metrics.close()
            raise
        self._core = RouterCore(config, self.metrics, secrets.randbits(61))
        self._loop = Loop("hwcore-router", self._drops, self._turn, self._end)
        self._doors.watch(self._loop)
        self._loop.add(self._doors.workers, self._from_worker)
        self._loop.add(self._doors.clients, self._from_client)

    @property
    def client_address(self) -> str:
        """What clients connect to."""
        return self._doors.client_address

    @property
    def worker_address(self) -> str:
        """What workers connect to."""
        return self._doors.worker_address

    def __repr__(self) -> str:
        state = ", closed" if self._closed else ""
        return f"<hwcore Router at {self.client_address} and {self.worker_address}{state}>"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        self.close()

    # --- For its owner: from any thread ---

    def start(self) -> Self:
        """Serve in a thread."""
        self._check("start")
        if not self._loop.is_running:
            self._loop.start()
        return self

    def serve_forever(self) -> None:
        """Serve here until another thread, or a signal's handler, calls :meth:`close`."""
        self._check("serve_forever")
        if self._loop.is_running:
            message = "Router: serve_forever: it is served already; expected one that is not. "
            raise CapabilityError(message + "Call either start() or serve_forever().")
        self._loop.run()

    def drain(self) -> None:
        """Take no more requests. Those that there are go on; see ``stats().unfinished``."""
        self._ask("drain", lambda: self._core.drain())

    def drain_worker(self, name: str) -> None:
        """Give a worker no new work, so that it can be stopped when it has none.

        Raises
        ------
        ArgumentValueError
            If there is none of this name.
        """
        if not self._ask("drain_worker", lambda: self._core.drain_worker(name)):
            fix = "Take one of stats().workers"
            expected = "the name of a worker that is alive"
            raise ArgumentValueError(describe("drain_worker", "name", name, expected, fix))

    def stats(self) -> RouterStats:
        """Return how it is."""
        return self._ask("stats", self._stats)

    def close(self) -> None:
        """Answer every request that is not over with a refusal, and end. Once is enough."""
        self._closed = True
        self._loop.stop()

    def _ask(self, what: str, question: Callable[[], _T]) -> _T:
        """Return what a function returns in the loop's thread."""
        self._check(what)
        if self._loop.is_current or not self._loop.is_running:
            return question()
        future: concurrent.futures.Future[_T] = concurrent.futures.Future()

        def answer() -> None:
            try:
                future.set_result(question())
            except Exception as error:  # noqa: BLE001 - raised where it is waited for
                future.set_exception(error)

        if not self._loop.call(answer):
            self._closed = True
            self._check(what)
        return future.result()

    def _check(self, what: str) -> None:
        if self._closed:
            message = f"Router: {what}: it is closed; expected an open one. Open another."
            raise ClosedError(message)

    def _stats(self) -> RouterStats:
        return stats_of(self._core, len(self._seen), self._drops.counts)

    # --- In the loop's thread ---

    def _from_client(self, frames: list[bytes]) -> None:
        name, message = self._opened(frames, FromClient, "client")
        if name is None:
            return
        rest, now = frames[2:], time.monotonic()
        if bool(rest) != isinstance(message, Submit):
            self._drops("malformed", f"of client {name}: {len(rest)} frames")
            return
        self.metrics.received(sum(map(len, rest)))
        self._seen[name] = now
        self._seen.move_to_end(name)
        self._core.from_client(name, message, rest, now)
        self._send()

    def _from_worker(self, frames: list[bytes]) -> None:
        name, message = self._opened(frames, FromWorker, "worker")
        if name is None:
            return
        rest, now = frames[2:], time.monotonic()
        size_bytes = sum(map(len, rest))
        if isinstance(message, Finished):
            fits = bool(rest) and size_bytes <= self._core.config.max_result_bytes
        elif isinstance(message, Pushed):
            fits = len(rest) == 1 and size_bytes <= messages.LARGEST
        else:
            fits = not rest
        if not fits:
            self._drops("malformed", f"of worker {name}: {len(rest)} frames, {size_bytes} bytes")
            return
        workers, most = self._core.workers, self._core.config.max_workers
        if len(workers) >= most and isinstance(message, Register) and workers.get(name) is None:
            self._drops("workers", f"{name} is one more than {most}")
            return
        self._core.from_worker(name, message, rest, now)
        if isinstance(message, Heartbeat):
            self._core.confirm(name, message.epoch)
        self._send()

    def _opened(self, frames: list[bytes], kind: object, party: Party) -> tuple[str | None, Any]:
        """Return who said what, or None for both where that is not to be told."""
        name = as_name(frames[0])
        if name is None:
            self._drops("identity", f"of a {party}: {frames[0][:64]!r}")
        elif not 2 <= len(frames) <= 2 + messages.MOST_FRAMES:
            self._drops("malformed", f"of {party} {name}: {len(frames) - 1} frames")
        else:
            try:
                return name, messages.decode(frames[1], kind)
            except PeerError as error:
                self._drops("malformed", f"of {party} {name}: {error}")
        return None, None

    def _turn(self, now: float) -> float:
        """Do what is due; return when something is next."""
        core = self._core
        if now - self._turned > _LOOK_S + core.config.dead_after_s / 4:
            # This process did not run. What others said meanwhile may still be on its way in.
            core.excuse_silence(now)
            self._seen = collections.OrderedDict.fromkeys(self._seen, now)
        self._turned = now
        if now >= max(core.due, self._ticked + _LEAST_S):
            self._ticked = now
            core.tick(now)
        gone = now - core.config.dead_after_s
        while self._seen and (
            len(self._seen) > _MOST_CLIENTS or next(iter(self._seen.values())) < gone
        ):
            client, _ = self._seen.popitem(last=False)
            core.client_gone(client, now)
        if now >= self._looked + _LOOK_S:
            self._looked = now
            self.metrics.look(core)
        self._send()
        due = max(core.due, self._ticked + _LEAST_S)
        if self._seen:
            due = min(due, next(iter(self._seen.values())) + core.config.dead_after_s + 1e-3)
        return min(due, self._looked + _LOOK_S)

    def _send(self) -> None:
        for sent in self._core.take():
            client = type(sent.message) in _TO_CLIENT
            socket = self._doors.clients if client else self._doors.workers
            frames = (sent.to.encode(), messages.encode(sent.message), *sent.frames)
            why_not = send(socket, frames)
            if why_not:
                self._drops(why_not, f"for {sent.to}")
            elif client and sent.frames:
                self.metrics.sent(sum(map(len, sent.frames)))

    def _end(self) -> None:
        self._core.give_up(time.monotonic())
        with contextlib.suppress(zmq.ZMQError):
            self._send()
        self._doors.close()
        self.metrics.close()
