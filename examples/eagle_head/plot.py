"""The course of a training run as a picture."""

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
        axes.legend(fontsize="small")
    loss.set_title("Loss on training data")
    agreement.set_title("Agreement with the target, held-out answers")
    figure.savefig(picture, dpi=110)
