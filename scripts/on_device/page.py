"""The Markdown pages in docs/results: where a run took place, and what came of it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from scripts.on_device import facts, plans

if TYPE_CHECKING:
    import pathlib
    from collections.abc import Mapping, Sequence

    from hwcore.cli.measurement import Target
    from scripts.on_device.steps import Result

__all__ = ["NOTHING", "page", "rows_of"]

NOTHING = "not measured"

_MAKE = {"tests": "test-gpu", "benchmarks": "bench-gpu"}


def page(
    kind: str,
    backend: str,
    about: Mapping[str, str] | None,
    results: Sequence[Result],
    rows: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Return a page.

    Parameters
    ----------
    kind : {"tests", "benchmarks"}
    backend : str
    about : mapping of str to str, optional
        By :data:`facts.NAMES`; None: nothing was run, and the page says how to.
    results : sequence of Result
        In their order; those that are still to come as not run.
    rows : sequence of mapping
        Of benchmarks: what :func:`rows_of` returned.
    """
    command = f"make {_MAKE[kind]} GPU={backend}"
    nothing = f"**Nothing was measured yet.** On a machine with the device, `{command}` fills it."
    lines = [
        f"# {kind.capitalize()} on `{backend}`",
        "",
        f"Written by `{command}`; do not edit. [README.md](README.md) says how to read it.",
        "",
        *([] if about else [nothing, ""]),
        *_table(["", ""], [[name, (about or {}).get(name, NOTHING)] for name in facts.NAMES]),
    ]
    if kind == "benchmarks":
        lines += _targets(plans.targets(), rows)
    heads = ["step", "outcome", "counts", "s", "command"]
    lines += ["## Steps", "", *_table(heads, _steps(results))]
    if rows:
        lines += ["## Medians", "", *_medians(rows)]
    return "\n".join(lines).rstrip() + "\n"


def rows_of(file: pathlib.Path) -> list[dict[str, Any]]:
    """Return the rows in what ``hwcore bench --json`` wrote; none where it wrote nothing."""
    if not file.is_file():
        return []
    return [
        {"subject": subject, **row}
        for subject, rows in json.loads(file.read_bytes()).items()
        if not isinstance(rows, str)
        for row in rows
    ]


def _steps(results: Sequence[Result]) -> list[list[str]]:
    return [
        [
            result.step.name,
            result.outcome if result.outcome == result.step.done else f"**{result.outcome}**",
            _cell(result.counts),
            "" if result.seconds is None else f"{result.seconds:.0f}",
            f"`{_cell(result.step.words())}`",
        ]
        for result in results
    ]


def _targets(wanted: Sequence[Target], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the figures, the targets' own in their order, then those of other subjects."""
    found = {row["what"]: row for row in rows}
    own = [target.not_measured("") for target in wanted]
    table = [[row.what, row.wanted, *_figure(found.pop(row.what, None))] for row in own]
    for row in found.values():
        sign = "≤" if row["at_most"] else "≥"
        aim = "none" if row["target"] is None else f"{sign} {row['target']:g} {row['unit']}"
        table.append([f"{row['subject']}: {_cell(row['what'])}", aim, *_figure(row)])
    return ["## Targets", "", *_table(["subject", "target", "figure", "reached"], table)]


def _figure(row: Mapping[str, Any] | None) -> list[str]:
    if row is None or row["not_measured"]:
        return [NOTHING, ""]
    target, value = row["target"], row["value"]
    reached = ""
    if target is not None:
        reached = "yes" if (value <= target if row["at_most"] else value >= target) else "**no**"
    return [f"{value:.3g} {row['unit']}", reached]


def _medians(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [f"- {row['what']}: {row['not_measured'] or row['detail']}" for row in rows]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [heads, ["---"] * len(heads), *rows]
    return [*(f"| {' | '.join(line)} |" for line in lines), ""]


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
