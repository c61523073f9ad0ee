"""``gather_rows`` on a device: four buffers of a request in one row, over a gather for each.

Against gathers, by the host's clock around many calls and one wait: they are short, and what they
cost a step is their launch. Against a bare copy of as many bytes, by the device's clock, in graphs
whose calls touch different memory, more of it than a cache holds.
"""

from __future__ import annotations

import importlib.util
from functools import cache, partial
from typing import TYPE_CHECKING

import torch

import hwcore
from hwcore.cli.device_clock import DeviceClock, accelerator
from hwcore.cli.measurement import Row, Target, interleaved
from hwcore.kernels import gather_rows, kernel
from hwcore.types import CompileRequest

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from hwcore.backend import Backend

    Way = Callable[[], object]

ON_DEVICE = True
POOL, TOPK, HIDDEN = 4096, 8, 4096
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
LARGE = {128: None, 512: 0.8}  # batch size: its target
_COPIED = 2**15  # rows, which with their copies take half a GB

_SETTING = f"4 buffers, hidden {HIDDEN}, bs 1 to 512, worst"
PEERS = {
    "eager": Target(f"`gather_rows` / 4 eager gathers, {_SETTING}", 1.0),
    "compiled": Target(f"`gather_rows` / the same with torch.compile, {_SETTING}", 1.0),
    "Triton": Target(f"`gather_rows` / a Triton gather for each buffer, {_SETTING}", 1.0),
}
COPIES = {
    bs: Target(f"copy of as many bytes / `gather_rows`, bs {bs}", target, at_most=False)
    for bs, target in LARGE.items()
}
TARGETS = [*PEERS.values(), *COPIES.values()]


def run(quick: bool = False) -> list[Row]:
    """Return the rows of this subject."""
    hw = accelerator()
    clock, hidden = DeviceClock(hw), 64 if quick else HIDDEN
    rounds, calls = (2, 5) if quick else (15, 200)
    reasons: dict[str, str] = {}
    found: dict[int, dict[str, float]] = {}
    for bs in BATCHES:
        subjects = {}
        for name, call in _ways(hw, hidden, bs, reasons).items():
            try:
                call()  # compiles
            except Exception as error:
                if name == "ours":
                    raise
                reasons[name] = f"does not run here: {error!r}"
                continue
            subjects[name] = clock.by_host(call, calls)
        found[bs] = interleaved(subjects, rounds)
    return [
        *(_over(peer, target, found, reasons) for peer, target in PEERS.items()),
        *(_copy(hw, clock, bs, target, quick) for bs, target in COPIES.items()),
    ]


def _ways(hw: Backend, hidden: int, bs: int, reasons: dict[str, str]) -> dict[str, Way]:
    """Return each way to read a batch; note why one is left out."""
    device = hw.device()
    with torch.device(device):
        buffers = (
            torch.zeros(POOL, dtype=torch.int64),
            torch.zeros(POOL, TOPK),
            torch.zeros(POOL, TOPK, dtype=torch.int64),
            torch.zeros(POOL, hidden, dtype=torch.bfloat16),
        )
    flat = [buffer.view(POOL, -1) for buffer in buffers]
    words = sum(buffer.shape[1] * buffer.element_size() for buffer in flat) // 8
    rows = torch.zeros(POOL, words, dtype=torch.int64, device=device)
    indices, out = _drawn(bs, device), rows[:bs].clone()
    gather = kernel(hw, gather_rows)

    def eager() -> object:
        return tuple(buffer[indices] for buffer in buffers)

    ways: dict[str, Way] = {"ours": lambda: gather(rows, indices, out), "eager": eager}
    policy = hw.compile_policy(CompileRequest("gather", dynamic=True))
    if policy.enabled:
        compiled = _compiled(hw)
        ways["compiled"] = lambda: compiled(indices, *buffers)
    else:
        reasons["compiled"] = f"torch.compile is off on `{hw.info.name}`: {policy.reason}"
    if "triton" in hw.info.capabilities and importlib.util.find_spec("triton"):
        single = single_tensor_gather()
        outs = [buffer[:bs].clone() for buffer in flat]

        def each() -> None:
            for buffer, place in zip(flat, outs, strict=True):
                single(buffer, indices, place)

        ways["Triton"] = each
    else:
        reasons["Triton"] = f"the backend `{hw.info.name}` has no Triton here"
    return ways


@cache  # one for all batch sizes, as an engine has it
def _compiled(hw: Backend) -> Callable[..., object]:
    return hwcore.compile(_four, dynamic=True, backend=hw)


def _drawn(count: int, device: torch.device) -> Tensor:
    order = torch.randperm(POOL, generator=torch.Generator().manual_seed(count))
    return order[:count].to(device)


def _four(
    indices: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return a[indices], b[indices], c[indices], d[indices]


@cache
def single_tensor_gather() -> Callable[[Tensor, Tensor, Tensor], None]:
    """Return a gather of rows of one tensor, launched as barely as Triton can be."""
    import triton
    import triton.language as tl

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def gather(rows, indices, out, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        row = tl.load(indices + tl.program_id(0)).to(tl.int64)
        place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        there = place < width
        values = tl.load(rows + row * width + place, mask=there)
        tl.store(out + tl.program_id(0).to(tl.int64) * width + place, values, mask=there)

    def launch(rows: Tensor, indices: Tensor, out: Tensor) -> None:
        width = rows.shape[1]
        block = min(1024, triton.next_power_of_2(width))
        gather[(len(indices), triton.cdiv(width, block))](rows, indices, out, width, BLOCK=block)

    return launch


def _over(
    peer: str, target: Target, found: dict[int, dict[str, float]], reasons: dict[str, str]
) -> Row:
    """Return the worst ratio over a peer."""
    if peer in reasons:
        return target.not_measured(reasons[peer])
    ratios = {bs: times["ours"] / times[peer] for bs, times in found.items()}
    detail = ", ".join(
        f"bs {bs} {1e6 * found[bs]['ours']:.1f} / {1e6 * found[bs][peer]:.1f} µs" for bs in found
    )
    return target.row(max(ratios.values()), detail)


def _copy(hw: Backend, clock: DeviceClock, bs: int, target: Target, quick: bool) -> Row:
    """Compare with the copy of as many bytes that lie side by side."""
    words, calls, rounds = (64, 2, 2) if quick else (HIDDEN // 4, _COPIED // bs, 15)
    device = hw.device()
    pool = torch.zeros(calls, bs, words, dtype=torch.int64, device=device)
    order = torch.randperm(calls * bs, generator=torch.Generator().manual_seed(0)).to(device)
    out, flat, indices = torch.zeros_like(pool), pool.view(-1, words), order.view(calls, bs)
    gather = kernel(hw, gather_rows)
    ours = [partial(gather, flat, indices[n], out[n]) for n in range(calls)]
    copies = [partial(out[n].copy_, pool[n]) for n in range(calls)]
    times = interleaved({"ours": clock.on_device(ours), "copy": clock.on_device(copies)}, rounds)
    moved = 2 * bs * words * 8
    speeds = ", ".join(f"{name} {moved / s / 1e9:.0f} GB/s" for name, s in times.items())
    return target.row(times["copy"] / times["ours"], f"{speeds}, read and written")
