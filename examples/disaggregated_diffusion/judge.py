"""Who says what a sample shows: a support vector machine that never saw the networks' images."""

from __future__ import annotations

import torch

from examples.disaggregated_diffusion.digits import halves


class Judge:
    """A classifier of images, trained as it is made, in well under a second.

    Attributes
    ----------
    held_out : Digits
        What the networks learn from; the judge does not.
    """

    def __init__(self) -> None:
        from sklearn.svm import SVC

        own, self.held_out = halves()
        self._machine = SVC(gamma=0.256, C=10.0)
        self._machine.fit(_rows(own.images), own.labels.numpy())

    def labels(self, images: torch.Tensor) -> torch.Tensor:
        """Return the digit that each of ``images [count, 1, 8, 8]``, in [-1, 1], shows: int64."""
        return torch.from_numpy(self._machine.predict(_rows(images))).long()

    def share_right(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        """Return the share of images that show the digits ``labels [count]``."""
        return float((self.labels(images) == labels).double().mean())

    def accuracy(self) -> float:
        """Return the share of held-out images that it names as people did."""
        return self.share_right(self.held_out.images, self.held_out.labels)


def _rows(images: torch.Tensor) -> object:
    return ((images.cpu() + 1) / 2).flatten(1).numpy()
