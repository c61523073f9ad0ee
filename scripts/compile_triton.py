"""Compile the Triton kernels for devices that are not here, and write down what they take.

``compile_triton.py [--targets NAME...] [-o FILE]``. The calls are those that the wrappers make for
a batch of usual size; instead of a launch, Triton's compiler runs for each target, down to its
binary. Says nothing of speed, nor whether the results are right. Exits 1 where one does not
compile.
"""

from __future__ import annotations

import argparse
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
    batch: str  # what sets the call apart from others of the operation
    kernel: Any
    arguments: tuple[Any, ...]
    constants: dict[str, Any]

    @property
    def name(self) -> str:
        """Return what tells the launch from others."""
        part = {"_read_rows": "reads rows", "_walk": "walks"}.get(self.kernel.fn.__name__)
        level = {True: "first level", False: "later levels"}.get(self.constants.get("FIRST", ""))
        if self.constants.get("SPLITS") == 1:
            level = None  # one launch for all
        words = [word for word in (self.batch, part, level) if word]
        return f"`{self.operation}`" + (f": {', '.join(words)}" if words else "")

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


def launches_of(operation: str, batch: str, *values: Any) -> Iterator[Launch]:
    """Call an operation, and give the launches that it would make."""
    made: list[Launch] = []

    def note(kernel: Any, name: str, grid: Any, *arguments: Any, **constants: Any) -> None:
        made.append(Launch(name, batch, kernel, arguments, constants))

    with mock.patch.object(launching, "launch", note):
        kernels()[operation](*values)
    yield from made


def usual_launches() -> list[Launch]:
    """Return the launches of usual batches, each kernel and its variants once."""
    n, steps, vocab, pool = 64, 6, 131072, 4096

    def ints(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int64, device="meta")

    def floats(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    predict, index, lens = ints(64 * n).int(), ints(64, steps + 1).int(), ints(64).int()
    calls: list[tuple[Any, ...]] = [
        ("gather_rows", "", ints(pool, 2050), ints(64), ints(64, 2050)),
        ("assert_and_invalidate", "", ints(64), ints(pool, 2).int(), ints(64), ints(1)[0]),
        ("commit_paths", "", predict, index, lens, ints(64), ints(64, n), 16),
        ("move_kv", "", floats(32, pool, 2, 8, 128, dtype=torch.bfloat16), *[ints(64, 7)] * 2),
        ("mrope_positions", "trees", ints(pool), ints(64), ints(64 * n), None),
        ("mrope_positions", "paths", ints(pool), ints(64), ints(64 * n), ints(64)),
    ]
    for mode, name in enumerate(("full", "qlen_only", "bitpacked")):
        calls.append(("build_tree", name, ints(64, n), ints(64), steps, mode, 64000))
    tokens = [ints(64, n) for _ in range(5)]
    calls.append(("verify_tree_greedy", "given tokens", *tokens, steps))
    for bs in (8, 256):
        tree, logits = [ints(bs, n)] * 4, floats(bs, n, vocab, dtype=torch.bfloat16)
        calls.append(("verify_tree_greedy", f"{bs} requests", *tree, logits, steps))
        coins = floats(bs, n), floats(bs, n), 1.0, 1.0, steps
        plain = floats(bs), None, None, None, *coins, False
        cut = floats(bs), ints(bs), floats(bs), floats(bs), *coins, True
        for name, rest in (("plain", plain), ("cut and greedy", cut)):
            calls.append(("verify_tree_sampling", f"{bs} requests, {name}", *tree, logits, *rest))
        # Here the greedy requests compare in float64, and the others in float32.
        exact = f"{bs} requests, float64"
        calls.append(("verify_tree_sampling", exact, *tree, logits.double(), *cut))
    # Triton makes a constant of each number that is 1, which some of its functions do not take.
    one, tree, logits = ints(1), [ints(1, 1)] * 4, floats(1, 1, 1)
    index, chances = ints(1, 1).int(), floats(1)
    calls += [
        ("gather_rows", "smallest", ints(1, 1), one, ints(1, 1)),
        ("assert_and_invalidate", "smallest", one, index, one, one[0]),
        ("commit_paths", "smallest", one.int(), index, one.int(), one, ints(1, 1), 1),
        ("move_kv", "smallest", floats(1, 1, 1), ints(1, 1), ints(1, 1)),
        ("mrope_positions", "smallest trees", one, one, one, None),
        ("mrope_positions", "smallest paths", one, one, one, one),
        *(("build_tree", f"smallest, mode {mode}", tree[0], one, 0, mode, 1) for mode in range(3)),
        ("verify_tree_greedy", "smallest", *tree, logits, 0),
        (
            "verify_tree_sampling",
            "smallest",
            *tree,
            logits,
            *(chances, one, chances, chances),
            *(floats(1, 1), floats(1, 1), 1.0, 1.0, 0),
        ),
    ]
    found = [launch for call in calls for launch in launches_of(*call)]
    return list({launch.name: launch for launch in found}.values())


def used(launch: Launch, target: str) -> tuple[int, int, int]:
    """Compile for a target; return registers a thread, bytes a thread in memory, shared bytes."""
    options = {"num_warps": TUNED[launch.operation].num_warps}
    done = triton.compile(launch.source(), target=TARGETS[target], options=options)
    if "amdgcn" in done.asm:
        text = done.asm["amdgcn"]
        registers = _number(r"\.vgpr_count:\s*(\d+)", text)
        spilt = 4 * _number(r"\.vgpr_spill_count:\s*(\d+)", text)
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
        cells = [str(TUNED[launch.operation].num_warps)]
        for target in options.targets:
            try:
                registers, spilt, shared = used(launch, target)
            except Exception as error:  # noqa: BLE001 - whatever it is, the kernel does not compile
                print(f"{launch.name} for {target}: {error}", file=sys.stderr)
                cells.append("does not compile")
                failed = True
                continue
            cells.append(f"{registers} / {spilt} / {shared}")
        rows.append(f"| {launch.name} | {' | '.join(cells)} |")
        print(rows[-1], flush=True)
    if options.output and not failed:
        head = ["launch", "warps", *options.targets]
        table = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *rows]
        options.output.write_text(_PAGE.format(triton=triton.__version__, table="\n".join(table)))
    return int(failed)


_PAGE = """# What the Triton kernels take

Written by `make triton-table`: registers of a thread / bytes of a thread kept in memory for want of
them / bytes of shared memory of a program, as Triton {triton} compiles each kernel for bfloat16
logits (where nothing else is said), 64 nodes and 131072 tokens, without a device. Nothing
here was run.

{table}
"""


if __name__ == "__main__":
    sys.exit(main())
