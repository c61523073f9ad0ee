"""The demo's report: a table, a picture, and where speculation does not pay."""

from __future__ import annotations

import os
from collections import Counter
from typing import TYPE_CHECKING

import matplotlib as mpl
import torch

import hwcore

mpl.use("Agg")

from matplotlib import pyplot as plt

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from examples.serving.compare import Outcome

PAYS = 1.05  # below this ratio the gain is not worth a word
_PLAIN, _TREE = "#8a8a8a", "#1f6fb4"


def sizes_used(outcome: Outcome) -> Counter[int]:
    """Return how often each tree size was run; 1 is a plain step."""
    return Counter(size for run in outcome.speculative for size in run.sizes)


def _plain_share(outcome: Outcome) -> float:
    sizes = sizes_used(outcome)
    return sizes[1] / sizes.total()


def write(
    folder: Path,
    outcomes: Sequence[Outcome],
    costs: Mapping[int, float],
    end_of_text: int,
    more: str = "",
) -> Path:
    """Write ``report.md`` and ``speculation.png`` to ``folder``; return the report's path.

    ``more`` goes to the report's end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _plot(folder / "speculation.png", outcomes, costs)
    count, rounds = len(outcomes[0].plain[0].tokens), len(outcomes[0].plain)
    winners = [o.name for o in outcomes if o.ratio >= PAYS]
    others = [
        f"{o.name} ({o.ratio:.2f}x, {_plain_share(o):.0%} of its steps plain)"
        for o in outcomes
        if o.ratio < PAYS
    ]
    report = folder / "report.md"
    report.write_text(
        f"""# Prompt-lookup tree speculation on a real model

SmolLM2-135M-Instruct, fp32, greedy, one request at a time, on the backend \
`{hwcore.current_backend().info.name}` ({torch.get_num_threads()} threads, torch \
{torch.__version__}, {_machine()}).
{count} tokens a prompt, decoded to the last: the end-of-text token does not stop a run. \
{rounds} interleaved round(s), medians.

**Tokens identical to plain decoding: {_identical(outcomes)}.**

{_table(outcomes, end_of_text)}

*accept length*: mean tokens a step, plain steps included. *own words*: tokens before the first \
end-of-text; what follows it is no answer. *ratio*: decoding speed over plain decoding, median of \
the ratios of the *rounds*, which lie far apart where something else used the machine; *with \
prefill*: of the whole answer. *tree sizes*: nodes x steps, all rounds.

![tokens per second, cost of a step by tree size, tree sizes chosen](speculation.png)

## Where it pays, and where not

Pays (ratio at least {PAYS}): {", ".join(winners) or "nowhere"}.
Does **not** pay: {", ".join(others) or "none of these prompts"}. Where a text says what was not \
said before, drafts fail; the sizer learns it and turns to plain steps.

## What a tree costs

A whole step (tree, forward, verify, commit), measured at the start; medians of interleaved \
rounds. A tree pays if it brings more tokens a step than its cost in plain steps.

{_costs(costs)}
{more}""",
        encoding="utf-8",
    )
    return report


def _identical(outcomes: Sequence[Outcome]) -> str:
    wrong = [o.name for o in outcomes if o.first_difference() is not None]
    return f"NO, they differ on {', '.join(wrong)}" if wrong else "on all prompts, in every round"


def _machine() -> str:
    if not hasattr(os, "getloadavg"):
        return f"{os.cpu_count()} cores"
    return f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f} at the end"


def _table(outcomes: Sequence[Outcome], end_of_text: int) -> str:
    heads = ["prompt", "prompt tokens", "own words", "accept length", "plain tokens/s"]
    heads += ["speculative tokens/s", "ratio", "rounds", "with prefill", "tree sizes"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for o in outcomes:
        tokens = o.plain[0].tokens
        own = tokens.index(end_of_text) if end_of_text in tokens else len(tokens)
        sizes = ", ".join(f"{size}x{times}" for size, times in sorted(sizes_used(o).items()))
        lines.append(
            f"| {o.name} | {len(o.prompt)} | {own} | {o.accept_length:.2f} | "
            f"{o.plain_tokens_per_s:.1f} | {o.speculative_tokens_per_s:.1f} | **{o.ratio:.2f}** | "
            f"{min(o.ratios):.2f} to {max(o.ratios):.2f} | {o.ratio_with_prefill:.2f} | {sizes} |"
        )
    return "\n".join(lines)


def _costs(costs: Mapping[int, float]) -> str:
    lines = ["| nodes | ms | plain steps |", "|---|---|---|"]
    lines += [
        f"| {size} | {1e3 * seconds:.1f} | {seconds / costs[1]:.2f} |"
        for size, seconds in costs.items()
    ]
    return "\n".join(lines)


def _plot(path: Path, outcomes: Sequence[Outcome], costs: Mapping[int, float]) -> None:
    figure, (speed, cost, chosen) = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    names, places = [o.name for o in outcomes], range(len(outcomes))

    plain = [o.plain_tokens_per_s for o in outcomes]
    drafted = [o.speculative_tokens_per_s for o in outcomes]
    speed.bar([p - 0.2 for p in places], plain, 0.4, color=_PLAIN, label="plain")
    speed.bar([p + 0.2 for p in places], drafted, 0.4, color=_TREE, label="speculative")
    for place, outcome in zip(places, outcomes, strict=True):
        top = max(outcome.plain_tokens_per_s, outcome.speculative_tokens_per_s)
        speed.annotate(f"{outcome.ratio:.2f}x", (place, top), ha="center", va="bottom")
    speed.set_xticks(list(places), names)
    speed.set(title="Decoding speed (labels: ratio)", ylabel="tokens per second")
    speed.margins(y=0.12)
    speed.legend()

    cost.plot(list(costs), [s / costs[1] for s in costs.values()], "o-", color=_TREE)
    cost.set(title="Cost of one step", xlabel="tree nodes", ylabel="in plain steps")
    cost.set_ylim(bottom=0)
    cost.grid(alpha=0.3)

    left = [0.0] * len(outcomes)
    used = sorted({size for o in outcomes for size in sizes_used(o)})
    shades = mpl.colormaps["viridis"].resampled(max(len(costs), 2))
    for size in used:
        share = [sizes_used(o)[size] / sizes_used(o).total() for o in outcomes]
        color = _PLAIN if size == 1 else shades(list(costs).index(size))
        chosen.barh(names, share, left=left, color=color, label=str(size))
        left = [a + b for a, b in zip(left, share, strict=True)]
    chosen.invert_yaxis()
    chosen.set(title="Tree sizes chosen", xlabel="share of steps")
    chosen.legend(title="nodes", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110)
    plt.close(figure)
