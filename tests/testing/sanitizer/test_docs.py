"""docs/sanitizer.md shows a real report."""

from __future__ import annotations

import pathlib
import re
from typing import get_args

from hwcore.testing.sanitizer.reports import Kind

PAGE = (pathlib.Path(__file__).parents[3] / "docs" / "sanitizer.md").read_text(encoding="utf-8")


def test_the_report_is_what_its_program_gives(site):
    (program,) = (
        block for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "class" in block
    )
    (report,) = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)
    (site.folder / "engine.py").write_text(program)
    done = site.execute("engine.py", HWCORE_SANITIZE="1", HWCORE_BACKEND="cpu")
    _, _, found = done.stderr.partition("hwcore.testing.sanitizer.reports.RaceError: ")
    assert found.replace(f"{site.folder}/", "") == report
    assert site.execute("engine.py", HWCORE_BACKEND="cpu").output == []


def test_every_kind_of_race_is_explained():
    assert [kind for kind in get_args(Kind) if f"`{kind}`" not in PAGE] == []
