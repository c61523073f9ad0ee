"""The page on overlap: its programs run as they stand, without a race, and print what it says."""

import pathlib
import re

import pytest

PAGE = pathlib.Path(__file__).parents[2] / "docs/overlap.md"


@pytest.mark.usefixtures("hw", "in_any_order", "watched")
@pytest.mark.parametrize("debug", ["0", "1"])
def test_the_programs_print_what_the_page_says(hw, capsys, monkeypatch, debug):
    monkeypatch.setenv("HWCORE_DEBUG", debug)
    text = PAGE.read_text()
    names = {}
    for program in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(program, str(PAGE), "exec"), names)
    printed = capsys.readouterr().out.splitlines()
    assert printed == ["[11, 21]", "[12, 22]", "[13, 23]", "[10, 12]", "[[5, 11], [7, 15]]"]
    for line in printed:
        assert f"`{line}`" in text
    hw.synchronize()
    names["relay"].close()
