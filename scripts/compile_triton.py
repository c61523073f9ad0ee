"""Compile the Triton kernels for devices that are not here, and write down what they take.

``compile_triton.py [--targets NAME...] [-o FILE]``. The calls are those that the wrappers make for
a batch of usual size; instead of a launch, Triton's compiler runs for each target, down to its
binary. Says nothing of speed, nor whether the results are right. Exits 1 where one does not
compile, or keeps registers in memory for want of them.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import mangle_type

from hwcore.kernels.triton import kernels, launching
from hwcore.kernels.triton.tuning import TUNED

if TYPE_CHECKING:
    from collections.abc import Iterator

TARGETS = {
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}


@dataclasses.dataclass(frozen=True)
class Launch:
    """A launch that a wrapper asked for."""

    operation: str
    kernel: Any
    arguments: tuple[Any, ...]
    constants: dict[str, Any]

    @property
    def name(self) -> str:
        """Return the operation, the kernel and what sets it apart from others of the same."""
        chosen = {k: v for k, v in self.constants.items() if k not in _SAID_ELSEWHERE}
        words = [f"{key.lower()} {value}" for key, value in chosen.items()]
        return ", ".join([f"`{self.operation}` {self.kernel.fn.__name__.strip('_')}", *words])

    def source(self) -> ASTSource:
        """Return what Triton compiles: the types that it would find at this launch."""
        signature, constants, attributes = {}, {}, {}
        values = dict(zip(self.kernel.arg_names, self.arguments, strict=False)) | self.constants
        for number, parameter in enumerate(self.kernel.params):
            name, value = parameter.name, values[parameter.name]
            one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
            if parameter.is_constexpr or value is None or one:
                signature[name], constants[(number,)] = "constexpr", value
                continue
            signature[name] = mangle_type(value)
            aligned = isinstance(value, torch.Tensor) or (
                isinstance(value, int) and value % 16 == 0 and not parameter.do_not_specialize
            )
            if aligned:
                attributes[(number,)] = [["tt.divisibility", 16]]
        return ASTSource(self.kernel, signature, constants, attributes)


_SAID_ELSEWHERE = ("BLOCK", "FULL", "BITPACKED", "NODES", "STEPS")


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Note launches instead of making them."""
    launches: list[Launch] = []

    def note(kernel: Any, operation: str, grid: Any, *arguments: Any, **constants: Any) -> None:
        launches.append(Launch(operation, kernel, arguments, constants))

    with mock.patch.object(launching, "launch", note):
        yield launches


def usual_launches() -> list[Launch]:
    """Return the launches of usual batches, each kernel and its variants once."""
    run, n, vocab, pool = kernels(), 64, 131072, 4096
    steps = 6

    def ints(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int64, device="meta")

    def floats(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    with recorded() as launches:
        run["gather_rows"](ints(pool, 2050), ints(64), ints(64, 2050))
        run["assert_and_invalidate"](ints(64), ints(pool, 2).int(), ints(64), ints(1)[0])
        predict, index, lens = ints(64 * n).int(), ints(64, steps + 1).int(), ints(64).int()
        run["commit_paths"](predict, index, lens, ints(64), ints(64, n), 16)
        run["mrope_positions"](ints(pool), ints(64), ints(64 * n), None)
        run["mrope_positions"](ints(pool), ints(64), ints(64 * n), ints(64))
        for mode in range(3):
            run["build_tree"](ints(64, n), ints(64), steps, mode, 64 * 1000)
        for bs in (8, 256):
            tree = [ints(bs, n) for _ in range(4)]
            logits = floats(bs, n, vocab, dtype=torch.bfloat16)
            run["verify_tree_greedy"](*tree, logits, steps)
            coins = floats(bs, n), floats(bs, n), 1.0, 1.0, steps
            cut = ints(bs), floats(bs), floats(bs)
            for filters, any_greedy in (((None,) * 3, False), (cut, True)):
                chosen = (floats(bs), *filters, *coins, any_greedy)
                run["verify_tree_sampling"](*tree, logits, *chosen)
        run["verify_tree_greedy"](*(ints(64, n) for _ in range(5)), steps)
    return list({launch.name: launch for launch in launches}.values())


def used(launch: Launch, target: str) -> tuple[int, int, int]:
    """Compile for a target; return registers a thread, of them in memory, shared bytes."""
    options = {"num_warps": TUNED[launch.operation].num_warps}
    done = triton.compile(launch.source(), target=TARGETS[target], options=options)
    if "amdgcn" in done.asm:
        text = done.asm["amdgcn"]
        registers = _number(r"\.vgpr_count:\s*(\d+)", text)
        spilt = _number(r"\.vgpr_spill_count:\s*(\d+)", text)
    else:
        tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(done.asm["cubin"])
            file.flush()
            command = [str(tool), "--dump-resource-usage", file.name]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        registers = _number(r"REG:(\d+)", text)
        spilt = _number(r"LOCAL:(\d+)", text) + _number(r"STACK:(\d+)", text)
    return registers, spilt, done.metadata.shared


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        message = f"the compiler's report has no {pattern!r}:\n{text}"
        raise ValueError(message)
    return int(found.group(1))


def main() -> int:
    """Compile everything, print or write the table, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("-o", "--output", type=pathlib.Path, help="write the table as Markdown")
    options = parser.parse_args()
    rows, failed = [], False
    for launch in usual_launches():
        cells = []
        for target in options.targets:
            try:
                registers, spilt, shared = used(launch, target)
            except Exception as error:  # noqa: BLE001 - whatever it is, the kernel does not compile
                print(f"{launch.name} for {target}: {error}", file=sys.stderr)
                failed = True
                continue
            if spilt:
                print(f"{launch.name} for {target}: {spilt} spilt", file=sys.stderr)
                failed = True
            cells.append(f"{registers} / {shared}")
        warps = TUNED[launch.operation].num_warps
        rows.append(f"| {launch.name} | {warps} | {' | '.join(cells)} |")
        print(rows[-1], flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
