"""scikit-learn's handwritten digits, in two halves: the judge's, and the networks'."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from examples.disaggregated_diffusion.prompts import Style

SPLIT_SEED = 7
_LEVELS = 16  # of ink in a pixel


@dataclass(frozen=True)
class Digits:
    """Images and what they show.

    Attributes
    ----------
    images : Tensor, float32, [count, 1, 8, 8]
        In [-1, 1]; -1 is paper.
    labels : Tensor, int64, [count]
    """

    images: torch.Tensor
    labels: torch.Tensor


def halves() -> tuple[Digits, Digits]:
    """Return the half that the judge learns from, and the half that the networks learn from."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) * (2 / _LEVELS) - 1
    labels = torch.tensor(found.target, dtype=torch.int64)
    places = train_test_split(
        np.arange(len(labels)), test_size=0.5, random_state=SPLIT_SEED, stratify=found.target
    )
    judged, learnt = (torch.from_numpy(half) for half in places)
    return Digits(images[judged], labels[judged]), Digits(images[learnt], labels[learnt])


def ink(images: torch.Tensor) -> torch.Tensor:
    """Return the mean ink of images ``[count, 1, 8, 8]``, in [0, 1]: ``[count]``."""
    return (images.mean((1, 2, 3)) + 1) / 2


def styles(digits: Digits) -> list[Style]:
    """Return a style for each image: the thirds of its kind with least and with most ink."""
    amounts, found = ink(digits.images), [Style.PLAIN] * len(digits.labels)
    for digit in range(10):
        places = (digits.labels == digit).nonzero().flatten()
        order = places[amounts[places].argsort()].tolist()
        third = len(order) // 3
        for place in order[:third]:
            found[place] = Style.THIN
        for place in order[-third:]:
            found[place] = Style.BOLD
    return found
