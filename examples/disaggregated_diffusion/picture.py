"""A sheet of samples: a row for a request, with its prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch

    from examples.disaggregated_diffusion.requests import Request

_COLUMNS = 12


def draw(path: Path, results: Sequence[tuple[Request, torch.Tensor]], rows: int = 16) -> None:
    """Draw the first samples of the first requests that have a row of them.

    Parameters
    ----------
    path : Path
        Of the PNG.
    results : sequence of (Request, Tensor)
        Images are float32, [num_samples, 1, 8, 8], in [-1, 1].
    rows : int
        Requests, at most. Those with fewest samples are left out first.
    """
    from matplotlib.figure import Figure

    largest = sorted(results, key=lambda one: -len(one[1]))[:rows]
    shown = [one for one in results if any(one is other for other in largest)]
    figure = Figure(figsize=(_COLUMNS * 0.55 + 4.5, len(shown) * 0.62), layout="constrained")
    grid = figure.subplots(
        len(shown), _COLUMNS + 1, squeeze=False, width_ratios=(7, *[1] * _COLUMNS)
    )
    for (request, images), (caption, *cells) in zip(shown, grid, strict=True):
        words = " / ".join(request.prompts)
        samples = f"{request.num_samples} sample" + "s" * (request.num_samples > 1)
        about = f"{samples}, guidance {request.guidance:g}, "
        caption.text(
            1,
            0.5,
            f"{words}\n{about}{request.scheduler.value}",
            ha="right",
            va="center",
            fontsize=8,
            transform=caption.transAxes,
        )
        for cell, image in zip(cells, images.cpu(), strict=False):
            cell.imshow(-image[0].numpy(), cmap="gray", vmin=-1, vmax=1)
        for axes in (caption, *cells):
            axes.set_axis_off()
    figure.savefig(path, dpi=100)
