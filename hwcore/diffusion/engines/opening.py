"""Choose and open an engine; what is passed over is said, with what to do about it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from hwcore._checks import check_size
from hwcore.activation import current_backend
from hwcore.diffusion.engines.host import Settings
from hwcore.diffusion.engines.mooncake import MooncakeEngine
from hwcore.diffusion.engines.shm import ShmEngine
from hwcore.diffusion.engines.tcp import TcpEngine
from hwcore.diffusion.engines.token import Token
from hwcore.errors import ArgumentTypeError, ArgumentValueError, CapabilityError, describe
from hwcore.types import TransferEngineSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hwcore.backend import Backend
    from hwcore.diffusion.engines.host import HostEngine
    from hwcore.diffusion.engines.interface import Engine

__all__ = ["open_engine"]

_log = logging.getLogger("hwcore")


def open_engine(
    specs: Sequence[TransferEngineSpec],
    size_bytes: int,
    token: Token,
    *,
    host: str = "127.0.0.1",
    allow_remote: bool = False,
    checksum: bool = True,
    max_peers: int = 64,
    page_lock: bool = False,
    backend: Backend | None = None,
) -> Engine:
    """Open the first engine of ``specs`` that works here.

    Called once by each process of a launch. Where shared memory cannot be had, ``"shm"`` opens
    ``"tcp"`` in its place. Each engine that is passed over is one WARNING in the log.

    Parameters
    ----------
    specs : sequence of TransferEngineSpec
        Best first; what ``backend.transfer_engines()`` returns, or a choice of it.
    size_bytes : int
        Of the pool, at least 1. All its pages are taken at once.
    token : Token
        The launch's; ``Token.off()`` to authenticate nobody.
    host : str
        Where tcp and mooncake listen, and what peers are told: an address of this machine.
    allow_remote : bool
        Allow a ``host`` that other machines reach. Writers are authenticated then as ever, and
        nothing is encrypted; what Mooncake listens on has no authentication at all.
    checksum : bool
        Whether tcp sums what it writes, and the other side checks it.
    max_peers : int
        Connections that are served at a time, at least 1.
    page_lock : bool
        Page-lock the pool, and the pools mapped here, for the device: by the backend's
        ``register_host_memory``, which may do nothing.
    backend : Backend, optional
        For ``page_lock``; by default the current one.

    Raises
    ------
    CapabilityError
        If none works, with each one's reason; or the device cannot page-lock the pool.
    ArgumentTypeError, ArgumentValueError
        If an argument is not as above.
    """
    where = "open_engine"
    if not isinstance(token, Token):  # its value is not for a traceback
        got, fix = type(token).__name__, "Pass the launch's own, or Token.off()"
        raise ArgumentTypeError(describe(where, "the type of `token`", got, "Token", fix))
    fix = "Pass how many connections to serve at a time"
    check_size(where, "`max_peers`", max_peers, 1, fix)
    check_size(where, "`size_bytes`", size_bytes, 1, "Pass the size of the pool in bytes")
    specs = list(specs)
    if not specs:
        fix = "Pass what backend.transfer_engines() returns"
        raise ArgumentValueError(describe(where, "`specs`", specs, "at least one", fix))
    register = (backend or current_backend()).register_host_memory if page_lock else None
    passed = []
    for spec in specs:
        if not isinstance(spec, TransferEngineSpec):
            fix = "Pass what backend.transfer_engines() returns"
            raise ArgumentTypeError(describe(where, "`specs`", spec, "TransferEngineSpecs", fix))
        settings = Settings(
            size_bytes, token, host, allow_remote, checksum, max_peers, register, spec.protocol,
            str(spec.options.get("device", "")), spec.package,
        )  # fmt: skip
        try:
            return _maker(spec)(settings)
        except CapabilityError as error:
            _log.warning("transfer engine %s is passed over: %s", spec.name, error)
            passed.append(f"{spec.name}: {error}")
    reasons = " ".join(passed)
    message = f"{where}: no engine works here; expected one of {len(passed)} to. {reasons}"
    raise CapabilityError(message)


def _maker(spec: TransferEngineSpec) -> Callable[[Settings], HostEngine]:
    """Return what opens the engine of a spec."""
    makers: dict[str, Callable[[Settings], HostEngine]] = {
        "shm": _shared_or_tcp,
        "tcp": TcpEngine,
        "mooncake": MooncakeEngine,
    }
    if spec.name not in makers:
        message = (
            f"its name got {spec.name!r}; expected one of {', '.join(makers)}. Leave it out of the "
            f"specs."
        )
        raise CapabilityError(message)
    if spec.memory != "host":
        message = (
            f"`memory` of {spec.name} got {spec.memory!r}; expected 'host': pools are in host "
            f"memory. Give a spec for host memory as well."
        )
        raise CapabilityError(message)
    return makers[spec.name]


def _shared_or_tcp(settings: Settings) -> HostEngine:
    try:
        return ShmEngine(settings)
    except CapabilityError as error:
        _log.warning("transfer engine tcp takes the place of shm: %s", error)
        return TcpEngine(settings)
