"""Say what a Python lacks for tests on a device, and how to bring it: ``gpu_python.py [FILE]``.

Looks for Python 3.11 and torch 2.9; with a list of requirements, for each of those instead. Needs
nothing but the Python that is asked about, which may be an old one. Exits 1 where something lacks.
"""

import re
import sys

try:
    from importlib import metadata
except ImportError:  # Python 3.7: what is said of it comes first
    metadata = None  # type: ignore[assignment]


def torch_problem():  # type: ignore[no-untyped-def]  # noqa: ANN201
    """Return what is wrong with the installed torch, or None."""
    device = "Install the torch of your device (https://pytorch.org/get-started), 2.9 or later"
    here = sys.executable
    try:
        import torch
    except Exception as error:  # noqa: BLE001 - whatever it is, there is no torch to be had
        return (
            f"{here} cannot import torch: {error!r}. {device}, or pass GPU_PYTHON=/path/to/python"
        )
    version = str(torch.__version__)
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or tuple(map(int, numbers.groups())) < (2, 9):
        return f"{here} has torch {version}; expected 2.9 or later. {device}"
    return None


def missing(file):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Return the requirements in a file that are not installed."""
    with open(file) as lines:
        names = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    found = []
    for name in names:
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            found.append(name)
    return found


def main(arguments):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Print what is wrong and return the exit status."""
    version = "{}.{}".format(*sys.version_info[:2])
    if sys.version_info < (3, 11):  # noqa: UP036 - it may be
        print(
            f"{sys.executable} is Python {version}; expected 3.11 or later. "
            "Pass GPU_PYTHON=/path/to/python3.11"
        )
        return 1
    if not arguments:
        problem = torch_problem()
    else:
        names = missing(arguments[0])
        problem = names and (
            f"{sys.executable} lacks {', '.join(names)}. Where there is a network, run "
            f"`make gpu-wheels GPU_PYTHON_VERSION={version}`, and bring build/wheels here"
        )
    if problem:
        print(f"{problem}.")
    return 1 if problem else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
