"""The enums that a message may name."""

from __future__ import annotations

import enum
from typing import TypeVar

from hwcore.errors import ArgumentTypeError, ArgumentValueError, describe

__all__ = ["EnumRegistry"]

_E = TypeVar("_E", bound=type[enum.Enum])


class EnumRegistry:
    """The enums that a tree may hold, by the names that both sides call them.

    Examples
    --------
    >>> enums = EnumRegistry()
    >>> @enums.register
    ... class Mode(enum.Enum):
    ...     FAST = 1
    """

    def __init__(self) -> None:
        self._by_name: dict[str, type[enum.Enum]] = {}
        self._names: dict[type[enum.Enum], str] = {}

    def register(self, kind: _E, name: str | None = None) -> _E:
        """Admit an enum, by its class's name or another; return it, as a decorator does.

        Raises
        ------
        ArgumentTypeError, ArgumentValueError
            If it is no enum, or it or its name is registered already.
        """
        where = "EnumRegistry.register"
        if not (isinstance(kind, type) and issubclass(kind, enum.Enum)):
            fix = "Pass the class, not a member"
            raise ArgumentTypeError(describe(where, "`kind`", kind, "an Enum class", fix))
        name = kind.__name__ if name is None else name
        if not isinstance(name, str):
            raise ArgumentTypeError(describe(where, "`name`", name, "a str", "Pass one, or none"))
        if name in self._by_name or kind in self._names:
            expected, fix = "one that is not registered", "Register once, with another `name`"
            raise ArgumentValueError(describe(where, "`kind`", (name, kind), expected, fix))
        self._by_name[name], self._names[kind] = kind, name
        return kind

    def name_of(self, kind: type[enum.Enum]) -> str | None:
        """Return the name of a registered enum, else None."""
        return self._names.get(kind)

    def member(self, name: object, member: object) -> enum.Enum | None:
        """Return a member by names from anywhere, None where there is none."""
        if not isinstance(name, str) or not isinstance(member, str) or name not in self._by_name:
            return None
        return self._by_name[name].__members__.get(member)
