"""Nested containers as an explicit structure and a flat list of tensors; and back.

msgpack alone would turn tuples into lists, and knows neither enums nor numpy's scalars nor ints
of more than 64 bits. So every value is written as what it is:

==========================  ======================================
value                       node
==========================  ======================================
None, bool, float, str,     itself
bytes, int of 64 bits
list, tuple                 ``["l", node…]``, ``["t", node…]``
dict                        ``["d", key, node, key, node…]``
int of more bits            ``["i", bytes]``, two's complement
complex                     ``["c", real, imaginary]``
enum                        ``["e", name of the class, name]``
numpy scalar                ``["n", dtype, bytes]``
tensor                      ``["x", 1]``, the next one
tensors in a list or tuple  ``["x", count]``, the next ones
==========================  ======================================

Nothing is ever looked up by a name that came from a peer, but in the tables of this module and
among the enums that the caller registered. There is no pickle.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hwcore.diffusion.enums import EnumRegistry
from hwcore.errors import ArgumentTypeError, ArgumentValueError, describe, shown

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["MAX_DEPTH", "MAX_NODES", "flatten", "unflatten"]

MAX_DEPTH = 64
MAX_NODES = 1_000_000

_ITSELF = (type(None), bool, float, bytes)
_KEYS = (str, int, bool, type(None), bytes)
# Of one meaning on every machine: neither the extended floats nor text nor dates.
_SCALAR_NAMES = """
    bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64
    complex64 complex128
"""
_SCALARS = {
    dtype.str: dtype for dtype in (np.dtype(n).newbyteorder("<") for n in _SCALAR_NAMES.split())
}


def flatten(
    tree: object, enums: EnumRegistry | None = None, where: str = "flatten"
) -> tuple[Any, list[torch.Tensor]]:
    """Return a tree's structure, as msgpack can hold it, and its tensors in order.

    Parameters
    ----------
    tree : None, bool, int, float, complex, str, bytes, enum, numpy scalar, Tensor, list, tuple, \
dict
        Containers of any of these, to a depth of ``MAX_DEPTH`` and up to ``MAX_NODES`` values.
        Keys are str, int, bool, None, bytes or enums.
    enums : EnumRegistry, optional
        The enums that are admitted; none by default.
    where : str
        Who speaks in errors.

    Raises
    ------
    ArgumentTypeError
        If it holds anything else. A named tuple and other subclasses are not taken for their
        base, for the other side would get something else than was sent.
    ArgumentValueError
        If it is too deep (or contains itself), or too large.
    """
    writer = _Writer(where, enums or EnumRegistry())
    return writer.node(tree, ()), writer.tensors


def unflatten(
    structure: object,
    tensors: Sequence[torch.Tensor],
    enums: EnumRegistry | None = None,
    where: str = "unflatten",
) -> Any:
    """Return the tree of a structure that may come from anywhere.

    Parameters
    ----------
    structure : object
        As msgpack decodes it.
    tensors : sequence of Tensor
    enums : EnumRegistry, optional
        The enums that are admitted.

    Raises
    ------
    ArgumentValueError
        If it is not what ``flatten`` writes, or names an enum or a tensor that is not there.
    """
    return _Reader(where, tensors, enums or EnumRegistry()).tree(structure)


class _Writer:
    def __init__(self, where: str, enums: EnumRegistry) -> None:
        self._where, self._enums = where, enums
        self._nodes = 0
        self.tensors: list[torch.Tensor] = []

    def node(self, value: Any, path: tuple[object, ...]) -> Any:
        self._count(path)
        kind = type(value)
        if isinstance(value, torch.Tensor):  # a subclass as well: the layout refuses it by name
            self.tensors.append(value)
            return ["x", 1]
        if kind in _ITSELF:
            return value
        if kind is str:
            return self._text(value, path)
        if kind is int:
            return value if -(2**63) <= value < 2**64 else ["i", _bytes_of(value)]
        if kind is list or kind is tuple:
            return self._sequence("l" if kind is list else "t", value, path)
        if kind is dict:
            return self._dict(value, path)
        if kind is complex:
            return ["c", value.real, value.imag]
        if isinstance(value, enum.Enum):
            return self._enum(value, path)
        if isinstance(value, np.generic) and value.dtype.newbyteorder("<").str in _SCALARS:
            little = value.dtype.newbyteorder("<")
            return ["n", little.str, np.asarray(value).astype(little, copy=False).tobytes()]
        raise self._unknown(value, path)

    def _sequence(self, tag: str, value: Any, path: tuple[object, ...]) -> list[Any]:
        node: list[Any] = [tag]
        for number, item in enumerate(value):
            part = self.node(item, (*path, number))
            before = node[-1]
            if _is_tensors(part) and _is_tensors(before):
                before[1] += 1
            else:
                node.append(part)
        return node

    def _dict(self, value: dict[Any, Any], path: tuple[object, ...]) -> list[Any]:
        node: list[Any] = ["d"]
        for key, item in value.items():
            if type(key) not in _KEYS and not isinstance(key, enum.Enum):
                expected = "keys of str, int, bool, None, bytes or an enum"
                fix = "Convert the keys"
                message = describe(self._where, f"a key in {_at(path)}", key, expected, fix)
                raise ArgumentTypeError(message)
            node += (self.node(key, (*path, key)), self.node(item, (*path, key)))
        return node

    def _enum(self, value: enum.Enum, path: tuple[object, ...]) -> list[Any]:
        name = self._enums.name_of(type(value))
        if name is None:
            fix = f"Register {type(value).__name__} in the EnumRegistry, on both sides"
            message = describe(self._where, _at(path), value, "a registered enum", fix)
            raise ArgumentTypeError(message)
        if value.name not in type(value).__members__:
            fix = "Pass its value, or a list of the flags"
            message = describe(self._where, _at(path), value, "a member with a name", fix)
            raise ArgumentTypeError(message)
        return ["e", name, value.name]

    def _text(self, value: str, path: tuple[object, ...]) -> str:
        try:
            value.encode()
        except UnicodeEncodeError as error:
            fix = "Pass it as bytes, encoded with errors='surrogatepass'"
            message = describe(self._where, _at(path), value, "text that UTF-8 can hold", fix)
            raise ArgumentValueError(message) from error
        return value

    def _count(self, path: tuple[object, ...]) -> None:
        self._nodes += 1
        if len(path) > MAX_DEPTH:
            expected = f"at most {MAX_DEPTH} containers in one another"
            fix = "Flatten it; see whether a container holds itself"
            message = describe(self._where, "depth", len(path), expected, fix)
            raise ArgumentValueError(message)
        if self._nodes > MAX_NODES:
            expected, fix = f"at most {MAX_NODES} values", "Put numbers into a tensor"
            raise ArgumentValueError(describe(self._where, "tree", self._nodes, expected, fix))

    def _unknown(self, value: object, path: tuple[object, ...]) -> ArgumentTypeError:
        for base in (dict, list, tuple, str, bytes, int, float, complex):
            if isinstance(value, base) and not isinstance(value, np.generic):
                fix = f"Convert it with {base.__name__}(), and back on the other side"
                expected = f"a {base.__name__} itself, for the other side would get one"
                return ArgumentTypeError(describe(self._where, _at(path), value, expected, fix))
        expected = "a tensor, a number, text, bytes, None, an enum, or a list, tuple or dict"
        fix = "Convert it; an array with torch.from_numpy()"
        return ArgumentTypeError(describe(self._where, _at(path), value, expected, fix))


class _Reader:
    def __init__(self, where: str, tensors: Sequence[torch.Tensor], enums: EnumRegistry) -> None:
        self._where, self._tensors, self._enums = where, tensors, enums
        self._nodes = self._taken = 0

    def tree(self, node: Any) -> Any:
        made = self.value(node, 0)
        if self._taken != len(self._tensors):
            expected = f"{len(self._tensors)}, the tensors that there are"
            raise self._bad(self._taken, expected)
        return made

    def value(self, node: Any, depth: int) -> Any:
        self._nodes += 1
        if depth > MAX_DEPTH or self._nodes > MAX_NODES:
            limits = f"a depth of at most {MAX_DEPTH}, and {MAX_NODES} values"
            raise self._bad({"depth": depth, "values": self._nodes}, limits)
        kind = type(node)
        if kind is str or kind is int or kind in _ITSELF:
            return node
        if kind is not list or not node or type(node[0]) is not str:
            raise self._bad(node, "a list that begins with a tag")
        tag, parts = node[0], node[1:]
        if tag == "l":
            return self._sequence(parts, depth)
        if tag == "t":
            return tuple(self._sequence(parts, depth))
        if tag == "d":
            return self._dict(parts, depth)
        return self._leaf(tag, parts)

    def _sequence(self, parts: list[Any], depth: int) -> list[Any]:
        made: list[Any] = []
        for part in parts:
            if _is_tensors(part):
                made += self._next_tensors(part)
            else:
                made.append(self.value(part, depth + 1))
        return made

    def _next_tensors(self, node: list[Any]) -> Sequence[torch.Tensor]:
        count = node[1] if len(node) == 2 and type(node[1]) is int else 0
        start, end = self._taken, self._taken + count
        if not start < end <= len(self._tensors):
            raise self._bad(node, f"in [1, {len(self._tensors) - start}], the tensors left")
        self._taken = end
        return self._tensors[start:end]

    def _dict(self, parts: list[Any], depth: int) -> dict[Any, Any]:
        if len(parts) % 2:
            raise self._bad(parts, "keys and values in turn")
        made = {}
        for number in range(0, len(parts), 2):
            key = self.value(parts[number], depth + 1)
            if type(key) not in _KEYS and not isinstance(key, enum.Enum):
                raise self._bad(key, "a key of str, int, bool, None, bytes or an enum")
            if key in made:
                raise self._bad(key, "each key once")
            made[key] = self.value(parts[number + 1], depth + 1)
        return made

    def _leaf(self, tag: str, parts: list[Any]) -> Any:
        match tag, parts:
            case "x", [1]:
                return self._next_tensors(["x", 1])[0]
            case "i", [bytes(digits)] if len(digits) > 8:
                return int.from_bytes(digits, "little", signed=True)
            case "c", [float(real), float(imaginary)]:
                return complex(real, imaginary)
            case "n", [str(name), bytes(data)] if name in _SCALARS:
                if len(data) == _SCALARS[name].itemsize:
                    return np.frombuffer(data, _SCALARS[name])[0]
            case "e", [name, member] if (found := self._enums.member(name, member)) is not None:
                return found
        raise self._bad([tag, *parts], "a node, of an enum that is registered here")

    def _bad(self, got: object, expected: str) -> ArgumentValueError:
        fix = "Send what `flatten` writes, and register the same enums on both sides"
        return ArgumentValueError(describe(self._where, "structure", got, expected, fix))


def _is_tensors(node: Any) -> bool:
    return type(node) is list and node[:1] == ["x"]


def _bytes_of(value: int) -> bytes:
    return value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)


def _at(path: tuple[object, ...]) -> str:
    return "tree" + "".join(f"[{shown(key, 40).rpartition(' (')[0]}]" for key in path)
