"""What may be set of a worker."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from hwcore._checks import check_instance, check_size, is_number
from hwcore.diffusion.roles import RoleType
from hwcore.errors import ArgumentTypeError, ArgumentValueError, describe
from hwcore.types import TransferEngineSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hwcore.backend import Backend

__all__ = ["WorkerConfig"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkerConfig:
    """The limits of a worker.

    Attributes
    ----------
    role : RoleType
    router : str
        Where the router listens for workers.
    name : str
        Of its own among all workers; kept over restarts.
    capacity : int
        Jobs at a time: one that is computed, those whose inputs are loaded ahead, and those whose
        outputs are not pushed yet. At least 2 for any of it to overlap.
    pool_bytes : int
        Of host memory, for inputs, and for outputs on their way where a peer's pool is not mapped.
    slot_bytes : tuple of int
        What the router may use from the beginning; later as many slots, of sizes that were used.
        Without any, each transfer waits until the router has asked for its slot.
    engines : tuple of str or TransferEngineSpec
        Transfer engines, best first: ``shm``, ``tcp``, ``mooncake``, each in host memory and over
        what its plugin names, else TCP. Empty: as the device's plugin has it.
    host : str
        Where tcp and mooncake listen.
    allow_remote : bool
        Allow a ``host`` that other machines reach.
    page_lock : bool
        Page-lock the pool for the device.
    checksum : bool
        Whether an output is summed where it is written, and again where it is loaded.
    pushes : int
        Outputs that are pushed at a time.
    push_timeout_s : float
    """

    role: RoleType
    router: str
    name: str
    capacity: int = 4
    pool_bytes: int = 256 << 20
    slot_bytes: tuple[int, ...] = ()
    engines: tuple[str | TransferEngineSpec, ...] = ()
    host: str = "127.0.0.1"
    allow_remote: bool = False
    page_lock: bool = False
    checksum: bool = True
    pushes: int = 2
    push_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        """Check every value."""
        where = "WorkerConfig"
        check_instance(where, "role", self.role, RoleType, "hwcore.diffusion.RoleType")
        for name in ("router", "name", "host"):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise ArgumentTypeError(describe(where, name, value, "a str", f"Set {name}"))
            if not value:
                raise ArgumentValueError(describe(where, name, value, "some text", f"Set {name}"))
        for name in ("capacity", "pool_bytes", "pushes"):
            check_size(where, name, getattr(self, name), 1, "Pass a count of at least 1")
        for size_bytes in self.slot_bytes:
            check_size(where, "slot_bytes", size_bytes, 1, "Pass sizes in bytes")
        if sum(self.slot_bytes) > self.pool_bytes:
            expected = f"sizes of {self.pool_bytes} bytes together, the pool's"
            fix = "Make pool_bytes larger, or grant fewer slots from the beginning"
            raise ArgumentValueError(describe(where, "slot_bytes", self.slot_bytes, expected, fix))
        seconds, fix = self.push_timeout_s, "Pass seconds, more than none"
        if not is_number(seconds):
            raise ArgumentTypeError(describe(where, "push_timeout_s", seconds, "a number", fix))
        if not 0 < seconds < math.inf:
            raise ArgumentValueError(describe(where, "push_timeout_s", seconds, "above 0", fix))

    def engine_specs(self, backend: Backend) -> Sequence[TransferEngineSpec]:
        """Return the engines to try, best first."""
        offered = backend.transfer_engines()
        in_host = {spec.name: spec for spec in reversed(offered) if spec.memory == "host"}
        packages = {spec.name: spec.package for spec in offered}
        return [
            engine
            if isinstance(engine, TransferEngineSpec)
            else in_host.get(engine)
            or TransferEngineSpec(engine, "tcp", package=packages.get(engine))
            for engine in self.engines
        ] or offered
