"""Probabilities from logits, and tokens from probabilities: what verification samples with."""

from hwcore.kernels.distribution import draw, probabilities

__all__ = ["draw", "probabilities"]
