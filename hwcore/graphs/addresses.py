"""Notices when memory that graphs address, weights and pools, is no longer where it was."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from hwcore.errors import ArgumentTypeError, StaleGraphError, describe

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Addresses"]

_data_ptr = torch.Tensor.data_ptr


class Addresses:
    """The addresses of tensors, and who holds the tensors, as they were when this was made.

    A tensor has moved if its own memory is another (``p.data = ...``, ``set_``), or its holder
    holds another tensor: a module as parameter, buffer or child, a list or dict in one of its
    places, the mapping itself included.
    Writing in place moves nothing, nor does adding to a holder. A tensor that is given by itself
    has no holder, so that nobody sees its owner turn to another one: give the list, the dict or
    the module.

    Parameters
    ----------
    static : Mapping of str to Tensor, Module, or nested list, tuple or dict of those
        None, numbers and text in them are passed over.

    Raises
    ------
    ArgumentTypeError
        If anything else is in it.
    """

    def __init__(self, static: Mapping[str, Any]) -> None:
        if not isinstance(static, Mapping):
            fix = "Pass {'weights': module, 'kv': [tensors]}"
            raise ArgumentTypeError(
                describe("GraphRunner", "`static`", static, "a mapping from names", fix)
            )
        self._tensors: list[torch.Tensor] = []
        self._tensor_names: list[str] = []
        self._holders: list[tuple[list[str], list[Any], Any]] = []
        seen: set[int] = set()
        self._hold("", static, seen)
        self._pointers = [*map(_data_ptr, self._tensors)]
        self._flatten()

    def moved(self) -> str | None:
        """Return the name of a tensor that has moved, or None. About 0.1 µs a tensor."""
        now = itertools.chain.from_iterable(self._views)
        if (
            all(map(operator.is_, now, self._held))
            and [*map(_data_ptr, self._tensors)] == self._pointers
            and sum(map(len, self._views)) == len(self._held)
        ):
            return None
        name = next(self._which(), None)
        if name is None:  # a number changed, or something was added that no graph knows of
            for _, held, view in self._holders:
                held[:] = view
            self._flatten()
        return name

    def check(self, where: str, fix: str) -> None:
        """Raise if a tensor has moved.

        Raises
        ------
        StaleGraphError
            Naming the tensor.
        """
        name = self.moved()
        if name is not None:
            message = (
                f"{where}: static tensor `{name}` got other memory than at capture; expected it to "
                f"stay where it was, for the graphs hold its address. {fix}."
            )
            raise StaleGraphError(message)

    def _flatten(self) -> None:
        """Chain all holders, for the check of every replay."""
        self._views = [view for _, _, view in self._holders]
        self._held = [value for _, held, _ in self._holders for value in held]

    def _which(self) -> Iterator[str]:
        gone = object()
        for names, held, view in self._holders:
            now = itertools.chain(view, itertools.repeat(gone))
            for name, was, value in zip(names, held, now, strict=False):
                if was is not value and not _is_plain(was):
                    yield name
        for name, tensor, was in zip(
            self._tensor_names, self._tensors, self._pointers, strict=True
        ):
            if tensor.data_ptr() != was:
                yield name

    def _note(self, name: str, value: Any, seen: set[int]) -> None:
        if _is_plain(value) or id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            self._tensors.append(value)
            self._tensor_names.append(name)
        elif isinstance(value, torch.nn.Module):
            for part in (value._parameters, value._buffers, value._modules):
                self._hold(name, part, seen)
        elif isinstance(value, (Mapping, Sequence)):
            self._hold(name, value, seen)
        else:
            expected = "a tensor, a module, or a list, tuple or dict of those"
            raise ArgumentTypeError(
                describe("GraphRunner", f"static `{name}`", value, expected, "Leave it out")
            )

    def _hold(self, name: str, holder: Mapping[Any, Any] | Sequence[Any], seen: set[int]) -> None:
        """Note what a holder holds, and go into it."""
        if isinstance(holder, Mapping):
            items: list[tuple[Any, Any]] = list(holder.items())
            view: Any = holder.values()
        else:
            items, view = list(enumerate(holder)), holder
        if items:
            names = [f"{name}.{key}".removeprefix(".") for key, _ in items]
            self._holders.append((names, [value for _, value in items], view))
        for key, value in items:
            self._note(f"{name}.{key}".removeprefix("."), value, seen)


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))
