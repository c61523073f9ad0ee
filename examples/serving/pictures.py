"""The report's pictures."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from examples.serving.compare import PLAIN

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from examples.serving.compare import Outcome
    from examples.serving.decode import Answer

_COLORS = ("#8a8a8a", "#e0912f", "#7fb3dc", "#1f6fb4")  # plain, and ways in their order
_ACCEPTED = "#2f8f4e"


def draw(
    folder: Path,
    greedy: Sequence[Outcome],
    sampled: Sequence[Outcome],
    costs: Mapping[str, Mapping[int, float]],
    tokenizer: Any,
) -> str:
    """Draw every picture into a folder; return Markdown that shows them."""
    speeds(folder / "speculation.png", greedy, costs)
    accepted(folder / "accepted.png", greedy, sampled)
    return f"""\
![tokens per second, cost of a step by tree size](speculation.png)

![how many drafts were accepted](accepted.png)

{tree(folder / "tree.png", greedy, tokenizer)}"""


def speeds(
    path: Path, outcomes: Sequence[Outcome], costs: Mapping[str, Mapping[int, float]]
) -> None:
    """Draw tokens a second by prompt and way, and what trees cost by size."""
    figure = Figure(figsize=(15, 4.8), layout="constrained")
    speed, cost = figure.subplots(1, 2, width_ratios=(2, 1))
    ways = list(outcomes[0].runs)
    width = 0.8 / len(ways)
    for index, way in enumerate(ways):
        places = [place + (index - (len(ways) - 1) / 2) * width for place in range(len(outcomes))]
        bars = [outcome.tokens_per_s(way) for outcome in outcomes]
        speed.bar(places, bars, width, color=_COLORS[index % len(_COLORS)], label=way)
        if way != PLAIN:
            for place, height, outcome in zip(places, bars, outcomes, strict=True):
                label = f"{outcome.ratio(way):.2f}x"
                speed.annotate(label, (place, height), ha="center", va="bottom", fontsize=7)
    speed.set_xticks(range(len(outcomes)), [outcome.name for outcome in outcomes])
    speed.set(title="Greedy decoding (labels: over plain)", ylabel="tokens per second")
    speed.margins(y=0.12)
    speed.legend()
    for way, by_size in costs.items():
        color = _COLORS[ways.index(way) % len(_COLORS)] if way in ways else None
        plain = by_size[1]
        cost.plot(
            list(by_size), [s / plain for s in by_size.values()], "o-", color=color, label=way
        )
    cost.set(title="Cost of one step", xlabel="tree nodes", ylabel="in plain steps: break-even")
    cost.set_ylim(bottom=0)
    cost.grid(alpha=0.3)
    cost.legend()
    figure.savefig(path, dpi=110)


def accepted(path: Path, greedy: Sequence[Outcome], sampled: Sequence[Outcome]) -> None:
    """Draw how many tokens the steps with drafts emitted, by way."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, outcomes in zip(axes, (greedy, sampled), strict=True):
        ways = list(outcomes[0].runs)
        drafted = outcomes[0].drafted
        width = 0.8 / max(len(drafted), 1)
        for index, way in enumerate(drafted):
            counts: Counter[int] = Counter()
            for outcome in outcomes:
                for run in outcome.runs[way]:
                    pairs = zip(run.sizes, run.accepted, strict=True)
                    counts.update(tokens for size, tokens in pairs if size > 1)
            total, shift = max(counts.total(), 1), (index - (len(drafted) - 1) / 2) * width
            longest = range(1, max(counts, default=1) + 1)
            shares = [counts[tokens] / total for tokens in longest]
            color = _COLORS[ways.index(way) % len(_COLORS)]
            axis.bar([tokens + shift for tokens in longest], shares, width, color=color, label=way)
        heat = outcomes[0].temperature
        title = f"temperature {heat}" if heat else "greedy"
        axis.set(title=f"Tokens a step with drafts, {title}", xlabel="tokens, bonus included")
        axis.set_xlim(right=min(axis.get_xlim()[1], 12.5))
        axis.legend()
    axes[0].set_ylabel("share of steps")
    figure.savefig(path, dpi=110)


def tree(path: Path, outcomes: Sequence[Outcome], tokenizer: Any) -> str:
    """Draw the EAGLE tree whose accepted path was longest; return Markdown that shows it."""
    found = _longest(outcomes)
    if found is None:
        return "*(no tree with branches was verified)*"
    name, answer = found
    assert answer.longest is not None
    proposal, emitted = answer.longest
    tokens, parents = proposal.nodes[0].tolist(), proposal.parents[0].tolist()
    depth, row = [0] * len(tokens), [0.0] * len(tokens)
    leaves = 0
    children: dict[int, list[int]] = {}
    for node, parent in enumerate(parents):
        if parent >= 0:
            depth[node] = depth[parent] + 1
            children.setdefault(parent, []).append(node)
    for node in _leaves_first(children):
        below = children.get(node)
        if below:
            row[node] = sum(row[child] for child in below) / len(below)
        else:
            row[node], leaves = float(leaves), leaves + 1
    size = (3.2 * (max(depth) + 1), 0.5 * leaves + 1)
    figure = Figure(figsize=size, layout="constrained")
    axis = figure.subplots()
    path_nodes = set(emitted.path)
    for node, parent in enumerate(parents):
        if parent >= 0:
            taken = node in path_nodes
            xs, ys = [depth[parent], depth[node]], [row[parent], row[node]]
            axis.plot(xs, ys, color=_ACCEPTED if taken else "#c0c0c0", lw=2.5 if taken else 1)
    for node, token in enumerate(tokens):
        taken = node in path_nodes
        axis.annotate(
            repr(tokenizer.decode([token])),
            (depth[node], row[node]),
            ha="center",
            va="center",
            fontsize=9,
            bbox={
                "boxstyle": "round",
                "fc": "#dff0e4" if taken else "white",
                "ec": _ACCEPTED if taken else "#a0a0a0",
            },
        )
    axis.set_xlim(-0.5, max(depth) + 0.5)
    axis.set_ylim(leaves - 0.4, -0.6)
    axis.set_axis_off()
    bonus = tokenizer.decode(emitted.tokens[-1:])
    axis.set_title(f"{name}: the accepted path is green; the model adds {bonus!r}")
    figure.savefig(path, dpi=110)
    return f"![a draft tree of `{name}` and its accepted path]({path.name})"


def _leaves_first(children: dict[int, list[int]]) -> list[int]:
    """Return the root's descendants and itself, each after what is below it."""
    order, stack = [], [0]
    while stack:
        node = stack.pop()
        order.append(node)
        stack.extend(children.get(node, []))
    return order[::-1]


def _longest(outcomes: Sequence[Outcome]) -> tuple[str, Answer] | None:
    """Return the run with the longest path through a tree that branches, of the last way."""
    runs = [
        (len(run.longest[1].path), outcome.name, run)
        for outcome in outcomes
        for run in outcome.runs[list(outcome.runs)[-1]]
        if run.longest is not None
    ]
    if not runs:
        return None
    _, name, run = max(runs, key=lambda it: it[0])
    return name, run
