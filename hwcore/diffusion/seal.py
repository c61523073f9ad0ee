"""The seal of a transfer: what its receiver needs to read a slot, and to know that all came."""

from __future__ import annotations

import functools

import msgspec

from hwcore.diffusion.manifest import MAX_ENCODED_BYTES, Manifest, decode_manifest
from hwcore.errors import ArgumentTypeError, ArgumentValueError, describe

__all__ = ["MAX_SEAL_BYTES", "seal", "unseal"]

_VERSION = 1

MAX_SEAL_BYTES = MAX_ENCODED_BYTES + 64
"""Bytes of a seal: what a peer may make this side decode."""


class _Wire(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A seal on the wire; ``checksum`` is None where the sender sums nothing."""

    version: int
    size_bytes: int
    checksum: int | None
    manifest: bytes


_CACHED_BYTES = 1024
_decoded = functools.lru_cache(256)(decode_manifest)  # most requests have the shapes of others
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Wire)


def seal(encoded: bytes, size_bytes: int, checksum: int | None) -> bytes:
    """Return a seal.

    Parameters
    ----------
    encoded : bytes
        The manifest, from ``encode_manifest``.
    size_bytes : int
        That were written, from the slot's start.
    checksum : int or None
        Of these bytes.
    """
    return _encoder.encode(_Wire(_VERSION, size_bytes, checksum, encoded))


def unseal(
    data: bytes | bytearray | memoryview, limit_bytes: int, where: str = "unseal"
) -> tuple[Manifest, int | None]:
    """Return manifest and checksum of a seal that may come from anywhere.

    Parameters
    ----------
    data : bytes-like
    limit_bytes : int
        Bytes of the slot.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        If it is no seal, or describes what the slot cannot hold.
    """
    fix = "Pass what push_to_peer() or send_tensors() returned on the other side"
    try:
        size = memoryview(data).nbytes
    except TypeError as error:
        raise ArgumentTypeError(describe(where, "seal", data, "bytes", fix)) from error
    if size > MAX_SEAL_BYTES:
        expected = f"at most {MAX_SEAL_BYTES} bytes"
        raise ArgumentValueError(describe(where, "len(seal)", size, expected, fix))
    try:
        wire = _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeError, RecursionError, OverflowError) as error:
        message = describe(where, "seal", f"{size} bytes: {error}", "a seal", fix)
        raise ArgumentValueError(message) from error
    if wire.version != _VERSION:
        expected, fix = f"{_VERSION}, of this hwcore", "Install the same hwcore on both sides"
        raise ArgumentValueError(describe(where, "version", wire.version, expected, fix))
    small = len(wire.manifest) <= _CACHED_BYTES
    manifest = (_decoded if small else decode_manifest)(wire.manifest, limit_bytes, where)
    if manifest.size_bytes != wire.size_bytes:  # it places tensors otherwise than this side does
        expected = f"{manifest.size_bytes}, by its manifest"
        fix = "Install the same hwcore on both sides"
        raise ArgumentValueError(describe(where, "size_bytes", wire.size_bytes, expected, fix))
    return manifest, wire.checksum
