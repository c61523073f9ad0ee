"""One process of a deployment, as its launcher starts it; nothing to be called by hand.

It reads what it is from its standard input, one line of JSON, and ends when that closes: whichever
way its launcher ends, it does not stay behind. When it is ready it says so, in one line, to the
descriptor that its argument names. The launch token comes by a descriptor too.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from typing import TYPE_CHECKING, Any

import msgspec

from hwcore.diffusion.engines import Token
from hwcore.diffusion.launch.deployment import RoleSpec  # noqa: TC001 - msgspec resolves it
from hwcore.diffusion.router.config import RouterConfig  # noqa: TC001 - as above
from hwcore.diffusion.serving.config import WorkerConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    from hwcore.diffusion.router.server import Router
    from hwcore.diffusion.serving.scheduler import SchedulerDisaggMixin

__all__ = ["Order", "main", "make_router", "make_scheduler"]

_log = logging.getLogger("hwcore")
_STDIN = 0
_GRACE_S = 10.0  # for the request that it is at, once the launcher is gone


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What a process is to be.

    Attributes
    ----------
    name : str
    router : RouterConfig or None
        It is the router.
    role : RoleSpec or None
        It is a worker.
    worker_address : str
        A worker's: where the router listens.
    client_port, worker_port, metrics_port : int
        A router's; 0: one that is free. No metrics_port: no metrics.
    """

    name: str
    router: RouterConfig | None = None
    role: RoleSpec | None = None
    worker_address: str = ""
    client_port: int = 0
    worker_port: int = 0
    metrics_port: int | None = None
    has_token: bool = True


def make_router(order: Order, token: Token) -> Router:
    """Open the router that an order wants; it does not serve yet."""
    from hwcore.diffusion.router.server import Router

    return Router(
        token,
        order.router,
        client_port=order.client_port,
        worker_port=order.worker_port,
        metrics_port=order.metrics_port,
    )


def make_scheduler(order: Order, token: Token) -> SchedulerDisaggMixin:
    """Load the model of the role that an order wants, and register with its router."""
    assert order.role is not None
    spec = order.role
    scheduler: SchedulerDisaggMixin = spec.load()(**spec.options)
    config: Any = WorkerConfig  # its checks say what is wrong with spec.worker
    settings = {"role": spec.role, "router": order.worker_address, "name": order.name}
    scheduler._init_disagg_state(config(**settings, **_tuples(spec.worker)), token)
    return scheduler


def _tuples(options: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}


def main(status_fd: int) -> None:
    """Be what the first line of the standard input says, until told to end."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    order = msgspec.json.decode(_read_line(), type=Order)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's; the launcher decides
    token = Token.from_environment() if order.has_token else Token.off()
    with open(status_fd, "w", buffering=1) as status:
        if order.router is not None:
            _be_router(order, token, status.write)
        else:
            _be_worker(order, token, status.write)


def _be_router(order: Order, token: Token, say: Callable[[str], object]) -> None:
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    with make_router(order, token) as router:
        _end_with_launcher(ended.set)
        addresses = {"clients": router.client_address, "workers": router.worker_address}
        say(msgspec.json.encode(addresses).decode() + "\n")
        ended.wait()


def _be_worker(order: Order, token: Token, say: Callable[[str], object]) -> None:
    scheduler = make_scheduler(order, token)
    signal.signal(signal.SIGTERM, lambda *_: scheduler.stop_disagg())
    _end_with_launcher(scheduler.stop_disagg)

    def say_ready() -> None:
        if scheduler.wait_registered(3600.0):
            with contextlib.suppress(OSError, ValueError):  # nobody listens any more
                say("ready\n")

    threading.Thread(target=say_ready, daemon=True).start()
    scheduler._disagg_prefetch_event_loop()


def _end_with_launcher(end: Callable[[], object]) -> None:
    """Call ``end`` when the launcher closes the standard input, and insist after a while."""

    def watch() -> None:
        while os.read(_STDIN, 4096):
            pass
        end()
        threading.Event().wait(_GRACE_S)
        _log.error("the launcher is gone, and this process did not end in %g s", _GRACE_S)
        os._exit(1)

    threading.Thread(target=watch, name="launcher", daemon=True).start()


def _read_line() -> bytes:
    """Return the first line of the standard input.

    Not by `sys.stdin`: a thread that reads from it would keep the interpreter from ending.
    """
    line = b""
    while not line.endswith(b"\n"):
        part = os.read(_STDIN, 65536)
        if not part:
            message = "the launcher is gone"
            raise SystemExit(message)
        line += part
    return line
