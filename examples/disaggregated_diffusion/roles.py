"""The three roles as processes serve them: what ``hwcore`` asks of an engine, and no more."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from examples.disaggregated_diffusion import model
from examples.disaggregated_diffusion.networks import Denoiser, LatentDecoder, TextEncoder
from examples.disaggregated_diffusion.requests import Request
from hwcore.diffusion.roles import RoleType
from hwcore.diffusion.serving.scheduler import SchedulerDisaggMixin

if TYPE_CHECKING:
    from hwcore.diffusion.serving.request import DiffusionRequest
    from hwcore.diffusion.serving.spans import Span

_NETWORKS: dict[RoleType, Any] = {
    RoleType.ENCODER: TextEncoder,
    RoleType.DENOISER: Denoiser,
    RoleType.DECODER: LatentDecoder,
}


class Flow:
    """The noise schedule of a rectified flow: the times that it is told."""

    timesteps: torch.Tensor | None = None

    def set_timesteps(self, timesteps: torch.Tensor, device: torch.device) -> None:
        """Take times from 1 to 0."""
        self.timesteps = timesteps.to(device)


class DigitsRole(SchedulerDisaggMixin):
    """One of the roles, with its own weights and no other's.

    Parameters
    ----------
    role : RoleType
    spans : str
        A folder that takes notes of what was done when; empty: none.
    """

    disagg_enums = model.ENUMS

    def __init__(self, role: str, spans: str = "") -> None:
        torch.set_num_threads(1)  # more would sum in another order
        self.role = RoleType(role)
        self._network = model.load(_NETWORKS[self.role])
        self._spans = Path(spans) if spans else None
        if self.role is RoleType.DENOISER:
            self.disagg_schedule = Flow()

    def disagg_compute(self, request: DiffusionRequest) -> DiffusionRequest:
        """Do the role's part."""
        if self.role is RoleType.ENCODER:
            conditions = model.encode(self._network, Request.from_tree(request.fields))
            request.seeds, request.timesteps = conditions.pop("seeds"), conditions.pop("timesteps")
            request.extra, request.fields = conditions.pop("extra"), conditions
        elif self.role is RoleType.DENOISER:
            conditions = {
                **request.fields,
                "seeds": request.seeds,
                "timesteps": request.timesteps,
                "extra": request.extra,
            }
            latents = model.denoise(self._network, conditions, request.generators[0])
            request.fields, request.extra, request.timesteps = {"latents": latents}, {}, None
        else:
            request.fields = {"images": model.decode(self._network, request.fields["latents"])}
        return request

    def disagg_span(self, span: Span) -> None:
        """Add a line to this worker's notes."""
        if self._spans is None:
            return
        words = {
            "request_id": span.request_id,
            "role": str(self.role),
            "kind": span.kind,
            "start_s": span.started,
            "end_s": span.ended,
            "worker": span.worker,
        }
        with open(self._spans / f"{span.worker}-{os.getpid()}.jsonl", "a") as file:
            file.write(json.dumps(words) + "\n")


def make(role: str, spans: str = "") -> DigitsRole:
    """Return a role; what a ``RoleSpec`` names."""
    return DigitsRole(role, spans)
