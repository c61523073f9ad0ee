"""What moving tensors costs: the pool's allocator, its padding, and its copies over a bare one."""

from __future__ import annotations

import random
import statistics
import time
import timeit
from typing import TYPE_CHECKING, Any

import torch

from hwcore.activation import load_backend
from hwcore.cli.measurement import Row, interleaved
from hwcore.diffusion import TransferTensorBuffer, manifest_of, pack_tensors, unpack_tensors
from hwcore.diffusion.allocator import RangeAllocator

if TYPE_CHECKING:
    from collections.abc import Callable

MIB = 1 << 20
LIVE = 100_000

Size = tuple[int, int]
MIXES: dict[str, Size] = {"0.1 to 30 MiB": (MIB // 10, 30 * MIB), "1 B to 4 KiB": (1, 4096)}


def run(quick: bool = False) -> list[Row]:
    """Return the rows of this subject."""
    rounds = 5 if quick else 15
    return [
        *(row for name, mix in MIXES.items() for row in _allocator(name, mix, quick)),
        *_wire(),
        _write(rounds),
        *_small(rounds, 5 if quick else 20),
    ]


def _allocator(name: str, mix: Size, quick: bool) -> list[Row]:
    """Replace blocks among ``LIVE`` live ones, in a range a quarter larger than they are."""
    choose = random.Random(0)
    allocator = RangeAllocator(int(1.25 * LIVE * sum(mix) / 2))
    live: list[int] = []
    while len(live) < LIVE:
        live.append(_got(allocator.allocate(choose.randint(*mix))))
    taken: dict[str, list[int]] = {"allocate": [], "free": []}
    for _ in range(10_000 if quick else 100_000):
        size, place = choose.randint(*mix), choose.randrange(LIVE)
        start = time.perf_counter_ns()
        allocator.free(live[place])
        between = time.perf_counter_ns()
        offset = allocator.allocate(size)
        taken["allocate"].append(time.perf_counter_ns() - between)
        taken["free"].append(between - start)
        live[place] = _got(offset)
    stats = allocator.stats()
    rows = []
    for what, found in taken.items():
        p50, p99 = statistics.median(found) / 1e3, statistics.quantiles(found, n=100)[-1] / 1e3
        detail = f"{LIVE} live blocks, {stats.free_blocks} free ones; p50 {p50:.1f} us"
        rows.append(Row(f"{what}, {name}, p99", p99, "us", 20, True, detail))
    detail = f"fragmentation {stats.fragmentation:.2f} after the replacements"
    return [*rows, Row(f"bytes taken / asked, {name}", stats.waste, "x", 1.05, True, detail)]


def _got(offset: int | None) -> int:
    assert offset is not None, "the range is too small for this mix"
    return offset


def _wire() -> list[Row]:
    """Compare what is sent, manifest included, with the tensors' bytes."""
    trees = {
        "latent and embeds": [
            torch.zeros(16, 21, 60, 104, dtype=torch.bfloat16),
            torch.zeros(2, 512, 4096, dtype=torch.bfloat16),
        ],
        "1000 tensors of 64 B": _thousand(),
        "1000 tensors of 1 B to 20 KiB": [
            torch.zeros(random.Random(n).randint(1, 20_000), dtype=torch.uint8) for n in range(1000)
        ],
    }
    rows = []
    for name, tree in trees.items():
        useful = sum(tensor.nbytes for tensor in tree)
        frames = sum(len(frame) for frame in pack_tensors(tree))
        pooled = manifest_of(tree)[0].size_bytes
        detail = f"{useful} useful bytes, {frames} in frames; {pooled} in a pool, padding included"
        rows.append(
            Row(
                f"bytes sent / useful, {name}",
                max(frames, pooled) / useful,
                "x",
                1.02,
                True,
                detail,
            )
        )
    return rows


def _thousand() -> list[torch.Tensor]:
    return [torch.full((16,), float(n)) for n in range(1000)]


def _write(rounds: int) -> Row:
    """Write tensors of 64 MiB together into a lease, and the same bytes by one copy."""
    sent = [torch.ones(4 * MIB) for _ in range(4)]
    source = torch.ones(64 * MIB, dtype=torch.uint8)
    pool = _pool(65 * MIB)
    lease = pool.allocate(64 * MIB)
    target = lease.memory
    found = interleaved(
        {
            "write": _timed(lambda: pool.write_tensors_from_device(lease, sent), 1),
            "copy": _timed(lambda: target.copy_(source), 1),
        },
        rounds,
    )
    detail = ", ".join(f"{name} {seconds * 1e3:.1f} ms" for name, seconds in found.items())
    what = "write of 4 x 16 MiB / one copy of 64 MiB"
    return Row(what, found["write"] / found["copy"], "x", None, True, detail)


def _small(rounds: int, calls: int) -> list[Row]:
    """Move 1000 tensors of 64 bytes, and the same bytes by one copy and by one for each."""
    sent, pool = _thousand(), _pool(MIB)
    lease = pool.allocate(64_000)
    manifest, _ = pool.write_tensors_from_device(lease, sent)
    frames = [bytearray(frame) for frame in pack_tensors(sent)]
    flat, target = torch.cat(sent), torch.empty(16_000)
    rows = list(target.view(1000, 16))

    def copy_each() -> None:
        for row, tensor in zip(rows, sent, strict=True):
            row.copy_(tensor)

    subjects: dict[str, Callable[[], Any]] = {
        "pack": lambda: pack_tensors(sent),
        "unpack": lambda: unpack_tensors(frames),
        "write": lambda: pool.write_tensors_from_device(lease, sent),
        "read": lambda: pool.read_tensors_from_manifest(lease, manifest),
        "one copy": lambda: target.copy_(flat),
        "a copy each": copy_each,
    }
    found = interleaved({name: _timed(fn, calls) for name, fn in subjects.items()}, rounds)
    one, each = found.pop("one copy"), found.pop("a copy each")
    return [
        Row(
            f"{name} of 1000 x 64 B / one copy of 64 kB",
            seconds / one,
            "x",
            None,
            True,
            f"{seconds * 1e3:.2f} ms, {seconds / each:.1f} of 1000 torch copies",
        )
        for name, seconds in found.items()
    ]


def _pool(size_bytes: int) -> TransferTensorBuffer:
    memory = torch.zeros(size_bytes, dtype=torch.uint8)  # written: its pages are there
    return TransferTensorBuffer(memory, load_backend("cpu"))


def _timed(function: Callable[[], Any], calls: int) -> Callable[[], float]:
    return lambda: timeit.timeit(function, number=calls) / calls
