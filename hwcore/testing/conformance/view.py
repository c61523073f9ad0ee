"""A report for people, and for tools that read JUnit's form."""

from __future__ import annotations

from typing import TYPE_CHECKING
from xml.etree import ElementTree

from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

if TYPE_CHECKING:
    from rich.console import Console

    from hwcore.testing.conformance.report import Report

__all__ = ["junit", "print_report"]

MEANINGS = ("conforms", "does not conform", "could not run")
_STYLES = ("green", "bold red", "bold red")


def print_report(report: Report, console: Console) -> None:
    """Print the table of groups, then failures by hook, features skipped and quirks."""
    backend = report.backend
    if backend.distribution:
        console.print(
            f"[bold]{escape(backend.name)}[/]  {escape(backend.vendor)}, "
            f"{escape(backend.distribution)} {escape(backend.version)}, "
            f"contract {backend.api_version}, torch {report.torch}"
        )
    if report.groups:
        console.print(_table(report))
    for failure in report.failures:
        console.print(f"\n[bold red]{escape(failure.hook)}[/]")
        for test, message in zip(failure.tests, failure.messages, strict=True):
            console.print(_indented(f"[dim]{escape(test)}[/]"))
            console.print(_indented(escape(message)))
    if report.features_skipped:
        console.print("\n[bold]Skipped, for the backend does not claim it[/]")
        for feature in report.features_skipped:
            console.print(f"  {escape(feature.name)}: {len(feature.tests)}")
    if report.quirks:
        console.print("\n[bold]Quirks, and the tests that they adapted[/]")
        for quirk in report.quirks:
            console.print(f"  {escape(quirk.name)}: {len(quirk.tests)}")
            for test in quirk.tests:
                console.print(_indented(f"[dim]{escape(test)}[/]", 4))
    if report.error:
        console.print(f"\n[bold red]{escape(report.error)}[/]")
    code = report.exit_code
    took = f", {report.duration_s:.1f} s" if report.tests else ""
    console.print(f"\n[{_STYLES[code]}]{MEANINGS[code]}[/] (exit status {code}{took})")


def _indented(text: str, columns: int = 2) -> Padding:
    return Padding(text, (0, 0, 0, columns))


def _table(report: Report) -> Table:
    table = Table("group", title="Conformance", title_justify="left", title_style="bold")
    for column in ("passed", "failed", "skipped", "adapted"):
        table.add_column(column, justify="right")
    for group in report.groups:
        failed = f"[bold red]{group.failed}[/]" if group.failed else "0"
        counts = (str(group.passed), failed, str(group.skipped), str(group.adapted))
        table.add_row(escape(group.name), *counts)
    table.add_section()
    counted = ("passed", "failed", "skipped", "adapted")
    totals = [sum(getattr(group, name) for group in report.groups) for name in counted]
    table.add_row("all", *map(str, totals))
    return table


def junit(report: Report) -> bytes:
    """Return a report as JUnit XML: a suite for the backend, a class for each group."""
    failed = sum(test.outcome == "failed" for test in report.tests)
    suite = ElementTree.Element(
        "testsuite",
        name=f"hwcore.conformance.{report.backend.name}",
        tests=str(len(report.tests)),
        failures=str(failed),
        errors=str(int(report.exit_code == 2)),
        skipped=str(sum(test.outcome == "skipped" for test in report.tests)),
        time=f"{report.duration_s:.3f}",
    )
    for test in report.tests:
        case = ElementTree.SubElement(
            suite,
            "testcase",
            classname=f"hwcore.conformance.{report.backend.name}.{test.group}",
            name=test.name,
            time=f"{test.duration_s:.3f}",
        )
        if test.outcome != "passed":
            kind = "failure" if test.outcome == "failed" else "skipped"
            ElementTree.SubElement(case, kind, message=_xml_text(test.message), type=test.hook)
    if report.error:
        case = ElementTree.SubElement(
            suite, "testcase", classname=suite.get("name", ""), name="run"
        )
        ElementTree.SubElement(case, "error", message=_xml_text(report.error), type="run")
    root = ElementTree.Element("testsuites")
    root.append(suite)
    written: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return written


def _xml_text(text: str) -> str:
    """Drop the characters that XML cannot hold: a driver may print anything."""
    return "".join(c for c in text if c >= " " or c in "\t\n\r").encode("utf-8", "replace").decode()
