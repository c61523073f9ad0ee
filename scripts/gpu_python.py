"""Say what a Python lacks for tests on a device, and how to bring it: ``gpu_python.py [FILE]``.

Looks for Python 3.11 and torch 2.9; with a list of requirements, for each of those instead. Needs
nothing but the Python that is asked about, which may be an older one. Exits 1 where something
lacks.
"""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path


def torch_problem() -> str:
    """Return what is wrong with the installed torch; empty where nothing is."""
    fix = "Install the torch of your device (https://pytorch.org/get-started), 2.9 or later"
    try:
        import torch
    except Exception as error:  # noqa: BLE001 - whatever it is, there is no torch to be had
        fix += ", or pass GPU_PYTHON=/path/to/python"
        return f"{sys.executable} cannot import torch: {error!r}. {fix}."
    version = str(torch.__version__)
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or tuple(map(int, numbers.groups())) < (2, 9):
        return f"{sys.executable} has torch {version}; expected 2.9 or later. {fix}."
    return ""


def packages_problem(file: Path) -> str:
    """Return which of the requirements in a file are not installed; empty where all are."""
    lines = [line.strip() for line in file.read_text().splitlines()]
    lacking = []
    for name in lines:
        if name and not name.startswith("#"):
            try:
                metadata.version(name)
            except metadata.PackageNotFoundError:
                lacking.append(name)
    if not lacking:
        return ""
    version = "{}.{}".format(*sys.version_info[:2])
    return (
        f"{sys.executable} lacks {', '.join(lacking)}. Where there is a network, run "
        f"`make gpu-wheels GPU_PYTHON_VERSION={version}`, and bring build/wheels here."
    )


def main(arguments: list[str]) -> int:
    """Print what is wrong and return the exit status."""
    if sys.version_info < (3, 11):  # noqa: UP036 - it may be
        version = "{}.{}".format(*sys.version_info[:2])
        fix = "Pass GPU_PYTHON=/path/to/python3.11"
        problem = f"{sys.executable} is Python {version}; expected 3.11 or later. {fix}."
    else:
        problem = packages_problem(Path(arguments[0])) if arguments else torch_problem()
    if problem:
        print(problem)
    return 1 if problem else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
