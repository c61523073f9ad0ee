"""What is faked in the plugin's tests is compared with the real torch_npu here."""

from __future__ import annotations

import pathlib
import sys

sys.path.append(str(pathlib.Path(__file__).parents[1] / "tests"))


def pytest_terminal_summary(terminalreporter):
    """Say what this was: nobody may take it for more."""
    terminalreporter.write_line("hwcore-npu: signatures of torch_npu alone; not run on the device")
