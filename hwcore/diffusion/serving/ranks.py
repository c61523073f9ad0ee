"""Requests for every rank of a role that computes on several: rank 0 alone talks to the router."""

from __future__ import annotations

import enum
import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

from hwcore._collectives import GroupBroadcast
from hwcore.diffusion.copying import write_layout
from hwcore.diffusion.manifest import (
    MAX_ENCODED_BYTES,
    decode_manifest,
    encode_manifest,
    manifest_of,
)
from hwcore.diffusion.tree import unflatten
from hwcore.diffusion.views import views
from hwcore.errors import PeerError, describe

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from hwcore.backend import Backend
    from hwcore.diffusion.enums import EnumRegistry

__all__ = ["Command", "RankGroup"]

_log = logging.getLogger("hwcore")
_MOST_WORDS, _MOST_BYTES = MAX_ENCODED_BYTES, 1 << 48


class Command(enum.IntEnum):
    """What rank 0 tells the others."""

    WAIT = 0
    """Nothing to do; ask again. It keeps the others from taking rank 0 for dead."""

    COMPUTE = 1
    """A request follows."""

    STOP = 2
    """Nothing comes any more."""


class RankGroup:
    """The ranks of one role.

    Parameters
    ----------
    group : ProcessGroup
        Where it knows the device by gloo alone, tensors are staged through the host, which is
        logged once.
    backend : Backend
    timeout_s : float
        How long a rank waits for the others, where the host waits (gloo). Rank 0 has to say
        something more often than that.
    enums : EnumRegistry, optional
        The enums that requests may hold.
    """

    def __init__(
        self,
        group: ProcessGroup,
        backend: Backend,
        timeout_s: float = 60.0,
        enums: EnumRegistry | None = None,
    ) -> None:
        where, device_type = "RankGroup", backend.info.device_type
        self._group, self._hw, self._enums = group, backend, enums
        self._payload = GroupBroadcast(group, device_type, timeout_s, where)
        # What the host reads goes on the host's library, where the group has one.
        host = GroupBroadcast(group, "cpu", timeout_s, where)
        self._words = host if host.waits else self._payload
        self.rank, self.size = self._payload.rank, distributed.get_world_size(group)
        self.is_source = self._payload.is_source
        if self._payload.staged:
            _log.warning(
                "hwcore: backend `%s`: requests for the ranks of a role go through the host; the "
                "group's backend is gloo, the device's own is %s",
                backend.info.name,
                backend.distributed_backend(),
            )

    def send(self, command: Command, tree: object = None) -> None:
        """Tell the other ranks, as rank 0; with ``COMPUTE`` goes a tree, its tensors anywhere.

        Raises
        ------
        PeerError
            If a rank is gone.
        ArgumentTypeError, ArgumentValueError
            If the tree cannot be sent. The others were told nothing.
        """
        if command is not Command.COMPUTE:
            self._exchange([command, 0, 0])
            return
        manifest, tensors = manifest_of(tree, self._enums, "RankGroup.send")
        words = encode_manifest(manifest, "RankGroup.send")
        # Before the first word, for what cannot be gathered must not leave the others waiting.
        payload = self._buffer(manifest.size_bytes)
        write_layout(payload, manifest.layout, tensors)
        self._exchange([command, len(words), manifest.size_bytes])
        self._say(torch.frombuffer(bytearray(words), dtype=torch.uint8))
        if payload.numel():
            self._payload(payload.cpu() if self._payload.staged else payload)

    def receive(self) -> tuple[Command, Any]:
        """Return what rank 0 says, as any other rank; the tensors are on this rank's device.

        Raises
        ------
        PeerError
            If rank 0 is gone, was silent for too long, or said what cannot be.
        """
        code, count, size_bytes = self._exchange([0, 0, 0])
        sizes_are_sound = 0 < count <= _MOST_WORDS and 0 <= size_bytes <= _MOST_BYTES
        if code not in list(Command) or (code == Command.COMPUTE and not sizes_are_sound):
            expected = "what RankGroup.send of this hwcore says"
            fix = "Start all ranks with the same version, and let them take part in each step"
            got = (code, count, size_bytes)
            raise PeerError(describe("RankGroup.receive", "rank 0's word", got, expected, fix))
        if code != Command.COMPUTE:
            return Command(code), None
        words = self._say(torch.empty(count, dtype=torch.uint8))
        payload = self._buffer(size_bytes)
        if size_bytes and self._payload.staged:
            staged = torch.empty(size_bytes, dtype=torch.uint8)
            self._payload(staged)
            payload.copy_(staged)
        elif size_bytes:
            self._payload(payload)
        manifest = decode_manifest(words.numpy().tobytes(), size_bytes, "RankGroup.receive")
        device = payload.device
        tensors = views(manifest.layout, lambda entry: (payload, entry.offset), device)
        tree = unflatten(manifest.structure, tensors, self._enums, "RankGroup.receive")
        return Command.COMPUTE, tree

    def any_failed(self, failed: bool) -> bool:
        """Say whether a rank failed, to all ranks; each calls it once after a request.

        Raises
        ------
        PeerError
            If a rank is gone.
        """
        flag = self._on_words(torch.tensor([int(failed)], dtype=torch.int64))
        try:
            distributed.all_reduce(flag, distributed.ReduceOp.MAX, self._group)
        except (RuntimeError, ValueError) as error:
            message = (
                f"RankGroup.any_failed: rank {self.rank} got {error!r}; expected a word of every "
                f"rank. Look for the rank that ended first, and start all of them again."
            )
            raise PeerError(message) from error
        return bool(flag.item())

    # --- Parts of a message ---

    def _exchange(self, numbers: list[int]) -> list[int]:
        said = self._say(torch.tensor(numbers, dtype=torch.int64))
        return [int(number) for number in said.tolist()]

    def _say(self, words: torch.Tensor) -> torch.Tensor:
        """Broadcast what the host reads; a device's library takes it by way of the device."""
        moved = self._on_words(words)
        self._words(moved)
        return moved.cpu()

    def _on_words(self, words: torch.Tensor) -> torch.Tensor:
        return words if self._words.waits else words.to(self._hw.device())

    def _buffer(self, size_bytes: int) -> torch.Tensor:
        return torch.empty(size_bytes, dtype=torch.uint8, device=self._hw.device())
