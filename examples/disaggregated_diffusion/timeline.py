"""Who did what when: spans of stage, push, load and compute, their overlap and their picture."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hwcore.errors import ArgumentTypeError, ArgumentValueError, describe

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

TRANSFERS = ("stage", "push", "load")
KINDS = (*TRANSFERS, "compute")
_COLORS = {"stage": "#e0912f", "push": "#b5483a", "load": "#2f8f4e", "compute": "#7fb3dc"}


@dataclass(frozen=True)
class Span:
    """A stretch of time in which a worker did one thing for one request.

    Attributes
    ----------
    request_id : str
    role : str
    kind : str
        Of ``KINDS``.
    start_s, end_s : float
        On a clock that all workers share, such as the machine's ``time.monotonic()``.
    worker : str

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        If the kind is another, or the times are not finite and in order.
    """

    request_id: str
    role: str
    kind: str
    start_s: float
    end_s: float
    worker: str

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            expected, fix = f"one of {', '.join(KINDS)}", "Name what was done"
            raise ArgumentValueError(describe("Span", "`kind`", self.kind, expected, fix))
        times, fix = (self.start_s, self.end_s), "Take both from one clock"
        if not all(isinstance(one, (int, float)) for one in times):
            raise ArgumentTypeError(describe("Span", "its times", times, "two numbers", fix))
        if not all(map(math.isfinite, times)) or self.start_s > self.end_s:
            expected = "finite ones, the start no later than the end"
            raise ArgumentValueError(describe("Span", "its times", times, expected, fix))


@dataclass(frozen=True)
class Overlap:
    """How much of the transfers' time was hidden.

    Attributes
    ----------
    transfer_s, compute_s : float
        Seconds in which at least one transfer ran, or one computation, anywhere.
    overlap_s : float
        Seconds in which a transfer ran while a computation did, anywhere.
    same_worker_s : float
        Seconds in which a worker transferred while it computed itself, summed over workers.
    """

    transfer_s: float
    compute_s: float
    overlap_s: float
    same_worker_s: float


def overlap(spans: Iterable[Span]) -> Overlap:
    """Return how long transfers ran, and how long of that something was computed."""
    spans = list(spans)
    transfers, computes = _busy(spans, TRANSFERS), _busy(spans, ("compute",))
    same = 0.0
    for worker in {span.worker for span in spans}:
        own = [span for span in spans if span.worker == worker]
        same += _length(_common(_busy(own, TRANSFERS), _busy(own, ("compute",))))
    both = _length(_common(transfers, computes))
    return Overlap(_length(transfers), _length(computes), both, same)


def draw(path: Path, spans: Sequence[Span], marks: Mapping[str, float] | None = None) -> None:
    """Draw a row for each worker: above what it computed, below what it transferred.

    Parameters
    ----------
    path : Path
        Of the PNG.
    spans : sequence of Span
        At least one.
    marks : mapping of str to float, optional
        Moments to name, on the spans' clock: a worker killed, say.

    Raises
    ------
    ArgumentValueError
        If there is no span.
    """
    if not spans:
        fix = "Hand over what the workers recorded"
        raise ArgumentValueError(describe("timeline.draw", "`spans`", spans, "some", fix))
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    began, rows = min(span.start_s for span in spans), _rows(spans)
    figure = Figure(figsize=(14, 1.4 + 0.9 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for kind in KINDS:
        for of, row in rows.items():
            own = [span for span in spans if (span.kind, span.role, span.worker) == (kind, *of)]
            _draw_bars(axes, own, kind, row, began)
    for name, moment in (marks or {}).items():
        axes.axvline(moment - began, color="#b5483a", ls="--", lw=1)
        axes.annotate(name, (moment - began, -0.55), fontsize=8, color="#b5483a", va="top")
    axes.set_yticks(range(len(rows)), [f"{role}\n{worker}" for role, worker in rows])
    axes.set_ylim(len(rows) - 0.5, -0.6)
    axes.set_xlabel("seconds")
    found, requests = overlap(spans), len({span.request_id for span in spans})
    axes.set_title(
        f"{requests} requests: transfers ran for {found.transfer_s:.2f} s, for "
        f"{found.overlap_s:.2f} s of it beside a computation, for {found.same_worker_s:.2f} s "
        "beside one of their own worker"
    )
    axes.legend(
        handles=[Patch(color=_COLORS[kind], label=kind) for kind in KINDS],
        loc="upper left",
        bbox_to_anchor=(1.0, 1.0),
    )
    figure.savefig(path, dpi=100)


def _rows(spans: Iterable[Span]) -> dict[tuple[str, str], int]:
    """Return a row for each role and worker: roles in the order in which they are first at work."""
    first: dict[str, float] = {}
    for span in spans:
        first[span.role] = min(span.start_s, first.get(span.role, math.inf))
    ordered = sorted({(first[span.role], span.role, span.worker) for span in spans})
    return {(role, worker): row for row, (_, role, worker) in enumerate(ordered)}


def _draw_bars(axes: Axes, spans: Iterable[Span], kind: str, row: int, began: float) -> None:
    computed = kind == "compute"
    place, height = (-0.4, 0.4) if computed else (0.02 + 0.13 * TRANSFERS.index(kind), 0.12)
    axes.broken_barh(
        [(span.start_s - began, span.end_s - span.start_s) for span in spans],
        (row + place, height),
        facecolor=_COLORS[kind],
        edgecolor="white" if computed else _COLORS[kind],  # keeps the shortest transfers in sight
        lw=0.5,
    )


def _busy(spans: Iterable[Span], kinds: Sequence[str]) -> list[tuple[float, float]]:
    """Return the stretches in which at least one span of some kinds runs, in order, apart."""
    merged: list[tuple[float, float]] = []
    for start, end in sorted((s.start_s, s.end_s) for s in spans if s.kind in kinds):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def _common(
    some: list[tuple[float, float]], others: list[tuple[float, float]]
) -> list[tuple[float, float]]:
    """Return what two lists of stretches share; each is in order and its own lie apart."""
    found, left, right = [], 0, 0
    while left < len(some) and right < len(others):
        start = max(some[left][0], others[right][0])
        end = min(some[left][1], others[right][1])
        if start < end:
            found.append((start, end))
        if some[left][1] < others[right][1]:
            left += 1
        else:
            right += 1
    return found


def _length(stretches: list[tuple[float, float]]) -> float:
    return sum(end - start for start, end in stretches)
