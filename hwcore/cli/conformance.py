"""``hwcore conformance``: whether a backend does what the contract says."""

from __future__ import annotations

import math
import pathlib
import sys

import click
import msgspec
from rich.console import Console

from hwcore.errors import HwcoreError

__all__ = ["conformance"]

_FILE = click.Path(dir_okay=False, writable=True, allow_dash=True, path_type=pathlib.Path)


def _finite(context: click.Context, parameter: click.Parameter, value: float) -> float:
    if not math.isfinite(value):
        message = f"{value} is no limit. Give a number of seconds."
        raise click.BadParameter(message)
    return value


@click.command()
@click.option("--backend", metavar="NAME", required=True, help="The installed backend to test.")
@click.option("--json", "json_file", type=_FILE, help="Write the report as JSON; - for stdout.")
@click.option(
    "--junit", "junit_file", type=_FILE, help="Write the results as JUnit XML; - for stdout."
)
@click.option("-k", "keyword", default="", metavar="EXPR", help="Tests, groups or hooks to run.")
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0.1),
    default=30.0,
    show_default=True,
    callback=_finite,
    metavar="S",
    help="Limit for each test, in seconds.",
)
@click.option("--raw", metavar="MODULE:OBJECT", help="Raw access to the device, for the checks.")
def conformance(
    backend: str,
    json_file: pathlib.Path | None,
    junit_file: pathlib.Path | None,
    keyword: str,
    timeout_s: float,
    raw: str | None,
) -> None:
    """Run the conformance tests on a backend and say which hooks do not conform.

    Exit status: 0 it conforms; 1 it does not; 2 the tests could not run, or the report could not
    be written.
    """
    # Imported here: `hwcore doctor` does without.
    from hwcore.testing.conformance import report, view
    from hwcore.testing.conformance.errors import require_pytest
    from hwcore.testing.conformance.runner import run_in_children

    if str(json_file) == str(junit_file) == "-":
        message = "--json and --junit cannot both be standard output. Name a file for one of them."
        raise click.UsageError(message)
    for file in (json_file, junit_file):
        if file is not None and str(file) != "-" and not file.parent.is_dir():
            message = f"`{file}`: its folder does not exist. Create {file.parent} first."
            raise click.BadParameter(message)
    console = Console(stderr="-" in (str(json_file), str(junit_file)), highlight=False)
    try:
        require_pytest()
        with console.status(f"Testing {backend}") as status:
            found = run_in_children(
                backend,
                raw=raw,
                keyword=keyword,
                timeout_s=timeout_s,
                on_result=lambda result: status.update(f"Testing {backend}: {result.id}"),
            )
    except HwcoreError as error:
        found = report.refusal(backend, str(error))
    view.print_report(found, console)
    written = True
    if json_file is not None:
        text = msgspec.json.format(msgspec.json.encode(found), indent=2) + b"\n"
        written &= _write(json_file, text)
    if junit_file is not None:
        written &= _write(junit_file, view.junit(found) + b"\n")
    sys.exit(found.exit_code if written else 2)


def _write(file: pathlib.Path, content: bytes) -> bool:
    """Write a report; if that cannot be done say so, for the run was long and its table is out."""
    try:
        with click.open_file(str(file), "wb") as stream:
            stream.write(content)
    except OSError as error:
        reason = error.strerror or error
        click.echo(f"hwcore: `{file}`: {reason}. Write the report elsewhere.", err=True)
        return False
    return True
