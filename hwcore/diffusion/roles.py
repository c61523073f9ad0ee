"""The parts that a diffusion pipeline is served in."""

from __future__ import annotations

import enum

__all__ = ["PIPELINE", "RoleType"]


class RoleType(enum.StrEnum):
    """What a process does for a request."""

    MONOLITHIC = "monolithic"
    """All of it."""

    IMAGE_ENCODER = "image_encoder"
    """Makes conditions of an image; a request without one skips it."""

    ENCODER = "encoder"
    """Makes conditions of a prompt."""

    DENOISER = "denoiser"
    """Makes latents of noise and conditions."""

    DECODER = "decoder"
    """Makes pixels of latents."""

    SERVER = "server"
    """Takes requests and sends them through the others; it computes nothing."""


PIPELINE = (RoleType.ENCODER, RoleType.DENOISER, RoleType.DECODER)
"""The roles that a request passes, in order, where nothing else is said."""
