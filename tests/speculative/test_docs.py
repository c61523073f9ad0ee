"""The page on speculation: its program runs as it stands and prints what the page says."""

import pathlib
import re

import pytest

import hwcore.speculative

PAGE = pathlib.Path(__file__).parents[2] / "docs/speculative.md"


@pytest.mark.usefixtures("hw", "in_any_order", "watched")
@pytest.mark.parametrize("debug", ["0", "1"])
def test_the_program_prints_what_the_page_says(capsys, monkeypatch, debug):
    monkeypatch.setenv("HWCORE_DEBUG", debug)
    text = PAGE.read_text()
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(program, str(PAGE), "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert printed == ["[[6, 7, 0, 1], [2, 3, 4, 5]] [44, 11]", "[2, 3, 4, 5]"]
    for line in printed:
        assert f"`{line}`" in text


def test_the_names_of_the_page_are_there():
    text = PAGE.read_text()
    for name in ("DraftSteps", "organize_draft_results", "verify_chain", "EagleVerifyWorker"):
        assert f"`{name}`" in text
    for name in re.findall(r"`([A-Z]\w+|[a-z_]+_[a-z_]+)`", text):
        known = hasattr(hwcore.speculative, name) or hasattr(hwcore.kernels, name)
        documented = "``" + name in str(hwcore.speculative.EagleVerifyWorker.__doc__)
        assert known or documented or name in ALSO, name


ALSO = {
    # parameters and fields
    *("num_draft_tokens", "spec_steps", "threshold_single", "threshold_acc", "timeout_s"),
    # members of an enum
    *("FULL", "QLEN_ONLY", "BITPACKED"),
    # a variable of the environment
    "HWCORE_CACHE",
}
