"""The report's part on many requests at once."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

import hwcore
from examples.serving.serve import EVERY, TOLERANCE, WAYS

if TYPE_CHECKING:
    from collections.abc import Callable

    from examples.serving.engine import Timing
    from examples.serving.serve import Served

# The median over the rounds of each.
COLUMNS: dict[str, tuple[Callable[[Timing], float], str]] = {
    "steps": (lambda t: t.steps, ".0f"),
    "steps/s": (lambda t: t.steps / t.total_s, ".1f"),
    "tokens/s": (lambda t: t.tokens / t.total_s, ".1f"),
    "tokens a decode step": (lambda t: t.decoded / t.decodes, ".2f"),
    "host gap, µs a step": (lambda t: 1e6 * t.gap_s / t.steps, ".0f"),
    "gap, % of the time": (lambda t: 100 * t.gap_s / t.total_s, ".2f"),
    "gather, µs a step": (lambda t: 1e6 * t.gather_s / t.steps, ".1f"),
}


def rows(served: Served) -> list[list[str]]:
    """Return the table: how it was decoded, how it was overlapped, and ``COLUMNS``."""
    return [
        [kind, way, *(format(_median(served, kind, way, v), f) for v, f in COLUMNS.values())]
        for kind in served.alone
        for way in WAYS
    ]


def _median(served: Served, kind: str, way: str, value: Callable[[Timing], float]) -> float:
    return statistics.median(map(value, served.timings[kind, way]))


def section(served: Served) -> str:
    """Return Markdown: what was served, whether the tokens are right, and the table."""
    info = hwcore.current_backend().info
    speed, _ = COLUMNS["tokens/s"]
    plain = _median(served, "plain", "overlap", speed)
    ratios = ", ".join(
        f"{kind} {_median(served, kind, 'overlap', speed) / plain:.2f}"
        for kind in served.alone
        if kind != "plain"
    )
    lines = [["decoding", "overlap", *COLUMNS], ["---"] * (2 + len(COLUMNS)), *rows(served)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    places = "".join(
        f"\n- {d.run}: `{d.name}` at token {d.place}, the two largest logits {d.gap:.6f} apart"
        f"{'' if d.allowed else ': **WRONG**'}"
        for d in served.differences
    )
    return f"""
## Many requests at once

{len(served.alone["plain"])} requests, one more every {EVERY} steps, at most {served.bucket} side \
by side, in a KV pool of {served.num_slots} slots: fewer than so many may need. \
{served.retractions} times, in all runs, one was retracted and prefilled again later. Every step \
is padded to {served.bucket} requests; trees are of one size, drafted on the device.

**Each answer is that of the request alone: {"yes" if served.sound else "NO"}** ({served.compared} \
answers). On the same bucket they are equal, token for token. Other batch sizes, other trees and \
prefills after a retraction round otherwise: there a token may differ where the two largest logits \
are within {TOLERANCE}. Such places: \
{len(served.differences)}.{places}

{table}

With overlap, tokens a second over those of plain decoding: {ratios}. A full batch leaves \
a CPU no arithmetic to spare, so that drafts pay only where most of them come true; on a device a \
decode step as a rule waits for memory, and arithmetic is to spare.

*off*: the host looks at a step's tokens before it schedules the next; *overlap*: afterwards. \
*host gap*: host time between the submissions of two steps, without the wait for tokens: they are \
handed to their requests, a batch is scheduled and brought to the device. *gather*: host time in \
`FutureMap.resolve`.

{_OVERLAPS if "async_streams" in info.capabilities else _INERT}
"""


_OVERLAPS = """\
On this backend work is submitted, not run, at once: with overlap the gap lies behind a step."""
_INERT = """\
On this backend work runs when it is submitted, so that nothing hides the gap: the table shows \
what overlap costs (a step more where an answer ends unforeseen), and the gap that a device would \
be spared. Its graphs are tapes, which save the Python between operations."""
