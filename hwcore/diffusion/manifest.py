"""What a message holds: the structure of its tree, and the layout of its tensors."""

from __future__ import annotations

import functools
import itertools
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from hwcore._checks import check_instance
from hwcore.diffusion.gathering import Gathering
from hwcore.diffusion.layout import (
    Layout,
    check_layout,
    check_total,
    layout_by,
    layout_of,
    numbered,
    places_of,
)
from hwcore.diffusion.specs import MAX_TENSORS, TensorSpec, check_spec
from hwcore.diffusion.tree import flatten
from hwcore.errors import ArgumentTypeError, ArgumentValueError, describe

if TYPE_CHECKING:
    import torch

    from hwcore.diffusion.enums import EnumRegistry

__all__ = [
    "MAX_ENCODED_BYTES",
    "Described",
    "Manifest",
    "check_manifest",
    "decode_manifest",
    "describe_tree",
    "encode_manifest",
    "manifest_of",
]

VERSION = 1
_ALIKE_TENSORS, _ALIKE_BYTES = 1024, 4096

MAX_ENCODED_BYTES = 16 << 20
"""Bytes of an encoded manifest: what a peer may make this side decode."""


class Manifest(msgspec.Struct, frozen=True):
    """A tree without the bytes of its tensors.

    Attributes
    ----------
    structure : object
        See :mod:`hwcore.diffusion.tree`.
    layout : Layout
    """

    structure: Any
    layout: Layout

    @property
    def size_bytes(self) -> int:
        """Bytes that the tensors take."""
        return self.layout.size_bytes


class _Wire(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A manifest on the wire: no offset, and what repeats is said once.

    ``specs`` are (count, spec) of tensors that have a place of their own, ``which`` (start, count)
    of places in the order of the tensors. A thousand tensors of one shape take some 30 bytes.
    """

    version: int
    structure: Any
    specs: tuple[tuple[int, TensorSpec], ...]
    which: tuple[tuple[int, int], ...]


_decoder = msgspec.msgpack.Decoder(_Wire)
_encoder = msgspec.msgpack.Encoder()


def manifest_of(
    tree: object, enums: EnumRegistry | None = None, where: str = "manifest_of"
) -> tuple[Manifest, list[torch.Tensor]]:
    """Return a tree's manifest, and its tensors in the order of the layout's entries.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        If the tree, or a tensor in it, cannot be sent; see ``flatten`` and ``layout_of``.
    """
    structure, tensors = flatten(tree, enums, where)
    return Manifest(structure, layout_of(tensors, where)), tensors


class Described(NamedTuple):
    """A tree that is about to be sent.

    Attributes
    ----------
    manifest : Manifest
    encoded : bytes
        The manifest, for the other side.
    tensors : list of Tensor
        In the order of the layout's entries.
    gathering : Gathering or None
        How they are copied where all are the host's, as they will be on the other side.
    """

    manifest: Manifest
    encoded: bytes
    tensors: list[torch.Tensor]
    gathering: Gathering | None


def describe_tree(tree: object, enums: EnumRegistry | None, where: str) -> Described:
    """Return what is to be known of a tree that is sent; it is checked as by :func:`manifest_of`.

    What depends on structure and shapes alone is made once for all trees that are alike: to place
    and to encode some tensors takes longer than to send them.
    """
    structure, tensors = flatten(tree, enums, where)
    specs, which, are_plain = places_of(tensors, where)
    packed = _encoder.encode(structure)
    if len(which) > _ALIKE_TENSORS or len(packed) > _ALIKE_BYTES:
        manifest = Manifest(structure, layout_by(specs, which))
        return Described(manifest, encode_manifest(manifest, where), tensors, None)
    layout, encoded, gathering = _alike(packed, specs, which)
    return Described(
        Manifest(structure, layout), encoded, tensors, gathering if are_plain else None
    )


@functools.lru_cache(256)
def _alike(
    packed: bytes, specs: tuple[TensorSpec, ...], which: tuple[int, ...]
) -> tuple[Layout, bytes, Gathering]:
    manifest = Manifest(msgspec.msgpack.decode(packed), layout_by(specs, which))
    return manifest.layout, encode_manifest(manifest), Gathering(manifest.layout)


def encode_manifest(manifest: Manifest, where: str = "encode_manifest") -> bytes:
    """Return a manifest as bytes.

    Raises
    ------
    ArgumentValueError
        If they are more than ``MAX_ENCODED_BYTES``: the other side would refuse them.
    """
    data = msgspec.msgpack.encode(_wire(manifest))
    if len(data) > MAX_ENCODED_BYTES:
        expected = f"at most {MAX_ENCODED_BYTES} bytes beside the tensors"
        fix = "Put large text, bytes and lists of numbers into tensors"
        raise ArgumentValueError(describe(where, "tree", len(data), expected, fix))
    return data


def decode_manifest(
    data: bytes | bytearray | memoryview, limit_bytes: int, where: str = "decode_manifest"
) -> Manifest:
    """Return the manifest that bytes from anywhere hold, with its layout checked.

    Parameters
    ----------
    data : bytes-like
    limit_bytes : int
        Bytes that its tensors may take.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        If they are no bytes, too many, no manifest, of another version, or describe tensors that
        cannot be.
    """
    try:
        size = memoryview(data).nbytes
    except TypeError as error:
        fix = "Pass what encode_manifest() returned"
        raise ArgumentTypeError(describe(where, "manifest", data, "bytes", fix)) from error
    if size > MAX_ENCODED_BYTES:
        raise _bad(where, "bytes of the manifest", size, f"at most {MAX_ENCODED_BYTES}")
    try:
        wire = _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeError, RecursionError, OverflowError) as error:
        raise _bad(where, "manifest", f"{size} bytes: {error}", "an encoded Manifest") from error
    if wire.version != VERSION:
        expected, fix = f"{VERSION}, of this hwcore", "Install the same hwcore on both sides"
        raise ArgumentValueError(describe(where, "version", wire.version, expected, fix))
    layout = layout_by(_specs(where, wire, limit_bytes), _places(where, wire))
    check_total(where, layout, limit_bytes)
    return Manifest(wire.structure, layout)


def check_manifest(manifest: Manifest, limit_bytes: int, where: str) -> None:
    """Raise unless a manifest's layout is sound and of at most ``limit_bytes``."""
    check_instance(where, "manifest", manifest, Manifest, "a write or decode_manifest()")
    check_layout(manifest.layout, limit_bytes, where)


def _wire(manifest: Manifest) -> _Wire:
    which, numbers = numbered(manifest.layout.entries)
    specs = [TensorSpec(entry.dtype, entry.shape, entry.strides) for entry in numbers]
    runs = [(len(list(same)), spec) for spec, same in itertools.groupby(specs)]
    ranges: list[list[int]] = []
    for number in which:
        if ranges and sum(ranges[-1]) == number:
            ranges[-1][1] += 1
        else:
            ranges.append([number, 1])
    return _Wire(VERSION, manifest.structure, tuple(runs), tuple((a, n) for a, n in ranges))


def _specs(where: str, wire: _Wire, limit_bytes: int) -> list[TensorSpec]:
    _check_counts(where, "specs", [count for count, _ in wire.specs])
    for index, (_, spec) in enumerate(wire.specs):
        check_spec(where, index, spec, limit_bytes)
    return [spec for count, spec in wire.specs for _ in range(count)]


def _places(where: str, wire: _Wire) -> list[int]:
    there = sum(count for count, _ in wire.specs)
    _check_counts(where, "which", [count for _, count in wire.which])
    for start, count in wire.which:
        if start < 0 or start + count > there:
            raise _bad(where, "which", (start, count), f"places in [0, {there})")
    return [place for start, count in wire.which for place in range(start, start + count)]


def _check_counts(where: str, what: str, counts: list[int]) -> None:
    if any(count < 1 for count in counts) or sum(counts) > MAX_TENSORS:
        expected = f"counts ≥ 1 of {MAX_TENSORS} at most together"
        raise _bad(where, f"counts of `{what}`", counts, expected)


def _bad(where: str, what: str, got: object, expected: str) -> ArgumentValueError:
    fix = "Send what encode_manifest() returns, unchanged"
    return ArgumentValueError(describe(where, what, got, expected, fix))
