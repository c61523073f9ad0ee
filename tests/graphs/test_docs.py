"""The page on graphs: its program runs as it stands, and prints what it says."""

import pathlib
import re

PAGE = pathlib.Path(__file__).parents[2] / "docs/graphs.md"


def test_the_program_prints_what_the_page_says(hw, capsys):
    text = PAGE.read_text()
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {}
    exec(compile(program, str(PAGE), "exec"), names)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "[22.0, 44.0, 66.0]"
    assert len(printed) == 2
    for line in printed:
        assert f"`{line}`" in " ".join(text.split())
    names["runner"].close()
