"""``hwcore bench``: run the benchmarks, each a ratio against a peer or a limit of the same run."""

from __future__ import annotations

import importlib.util
import pathlib
import sys
from typing import Any

import click
from rich.console import Console
from rich.table import Table

__all__ = ["bench"]


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
def bench(subjects: tuple[str, ...], quick: bool) -> None:
    """Run the benchmarks of SUBJECTs, or all of them.

    Exit status: 0 every target was reached; 1 one was missed.
    """
    known = _subjects()
    for subject in subjects:
        if subject not in known:
            message = f"`SUBJECT` got {subject!r}; expected one of {', '.join(known) or 'none'}."
            raise click.BadParameter(message)
    console = Console(highlight=False)
    missed = 0
    for subject in subjects or known:
        module = _load(subject)
        console.print(f"[bold]{subject}[/]: {(module.__doc__ or '').strip().splitlines()[0]}")
        rows = module.run(quick=quick)
        table = Table("subject", "figure", "target", "medians")
        for row in rows:
            sign = "≤" if row.at_most else "≥"
            style = "green" if row.reached else "bold red"
            table.add_row(
                row.what,
                f"[{style}]{row.value:.3g} {row.unit}[/]",
                "none" if row.target is None else f"{sign} {row.target:g} {row.unit}",
                row.detail,
            )
        console.print(table)
        missed += sum(not row.reached for row in rows)
    raise SystemExit(1 if missed else 0)


def _load(subject: str) -> Any:
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
