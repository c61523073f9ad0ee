"""A worker's memory: its engine, and the manager over it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from hwcore.diffusion.engines import open_engine
from hwcore.diffusion.transfer import DiffusionTransferManager
from hwcore.errors import ClosedError

if TYPE_CHECKING:
    from hwcore.backend import Backend
    from hwcore.diffusion.engines import Token
    from hwcore.diffusion.enums import EnumRegistry
    from hwcore.diffusion.serving.config import WorkerConfig

__all__ = ["close_manager", "open_manager"]

_log = logging.getLogger("hwcore")


def open_manager(
    config: WorkerConfig, token: Token, backend: Backend, enums: EnumRegistry | None
) -> DiffusionTransferManager:
    """Open a worker's engine, and a manager over its pool.

    Raises
    ------
    CapabilityError
        If no engine works here.
    """
    engine = open_engine(
        config.engine_specs(backend),
        config.pool_bytes,
        token,
        host=config.host,
        allow_remote=config.allow_remote,
        checksum=False,  # the manager's goes from end to end
        page_lock=config.page_lock,
        backend=backend,
    )
    return DiffusionTransferManager(engine, backend, enums=enums, checksum=config.checksum)


def close_manager(config: WorkerConfig, manager: DiffusionTransferManager) -> None:
    """Close a manager; what views its memory keeps that, which is said."""
    try:
        manager.close()
    except ClosedError as error:
        _log.warning("%s: %s", config.name, error)
