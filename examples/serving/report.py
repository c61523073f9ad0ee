"""The demo's report: tables, pictures, and where speculation does not pay."""

from __future__ import annotations

import os
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch

import hwcore
from examples.serving.compare import PLAIN

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from examples.serving.compare import Outcome

_WAYS = {
    "lookup": "; *lookup*: what followed earlier matches of the text's end, merged into a tree",
    "EAGLE chain": "; *EAGLE chain*: a trained head runs ahead of the model",
    "EAGLE tree": "; *EAGLE tree*: the same, with branches",
}
PAYS = 1.05  # below this ratio the gain is not worth a word


def sizes_used(outcome: Outcome, way: str) -> Counter[int]:
    """Return how often each tree size was run; 1 is a step without drafts."""
    return Counter(size for run in outcome.runs[way] for size in run.sizes)


def write(
    folder: Path,
    greedy: Sequence[Outcome],
    sampled: Sequence[Outcome],
    costs: Mapping[str, Mapping[int, float]],
    tokenizer: Any,
    more: str = "",
) -> Path:
    """Write ``report.md`` and its pictures to ``folder``; return the report's path.

    Where matplotlib is not installed, the report says so in the pictures' place.

    Parameters
    ----------
    greedy, sampled : sequence of Outcome
        The same prompts, at temperature 0 and at another.
    costs : mapping of str to mapping of int to float
        By way of drafting: seconds of a step by tree size.
    tokenizer
    more : str
        Goes to the report's end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        from examples.serving import pictures
    except ImportError as error:
        drawn = f"*(no pictures: {error}; `pip install matplotlib`)*"
    else:
        drawn = pictures.draw(folder, greedy, sampled, costs, tokenizer)
    plain = greedy[0].runs[PLAIN]
    report = folder / "report.md"
    report.write_text(
        f"""# Speculation on a real model

SmolLM2-135M-Instruct, fp32, one request at a time, on the backend \
`{hwcore.current_backend().info.name}` ({torch.get_num_threads()} threads, torch \
{torch.__version__}, {_machine()}).
{len(plain[0].tokens)} tokens a prompt, decoded to the last: the end-of-text token does not stop a \
run. {len(plain)} interleaved round(s) greedily, {len(sampled[0].runs[PLAIN])} at temperature \
{sampled[0].temperature}; medians.

Ways: *plain*{"".join(_WAYS[way] for way in greedy[0].drafted)}. Each chooses its trees' size by \
what they cost here and what was accepted so far; size 1 is a plain step.

**Greedy tokens identical to plain decoding: {_identical(greedy)}.** Sampled tokens are not the \
same tokens: they are distributed as plain sampling's, which `tests/examples` tests.

## Greedy

{_table(greedy, tokenizer.eos_token_id)}

## Temperature {sampled[0].temperature}

{_table(sampled, tokenizer.eos_token_id)}

*accept length*: mean tokens a step, steps without drafts included. *own words*: tokens before the \
first end-of-text; what follows it is no answer. *ratio*: decoding speed over plain decoding, \
median of the ratios of the *rounds*, which lie far apart where something else used the machine; \
*with prefill*: of the whole answer. *tree sizes*: nodes x steps, all rounds.

{drawn}

## Where it pays, and where not

{_where_it_pays(greedy)}
## What a tree costs

A whole step (draft, tree, forward, verify, commit), measured at the start; medians of interleaved \
rounds. A tree pays if it brings more tokens a step than its cost in plain steps: that is its \
break-even.

{_costs(costs)}
{more}""",
        encoding="utf-8",
    )
    return report


def _where_it_pays(outcomes: Sequence[Outcome]) -> str:
    lines = []
    for way in outcomes[0].drafted:
        winners = [f"{o.name} ({o.ratio(way):.2f}x)" for o in outcomes if o.ratio(way) >= PAYS]
        others = [
            f"{o.name} ({o.ratio(way):.2f}x, {_plain_share(o, way):.0%} of its steps plain)"
            for o in outcomes
            if o.ratio(way) < PAYS
        ]
        lines.append(
            f"- **{way}** pays (ratio at least {PAYS}): {', '.join(winners) or 'nowhere'}. "
            f"Does **not** pay: {', '.join(others) or 'none of these prompts'}.\n"
        )
    return "".join(lines)


def _plain_share(outcome: Outcome, way: str) -> float:
    sizes = sizes_used(outcome, way)
    return sizes[1] / sizes.total()


def _identical(outcomes: Sequence[Outcome]) -> str:
    wrong = [o.name for o in outcomes if o.first_difference() is not None]
    return f"NO, they differ on {', '.join(wrong)}" if wrong else "on all prompts, in every round"


def _machine() -> str:
    if not hasattr(os, "getloadavg"):
        return f"{os.cpu_count()} cores"
    return f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f} at the end"


def _table(outcomes: Sequence[Outcome], end_of_text: int) -> str:
    heads = ["prompt", "tokens", "own words", "way", "accept length", "tokens/s", "ratio"]
    heads += ["rounds", "with prefill", "tree sizes"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for o in outcomes:
        tokens = o.runs[PLAIN][0].tokens
        own = tokens.index(end_of_text) if end_of_text in tokens else len(tokens)
        first = f"{o.name} | {len(o.prompt)} | {own}"
        for way in o.runs:
            speed = f"{o.tokens_per_s(way):.1f}"
            if way == PLAIN:
                lines.append(f"| {first} | {way} | 1.00 | {speed} | | | | |")
                continue
            ratios = o.ratios(way)
            sizes = ", ".join(f"{n}x{times}" for n, times in sorted(sizes_used(o, way).items()))
            lines.append(
                f"| | | | {way} | {o.accept_length(way):.2f} | {speed} | **{o.ratio(way):.2f}** | "
                f"{min(ratios):.2f} to {max(ratios):.2f} | {o.ratio_with_prefill(way):.2f} | "
                f"{sizes} |"
            )
    return "\n".join(lines)


def _costs(costs: Mapping[str, Mapping[int, float]]) -> str:
    lines = ["| way | nodes | ms | break-even |", "|---|---|---|---|"]
    lines += [
        f"| {way} | {size} | {1e3 * seconds:.1f} | {seconds / by_size[1]:.2f} |"
        for way, by_size in costs.items()
        for size, seconds in by_size.items()
    ]
    return "\n".join(lines)
