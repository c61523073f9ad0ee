"""The course of a training run as pictures."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

if TYPE_CHECKING:
    from pathlib import Path


def draw(log: Path, picture: Path) -> None:
    """Draw loss and held-out agreement, as a run's log has them, over the tokens seen."""
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


def accept_lengths(evaluation: Path, picture: Path) -> None:
    """Draw the accept lengths of a run's exports over the tokens that they had seen.

    An export's folder ends with that number; other heads are left out.
    """
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    lines = [json.loads(line) for line in evaluation.read_text().splitlines()]
    of_all = [line for line in lines if line["prompts"] == "all"]
    points = [line for line in of_all if line["head"].rpartition("-")[2].isdigit()]
    points.sort(key=lambda line: int(line["head"].rpartition("-")[2]))
    seen = [int(line["head"].rpartition("-")[2]) / 1e6 for line in points]
    for index, way in enumerate(("chain", "tree")):
        lengths = [line[way]["accept_length"] for line in points]
        low, high = ([line[way]["interval"][end] for line in points] for end in (0, 1))
        axes.plot(seen, lengths, color=f"C{index}", marker="o", label=way)
        axes.fill_between(seen, low, high, color=f"C{index}", alpha=0.2)
    axes.set_xlabel("answer tokens seen, millions")
    axes.set_ylabel("accept length, bonus included")
    axes.legend()
    figure.savefig(picture, dpi=110)
