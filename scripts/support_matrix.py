"""Write docs/support.md from conformance reports: ``support_matrix.py REPORT.json... [-o FILE]``.

Each report is what ``hwcore conformance --json`` wrote. Exits 2 where one cannot be read.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from typing import get_args

import msgspec

from hwcore.testing.conformance.report import SCHEMA_VERSION, Report
from hwcore.types import Capability, Quirk

INTRODUCTION = """\
# What each backend supports

Written by `scripts/support_matrix.py` from the reports of `hwcore conformance`; do not edit.
Numbers are tests: passed, of which adapted by a quirk, failed, and skipped because the backend does
not claim the feature. What the groups prove is in [conformance.md](conformance.md).
"""


def matrix(reports: list[Report]) -> str:
    """Return the page: runs, groups, capabilities and quirks, a column for each backend."""
    names = [report.backend.name for report in reports]
    runs = [
        ("conforms", ["no" if report.exit_code else "yes" for report in reports]),
        ("plugin", [f"{r.backend.distribution} {r.backend.version}" for r in reports]),
        ("torch", [report.torch or "" for report in reports]),
        ("contract", [report.backend.api_version for report in reports]),
    ]
    groups = dict.fromkeys(group.name for report in reports for group in report.groups)
    counts = [(name, [_count(report, name) for report in reports]) for name in groups]
    listed = [
        (f"`{name}`", ["yes" if name in r.backend.capabilities else "" for r in reports])
        for name in get_args(Capability)
    ]
    declared = [
        (f"`{name}`", ["yes" if name in r.backend.quirks else "" for r in reports])
        for name in get_args(Quirk)
    ]
    return "\n".join(
        [
            INTRODUCTION,
            *_table("backend", names, runs),
            *_table("group", names, counts),
            *_table("capability", names, listed),
            *_table("quirk", names, declared),
        ]
    )


def _count(report: Report, name: str) -> str:
    group = next((group for group in report.groups if group.name == name), None)
    if group is None or not (group.passed or group.failed or group.skipped):
        return "not run"
    adapted = f" ({group.adapted} adapted)" if group.adapted else ""
    failed = f", **{group.failed} failed**" if group.failed else ""
    skipped = f", {group.skipped} skipped" if group.skipped else ""
    return f"{group.passed} passed{adapted}{failed}{skipped}"


def _table(title: str, names: list[str], rows: list[tuple[str, list[str]]]) -> list[str]:
    head = [f"| {' | '.join([title, *names])} |", f"| {' | '.join(['---'] * (len(names) + 1))} |"]
    return [*head, *(f"| {' | '.join([what, *cells])} |" for what, cells in rows), ""]


def main(arguments: list[str]) -> int:
    """Write the page and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reports", nargs="+", type=pathlib.Path)
    parser.add_argument("-o", "--output", type=pathlib.Path, default="docs/support.md")
    options = parser.parse_args(arguments)
    reports = []
    for file in options.reports:
        try:
            report = msgspec.json.decode(file.read_bytes(), type=Report)
        except (OSError, msgspec.MsgspecError) as error:
            print(f"{file}: {error}. Pass what hwcore conformance --json wrote.", file=sys.stderr)
            return 2
        if report.schema_version != SCHEMA_VERSION:
            print(
                f"{file}: schema_version {report.schema_version}; expected {SCHEMA_VERSION}. "
                f"Run this hwcore's conformance again.",
                file=sys.stderr,
            )
            return 2
        reports.append(report)
    options.output.write_text(matrix(sorted(reports, key=lambda r: r.backend.name)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
