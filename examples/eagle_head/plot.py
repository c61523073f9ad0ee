"""The course of a training run as pictures.

matplotlib is imported where it draws: what is tested on a device's machine does without.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def draw(log: Path, picture: Path) -> None:
    """Draw loss and held-out agreement, as a run's log has them, over the tokens seen."""
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in log.read_text().splitlines()]
    figure = Figure(figsize=(10, 4), layout="constrained")
    loss, agreement = figure.subplots(1, 2)
    for axes, name in ((loss, "loss"), (agreement, "marginal"), (agreement, "joint")):
        of_name = [line for line in lines if name in line]
        steps = max((len(line[name]) for line in of_name), default=0)
        for step in range(steps):
            there = [line for line in of_name if len(line[name]) > step]
            axes.plot(
                [line["seen"] / 1e6 for line in there],
                [line[name][step] for line in there],
                color=f"C{step}",
                linestyle="--" if name == "joint" else "-",
                label=f"{name}, step {step + 1}",
            )
        axes.set_xlabel("answer tokens seen, millions")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    loss.set_title("Loss on training data")
    agreement.set_title("Agreement with the target, held-out answers")
    figure.savefig(picture, dpi=110)


def accept_lengths(evaluation: Path, picture: Path, tokens: int, every: int) -> None:
    """Draw the accept lengths of a run's exports over the tokens that they had seen.

    An export's folder ends with that number; other heads are left out, and what was evaluated with
    other ``tokens`` and ``every``, or for speed. Of several lines of a head the last counts.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    lines = [json.loads(line) for line in evaluation.read_text().splitlines()]
    asked = {"prompts": "all", "tokens": tokens, "every": every}
    fixed = [line for line in lines if asked.items() <= line.items() and "chain" in line]
    by_head = {line["head"]: line for line in fixed}
    of_exports = [name for name in by_head if name.rpartition("-")[2].isdigit()]
    of_exports.sort(key=lambda name: int(name.rpartition("-")[2]))
    points = [by_head[name] for name in of_exports]
    seen = [int(name.rpartition("-")[2]) / 1e6 for name in of_exports]
    for index, way in enumerate(("chain", "tree")):
        lengths = [line[way]["accept_length"] for line in points]
        low, high = ([line[way]["interval"][end] for line in points] for end in (0, 1))
        axes.plot(seen, lengths, color=f"C{index}", marker="o", label=way)
        axes.fill_between(seen, low, high, color=f"C{index}", alpha=0.2)
    axes.set_xlabel("answer tokens seen, millions")
    axes.set_ylabel("accept length, bonus included")
    axes.legend()
    figure.savefig(picture, dpi=110)
