"""Frames of the tcp engine: a signed header before the bytes, a signed answer after them."""

from __future__ import annotations

import dataclasses
import enum
import hmac
import struct

from hwcore.diffusion.engines.token import mac

__all__ = ["ANSWER_BYTES", "HEADER_BYTES", "Header", "Status", "answer", "answered"]

_HEADER = struct.Struct("!4sB3xQQQQ")
_ANSWER = struct.Struct("!4sB3xQ")
_HEADER_MAGIC, _ANSWER_MAGIC = b"hwf\x01", b"hwa\x01"
_MAC_BYTES = 32
_SUMMED = 1
HEADER_BYTES = _HEADER.size + _MAC_BYTES
ANSWER_BYTES = _ANSWER.size + _MAC_BYTES


class Status(enum.IntEnum):
    """What became of a frame."""

    LANDED = 0
    OUT_OF_BOUNDS = 1
    CHECKSUM = 2


@dataclasses.dataclass(frozen=True)
class Header:
    """What follows, and where it goes.

    Attributes
    ----------
    sequence : int
        Counts the frames of a connection from 0: none can be left out, repeated or moved.
    offset, size_bytes : int
        Where in the pool, and how much; each in [0, 2**64).
    checksum : int or None
        Of the bytes, where the writer sums them.
    """

    sequence: int
    offset: int
    size_bytes: int
    checksum: int | None

    def packed(self, key: bytes) -> bytes:
        """Return the header as it is sent."""
        flags = 0 if self.checksum is None else _SUMMED
        numbers = (self.sequence, self.offset, self.size_bytes, self.checksum or 0)
        head = _HEADER.pack(_HEADER_MAGIC, flags, *numbers)
        return head + mac(key, b"frame", head)

    @classmethod
    def unpacked(cls, data: bytes | bytearray, key: bytes) -> Header | None:
        """Return the header in ``data``, or None where that was not signed with the key."""
        head, signed = data[: _HEADER.size], data[_HEADER.size :]
        if not hmac.compare_digest(signed, mac(key, b"frame", head)):
            return None
        magic, flags, sequence, offset, size_bytes, summed = _HEADER.unpack(head)
        if magic != _HEADER_MAGIC:
            return None
        return cls(sequence, offset, size_bytes, summed if flags & _SUMMED else None)


def answer(sequence: int, status: Status, key: bytes) -> bytes:
    """Return the answer to a frame as it is sent."""
    head = _ANSWER.pack(_ANSWER_MAGIC, status, sequence)
    return head + mac(key, b"answer", head)


def answered(data: bytes, sequence: int, key: bytes) -> Status | None:
    """Return what became of the frame, or None where ``data`` is no answer to it."""
    head, signed = data[: _ANSWER.size], data[_ANSWER.size :]
    if not hmac.compare_digest(signed, mac(key, b"answer", head)):
        return None
    magic, status, seen = _ANSWER.unpack(head)
    if magic != _ANSWER_MAGIC or seen != sequence or status not in set(Status):
        return None
    return Status(status)
