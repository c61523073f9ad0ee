"""What ``hwcore.compile`` adds to a function that the backend's policy leaves alone."""

from __future__ import annotations

import hwcore
from hwcore.cli.measurement import Row, nanoseconds, statements


def plain(x: int, y: int = 2) -> int:
    """Do next to nothing, so that the call is what is measured."""
    return x + y


def run(quick: bool = False) -> list[Row]:
    """Return the rows of this subject."""
    rounds, calls = (5, 5_000) if quick else (51, 50_000)
    compiled = hwcore.compile(plain, backend=hwcore.load_backend("cpu"))
    assert compiled(1) == plain(1)
    names = {"plain": plain, "compiled": compiled}
    rows = []
    for what, arguments in (("positional arguments", "1, 3"), ("a keyword argument", "1, y=3")):
        medians = statements(
            {"compiled": f"compiled({arguments})", "plain": f"plain({arguments})"},
            names,
            rounds,
            calls,
        )
        added = (medians["compiled"] - medians["plain"]) * 1e6
        title = f"disabled function over the plain one, {what}"
        rows.append(Row(title, added, "µs", 0.2, True, nanoseconds(medians)))
    return rows
