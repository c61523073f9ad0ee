"""Stand-ins for Ascend's libraries, so that the real torch_npu can be imported without CANN.

``python stubs.py FOLDER`` compiles into FOLDER a shared library for each one that the installed
torch_npu is linked against and this machine lacks. Every function that torch_npu expects of them is
there and returns 0. What can be learnt with them is what torch_npu's Python looks like, and nothing
about a device.
"""

from __future__ import annotations

import importlib.util
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

__all__ = ["main"]

HOME = "libascendcl.so"
"""The stub that holds every function: in which library one is makes no difference here."""


def _tool(name: str, variable: str, fix: str) -> list[str]:
    command = shlex.split(os.environ.get(variable) or name)
    if shutil.which(command[0]) is None:
        sys.exit(f"contract: there is no `{command[0]}`; expected it on the PATH. {fix}.")
    return command


def _symbols(nm: list[str], which: str, libraries: list[pathlib.Path]) -> set[str]:
    """Return the names of dynamic symbols, ``--undefined-only`` or ``--defined-only``."""
    found = set()
    for library in libraries:
        command = [*nm, "--dynamic", which, "--format=posix", str(library)]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        for line in lines.splitlines():
            name, kind = line.split()[:2]
            if kind not in "wv":  # weak ones may be missing
                found.add(name.partition("@")[0])
    return found


def _needed(readelf: list[str], libraries: list[pathlib.Path]) -> set[str]:
    command = [*readelf, "--dynamic", "--wide", *map(str, libraries)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"\(NEEDED\).*\[(.+)\]", text))


def _host_libraries(library: pathlib.Path) -> tuple[list[pathlib.Path], set[str]]:
    """Return what the loader finds for a library, and the names that it does not."""
    lines = subprocess.run(["ldd", str(library)], capture_output=True, text=True, check=True).stdout
    found = [pathlib.Path(path) for path in re.findall(r"(/\S+) \(0x", lines)]
    return found, set(re.findall(r"(\S+) => not found", lines))


def main(folder: pathlib.Path) -> None:
    """Write the stubs and say how many."""
    binutils = "Install binutils, which a C++ compiler stands on"
    nm = _tool("nm", "NM", binutils)
    compiler = _tool("c++", "CXX", "Install one, such as g++, or set CXX to its path")
    package, torch = (_folder(name) for name in ("torch_npu", "torch"))
    own = sorted([*package.glob("_C*.so"), *package.glob("lib/*.so")])
    host: set[pathlib.Path] = set(torch.glob("lib/*.so*"))
    missing: set[str] = set()
    for library in own:
        there, gone = _host_libraries(library)
        host.update(there)
        missing |= gone
    missing -= {path.name for path in {*host, *own}}
    defined = _symbols(nm, "--defined-only", [*own, *sorted(host)])
    wanted = sorted(
        name
        for name in _symbols(nm, "--undefined-only", own) - defined
        if not name.startswith(("Py", "_Py"))  # the interpreter's
    )
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "stubs.cpp"
    source.write_text("".join(f'extern "C" long {name}() {{ return 0; }}\n' for name in wanted))
    empty = folder / "empty.cpp"
    empty.write_text("")
    for name in sorted(missing | {HOME}):
        code = source if name == HOME else empty
        command = [*compiler, "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", folder / name, code]
        subprocess.run(list(map(str, command)), check=True)
    print(f"contract: {len(missing)} libraries with {len(wanted)} functions, in {folder}")


def _folder(module: str) -> pathlib.Path:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        sys.exit(f"contract: there is no {module}; expected it to be installed. Run make contract.")
    return pathlib.Path(spec.origin).parent


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
