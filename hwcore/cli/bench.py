"""``hwcore bench``: run the benchmarks, each a ratio against a peer or a limit of the same run."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import pathlib
import sys
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hwcore.cli.measurement import NotMeasuredError

if TYPE_CHECKING:
    from hwcore.cli.measurement import Row

__all__ = ["bench", "load"]


def folder() -> pathlib.Path:
    """Return the benchmarks' folder: in the wheel, or beside the package in a checkout."""
    package = pathlib.Path(__file__).parent.parent
    shipped = package / "_benchmarks"
    return shipped if shipped.is_dir() else package.parent / "benchmarks"


def _subjects() -> list[str]:
    return sorted(file.stem for file in folder().glob("[a-z]*.py"))


@click.command()
@click.argument("subjects", nargs=-1, metavar="[SUBJECT]...")
@click.option("--quick", is_flag=True, help="Fewer rounds: to see that it runs, not to quote.")
@click.option(
    "--json",
    "json_file",
    type=click.Path(dir_okay=False, writable=True, path_type=pathlib.Path),
    help="Write the rows of each subject as JSON.",
)
def bench(subjects: tuple[str, ...], quick: bool, json_file: pathlib.Path | None) -> None:
    """Run the benchmarks of SUBJECTs, or all of them.

    Those named device_* measure the selected backend's device; where it is no accelerator they say
    so, and count neither as reached nor as missed.

    Exit status: 0 no target was missed; 1 one was.
    """
    known = _subjects()
    for subject in subjects:
        if subject not in known:
            message = f"`SUBJECT` got {subject!r}; expected one of {', '.join(known) or 'none'}."
            raise click.BadParameter(message)
    console = Console(highlight=False)
    found = {subject: _run(subject, quick, console) for subject in subjects or known}
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=1, default=_plain))
    missed = any(row.missed for rows in found.values() if not isinstance(rows, str) for row in rows)
    raise SystemExit(1 if missed else 0)


def _run(subject: str, quick: bool, console: Console) -> list[Row] | str:
    """Run a subject and print its table; return its rows, or why there are none."""
    module = load(subject)
    console.print(f"[bold]{subject}[/]: {(module.__doc__ or '').strip().splitlines()[0]}")
    rows: list[Row]
    try:
        if getattr(module, "ON_DEVICE", False):
            from hwcore.cli import device_clock  # with torch, which other subjects may do without

            hw = device_clock.accelerator()
            console.print(f"on `{hw.info.name}`")
            rows = module.run(quick=quick)
            if device_clock.simulated(hw):
                rows = [row.as_simulated() for row in rows]
        else:
            rows = module.run(quick=quick)
    except NotMeasuredError as error:
        console.print(f"[yellow]not measured[/]: {escape(str(error))}")
        return str(error)
    table = Table("subject", "figure", "target", "medians")
    for row in rows:
        style = "yellow" if row.not_measured else "green" if row.reached else "bold red"
        table.add_row(
            row.what,
            f"[{style}]{row.figure}[/]",
            row.wanted,
            escape(row.not_measured or row.detail),
        )
    console.print(table)
    return rows


def _plain(row: Row) -> dict[str, Any]:
    """Return a row for JSON, which has no number that is none."""
    fields = dataclasses.asdict(row)
    return fields | {"value": None if math.isnan(row.value) else row.value}


def load(subject: str) -> Any:
    """Import a benchmark by its path: in the wheel its folder has another name."""
    spec = importlib.util.spec_from_file_location(
        f"hwcore_benchmark_{subject}", folder() / f"{subject}.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module
