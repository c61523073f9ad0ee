"""Inputs of jobs, from the client's frames or from a slot of this worker's pool."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from hwcore.diffusion.codec import unpack_tensors

if TYPE_CHECKING:
    from hwcore.backend import Backend
    from hwcore.diffusion.enums import EnumRegistry
    from hwcore.diffusion.router.todo import Compute
    from hwcore.diffusion.serving.spans import Spans
    from hwcore.diffusion.transfer import DiffusionTransferManager
    from hwcore.types import Event, Stream

__all__ = ["Arrival"]


class Arrival:
    """An input that has come and is not loaded yet.

    Attributes
    ----------
    request_id : str
    """

    def __init__(
        self,
        todo: Compute,
        manager: DiffusionTransferManager,
        backend: Backend,
        enums: EnumRegistry | None,
        spans: Spans,
    ) -> None:
        self.request_id = todo.request_id
        self._todo, self._manager = todo, manager
        self._hw, self._enums, self._spans = backend, enums, spans

    def load(self, stream: Stream | None = None) -> tuple[Any, Event | None]:
        """Return its tree on this worker's device, and the event from which it is there.

        None: it is there. Of the host, tensors are views of this worker's pool.

        Raises
        ------
        PeerError
            If it is damaged.
        ArgumentTypeError, ArgumentValueError
            If it is none.
        """
        started, todo = time.monotonic(), self._todo
        device = None if self._hw.info.device_type == "cpu" else self._hw.device()
        event: Event | None
        if todo.slot is None:
            tree, event = unpack_tensors(todo.frames, device, enums=self._enums), None
        else:
            (seal,) = todo.frames
            tree, event = self._manager.load_tensors_async(todo.slot, seal, device, stream)
        self._spans.add(todo.request_id, "load", started)
        return tree, event
