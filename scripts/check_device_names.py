"""Refuse the names of devices in Python files: ``check_device_names.py FOLDER_OR_FILE...``.

The core knows no device but the CPU. Code, comments, docstrings and identifiers all count, for
what is only mentioned today is branched on tomorrow. Exits 1 and prints ``file:line: text`` for
each line with such a name; exits 2 where a path is missing or holds no Python file.
"""

from __future__ import annotations

import pathlib
import re
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

NAMES = ("cuda", "npu", "hip", "rocm", "xpu", "musa", "mps", "hpu", "ascend", "nvidia")
EXEMPT = "kernels/triton/"
"""Triton's own interface needs the word here and there."""

# Letters bound a name, so that `torch_npu`, `is_cuda`, `npu0` and `.cuda(` count and `ship` does
# not. In camel case the change of case does: `cudaMalloc`, `CudaGraph`, `HIPEvent`.
_WORD = re.compile(rf"(?<![a-z])(?:{'|'.join(NAMES)})(?![a-z])", re.IGNORECASE)
_CAMEL = re.compile(
    rf"(?<![a-z])(?:{'|'.join(NAMES)})(?=[A-Z])"
    rf"|(?:{'|'.join(map(str.title, NAMES))})(?![a-z])"
    rf"|(?<![A-Z])(?:{'|'.join(map(str.upper, NAMES))})(?=[A-Z][a-z])"
)


def offences(file: pathlib.Path) -> Iterator[tuple[int, str]]:
    """Yield the number and text of every line that names a device."""
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if _WORD.search(line) or _CAMEL.search(line):
            yield number, line.strip()


def python_files(path: pathlib.Path) -> list[pathlib.Path]:
    """Return the files to check at or below a path."""
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    return [file for file in files if EXEMPT not in file.as_posix()]


def main(arguments: list[str]) -> int:
    """Check every path and return the exit status."""
    if not arguments:
        print("usage: check_device_names.py FOLDER_OR_FILE...", file=sys.stderr)
        return 2
    found = False
    for argument in arguments:
        path = pathlib.Path(argument)
        if not path.exists() or not (path.is_file() or any(path.rglob("*.py"))):
            print(f"{path}: no Python file here", file=sys.stderr)
            return 2
        for file in python_files(path):
            for number, text in offences(file):
                print(f"{file}:{number}: {text}")
                found = True
    if found:
        print("The core names no device: ask the backend, or move this into its plugin.")
    return int(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
