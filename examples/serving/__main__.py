"""The demo: one text at a time, plainly and speculatively; then many requests at once; a report."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

import hwcore
from examples.eagle_head.head import EagleHead
from examples.serving import report, serve_report, sizing
from examples.serving.compare import PLAIN, compare, top_two
from examples.serving.drafters import calibrated
from examples.serving.llama import Llama
from examples.serving.model import Model
from examples.serving.prompts import PROMPTS, SERVED, as_chat
from examples.serving.serve import num_runs, serve
from examples.serving.weights import load

if TYPE_CHECKING:
    from examples.serving.compare import Outcome
    from examples.serving.serve import Served

HEAD = Path(__file__).parents[1] / "eagle_head" / "trained"
TEMPERATURE = 0.8

_CONTEXT = 256  # tokens in the cache while costs are measured: prompt and half an answer


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("demo"), show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--tokens", type=click.IntRange(2), default=128, show_default=True)
@click.option("--short", is_flag=True, help="One prompt, three requests, few tokens, one round.")
@click.option(
    "--head",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of an EAGLE head.  [default: the one in examples/eagle_head, if it is there]",
)
@click.option(
    "--same-as",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="tokens.json of a run on another backend: the tokens must be those.",
)
def main(
    out: Path, rounds: int, tokens: int, short: bool, head: Path | None, same_as: Path | None
) -> None:
    """Decode real prompts in every way there is; write a report and the tokens.

    Exit status: 0 the tokens are the same in all ways, and those of the other backend; 1 they are
    not.
    """
    console = Console(highlight=False)
    logging.basicConfig(stream=sys.stdout, format="%(message)s")  # what hwcore has to say: as well
    chosen, rounds, tokens = (PROMPTS[:1], 1, 48) if short else (PROMPTS, rounds, tokens)
    asked, answer, bucket = (SERVED[:3], 10, 2) if short else (SERVED, 24, 8)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("Starting", total=None)
        config, weights, tokenizer = load(lambda stage: progress.update(task, description=stage))
        prompts = {p.name: tokenizer(as_chat(p.text)).input_ids for p in (*chosen, *asked)}
        longest = max(map(len, prompts.values())) + tokens
        # A step may overshoot by a tree; costs are measured on the same cache.
        slots = max(longest, _CONTEXT) + 2 * max(sizing.SIZES)
        llama = Llama(config, weights, hwcore.current_backend().device(), slots)
        eagle = None
        if head is None and not HEAD.is_dir():
            progress.console.print(f"[yellow]No EAGLE head in {HEAD}: none is used[/]")
        else:
            eagle = EagleHead.load(head or HEAD, llama.embedding, slots)
        model = Model(llama, slots, taps=eagle.shape.taps if eagle else ())
        progress.update(task, description="Weights loaded", total=1, completed=1)

        passes = 3 if short else 7
        task = progress.add_task("Measuring what trees cost", total=3)
        drafters, costs = calibrated(model, eagle, _CONTEXT, passes, lambda: progress.advance(task))
        progress.update(task, completed=3)

        task = progress.add_task("Decoding in every way", total=(rounds + 1) * len(chosen))
        texts = {prompt.name: prompts[prompt.name] for prompt in chosen}
        decoding = task

        def tick() -> None:
            progress.advance(decoding)

        outcomes = compare(model, texts, tokens, drafters, rounds, tick=tick)
        sampled = compare(model, texts, tokens, drafters, 1, TEMPERATURE, tick)

        task = progress.add_task("Serving many at once", total=num_runs(len(asked), rounds, eagle))
        requests = {prompt.name: prompts[prompt.name] for prompt in asked}
        served = serve(
            model,
            requests,
            answer,
            head=eagle,
            end=tokenizer.eos_token_id,
            bucket=bucket,
            rounds=rounds,
            tick=lambda: progress.advance(task),
        )
        more = serve_report.section(served)
        path = report.write(out, outcomes, sampled, costs, tokenizer, more)

    text = tokenizer.decode(outcomes[0].runs[PLAIN][-1].tokens, skip_special_tokens=True)
    console.print(Panel(Text(text), title=f"{outcomes[0].name}: the answer"))
    for title, table in (("Greedy", outcomes), (f"Temperature {TEMPERATURE}", sampled)):
        console.print(_summary(title, table))
    console.print(_served(served))
    console.print(f"Report: {path}")
    wrong = [outcome for outcome in outcomes if outcome.first_difference() is not None]
    for outcome in wrong:
        place = outcome.first_difference()
        best = top_two(model, outcome.prompt, outcome.runs[PLAIN][0].tokens[:place])
        shown = ", ".join(f"{tokenizer.decode([token])!r} {logit:.6f}" for token, logit in best)
        console.print(f"[bold red]{outcome.name}: tokens differ at {place}[/]; logits: {shown}")
    decoded = {outcome.name: outcome.runs[PLAIN][0].tokens for outcome in outcomes}
    decoded |= served.alone["plain"]
    (out / "tokens.json").write_text(json.dumps(decoded))
    elsewhere = decoded if same_as is None else json.loads(same_as.read_text())
    if same_as is not None:
        verdict = "the same tokens as" if decoded == elsewhere else "[bold red]OTHER TOKENS than[/]"
        console.print(f"{hwcore.current_backend().info.name}: {verdict} {same_as}")
    raise SystemExit(1 if wrong or not served.sound or decoded != elsewhere else 0)


def _summary(title: str, outcomes: list[Outcome]) -> Table:
    table = Table("prompt", "way", "accept length", "tok/s", "ratio", "tokens", title=title)
    for o in outcomes:
        for way in o.runs:
            speed = f"{o.tokens_per_s(way):.1f}"
            if way == PLAIN:
                table.add_row(o.name, way, "", speed, "", "")
                continue
            style = "green" if o.ratio(way) >= report.PAYS else "yellow"
            same = "identical" if o.first_difference() is None else "[bold red]DIFFERENT[/]"
            same = "" if o.temperature else same
            ratio = f"[{style}]{o.ratio(way):.2f}x[/]"
            table.add_row("", way, f"{o.accept_length(way):.2f}", speed, ratio, same)
    return table


def _served(served: Served) -> Table:
    same = "those of each alone" if served.sound else "[bold red]DIFFERENT[/]"
    title = f"{len(served.alone['plain'])} requests over time; tokens: {same}"
    shown = ["steps", "steps/s", "tokens/s", "host gap, µs a step"]
    table = Table("decoding", "overlap", *shown, title=title)
    for row in serve_report.rows(served):
        cells = dict(zip(serve_report.COLUMNS, row[2:], strict=True))
        table.add_row(*row[:2], *(cells[name] for name in shown))
    return table


if __name__ == "__main__":
    main()
