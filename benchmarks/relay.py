"""What a step's hand-over costs: FutureMap over eager gathers, torch.compile and a bare copy."""

from __future__ import annotations

import statistics
import timeit
from typing import TYPE_CHECKING

import torch

from hwcore.activation import load_backend
from hwcore.cli.measurement import Row, interleaved
from hwcore.overlap import FutureMap, RelayPayload, RelaySpec, StreamFence

if TYPE_CHECKING:
    from collections.abc import Callable

POOL, TOPK = 512, 8
HIDDEN = (4096, 7168)
BATCHES = (1, 8, 16, 64, 128, 256)


def run(quick: bool = False) -> list[Row]:
    """Return the rows of this subject."""
    rounds, calls = (5, 40) if quick else (15, 200)
    points = [(hidden, bs) for hidden in HIDDEN for bs in BATCHES]
    found = {point: _measure(*point, rounds, calls) for point in points}
    large = [point for point in points if point[1] >= 64]
    small = [point for point in points if point[1] < 64]
    return [
        *_over(found, points, "eager", 2.0, 1.5),
        *_over(found, points, "compiled", 2.0, 1.5),
        _under(found, large, "resolve", "bare copy", 1.5, "`resolve` / bare copy of the rows"),
        _under(found, large, "debug", "resolve", 1.3, "debugging / `resolve`"),
        _under(found, small, "debug", "resolve", 2.5, "debugging / `resolve`"),
        _memory(),
        _barrier(rounds, 10 * calls),
    ]


Times = dict[str, float]


def _measure(hidden: int, bs: int, rounds: int, calls: int) -> Times:
    """Return median seconds of each way to read a batch, all in the same rounds.

    The rows are written anew before each read, as a step does, outside the time.
    """
    generator = torch.Generator().manual_seed(0)
    buffers = (
        torch.randint(0, 9, (POOL,), generator=generator),
        torch.rand(POOL, TOPK, generator=generator),
        torch.randint(0, 9, (POOL, TOPK), generator=generator),
        torch.randn(POOL, hidden, generator=generator).bfloat16(),
    )
    indices = torch.randperm(POOL - 1, generator=generator)[:bs] + 1
    payload = RelayPayload(*(buffer[indices] for buffer in buffers))
    spec = RelaySpec(pool_size=POOL, topk=TOPK, hidden_size=hidden)
    hw = load_backend("cpu")
    plain, debug = (FutureMap(spec, backend=hw, debug=debug) for debug in (False, True))
    rows = torch.empty_like(buffers[3][:bs])

    def stash_into(relay: FutureMap) -> Callable[[], object]:
        def stash() -> None:
            relay.publish(indices, indices)
            relay.stash(indices, payload)

        return stash

    def nothing() -> None:
        pass

    subjects: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "eager": (lambda: tuple(buffer[indices] for buffer in buffers), nothing),
        "compiled": (lambda: _compiled(indices, *buffers), nothing),
        "resolve": (lambda: plain.resolve(indices), stash_into(plain)),
        "debug": (lambda: debug.resolve(indices), stash_into(debug)),
        "bare copy": (lambda: rows.copy_(buffers[3][:bs]), nothing),
    }
    for call, prepare in subjects.values():
        prepare()
        call()  # compiles, for one
    return interleaved(
        {name: _timer(call, prepare, calls) for name, (call, prepare) in subjects.items()}, rounds
    )


def _timer(
    call: Callable[[], object], prepare: Callable[[], object], calls: int
) -> Callable[[], float]:
    """Return a measurement: the median of some calls, each after ``prepare``."""
    clock = timeit.default_timer

    def measure() -> float:
        seconds = []
        for _ in range(calls):
            prepare()
            start = clock()
            call()
            seconds.append(clock() - start)
        return statistics.median(seconds)

    return measure


@torch.compile(dynamic=True)
def _compiled(
    indices: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    return a[indices], b[indices], c[indices], d[indices]


def _over(
    found: dict[tuple[int, int], Times],
    points: list[tuple[int, int]],
    peer: str,
    median: float,
    worst: float,
) -> list[Row]:
    """Return how many times faster ``resolve`` is than a peer: the median, and the worst point."""
    ratios = {point: found[point][peer] / found[point]["resolve"] for point in points}
    least = min(ratios, key=ratios.__getitem__)
    detail = ", ".join(f"{hidden}/{bs} {ratios[hidden, bs]:.1f}" for hidden, bs in points)
    what = f"{peer} gathers / `resolve`, 4 buffers"
    return [
        Row(f"{what}, grid median", statistics.median(ratios.values()), "x", median, False, detail),
        Row(f"{what}, worst point", ratios[least], "x", worst, False, f"hidden/bs {least}"),
    ]


def _under(
    found: dict[tuple[int, int], Times],
    points: list[tuple[int, int]],
    what: str,
    floor: str,
    target: float,
    title: str,
) -> Row:
    """Return the worst ratio of a way over its floor."""
    ratios = {point: found[point][what] / found[point][floor] for point in points}
    sizes = sorted({bs for _, bs in points})
    detail = ", ".join(
        f"{hidden}/{bs} {ratios[hidden, bs]:.2f} ({1e6 * found[hidden, bs][what]:.1f} us)"
        for hidden, bs in points
    )
    title = f"{title}, bs {sizes[0]} to {sizes[-1]}, worst point"
    return Row(title, max(ratios.values()), "x", target, True, detail)


def _memory() -> Row:
    """Return the map's memory over that of its rows."""
    spec = RelaySpec(pool_size=POOL, max_batch_size=256, topk=TOPK, hidden_size=4096)
    relay = FutureMap(spec, backend=load_backend("cpu"), debug=False)
    row = 8 + TOPK * 12 + 4096 * 2
    detail = f"{POOL} rows of {row} bytes of values, two outputs of 256, {relay.nbytes} bytes"
    what = "memory of the map / values of its pool"
    return Row(what, relay.nbytes / (POOL * row), "x", None, True, detail)


def _barrier(rounds: int, calls: int) -> Row:
    """Return what ordering a read after another stream's write costs, over one device-wide wait."""
    hw = load_backend("cpu")
    fence, other = StreamFence(hw), hw.create_stream()

    def fenced() -> None:
        with fence.writing():
            pass
        with hw.stream_context(other), fence.reading():
            pass

    seconds = interleaved({"": lambda: timeit.timeit(fenced, number=calls) / calls}, rounds)[""]
    detail = "one writing() and one reading() block on two streams, host time"
    return Row("StreamFence, both sides", seconds * 1e6, "us", None, True, detail)
