"""A pipeline of three roles without a model: what they compute can be told beforehand."""

from __future__ import annotations

import enum
import json
import os
import threading
import time
from pathlib import Path

import torch

from hwcore.diffusion import EnumRegistry
from hwcore.diffusion.roles import RoleType
from hwcore.diffusion.serving.request import DiffusionRequest
from hwcore.diffusion.serving.scheduler import SchedulerDisaggMixin

ENUMS = EnumRegistry()


@ENUMS.register
class Kind(enum.Enum):
    EULER = "euler"
    HEUN = "heun"


class Schedule:
    """A noise schedule, as those of diffusers."""

    timesteps = None

    def set_timesteps(self, num_inference_steps, device=None):
        self.timesteps = torch.linspace(1, 0, num_inference_steps + 1, device=device)[:-1]


def encode(request):
    number, size = request.fields["number"], request.fields["size"]
    embeds = torch.arange(size, dtype=torch.float32) % 13 + number
    request.fields = {
        "embeds": [embeds, None],
        "kind": Kind.HEUN if number % 2 else Kind.EULER,
        "guidance": number / 4,
    }
    return request


def denoise(request):
    (embeds, nothing), kind = request.fields["embeds"], request.fields["kind"]
    assert nothing is None
    latents = torch.zeros(embeds.shape)
    for step in request.timesteps.cpu():
        noise = torch.randn(embeds.shape, generator=request.generators[0])
        latents = latents + float(step) * (noise + request.fields["guidance"] * embeds.cpu())
    request.fields = {"latents": latents, "kind": kind}
    return request


def decode(request):
    doubled = request.fields["latents"].cpu() * (2 if request.fields["kind"] is Kind.HEUN else 1)
    request.fields = {"image": doubled, "after": request.extra.get("after")}
    return request


COMPUTE = {RoleType.ENCODER: encode, RoleType.DENOISER: denoise, RoleType.DECODER: decode}


def ask(number, size=16, **extra):
    """What a client sends."""
    fields = {"number": number, "size": size}
    return DiffusionRequest(
        f"request {number}", fields, [number], num_inference_steps=3, extra=extra
    )


def expected(number, size=16, **extra):
    """What it gets, computed here."""
    request = ask(number, size, **extra)
    request.restore_generators()
    schedule = Schedule()
    schedule.set_timesteps(3)
    request.timesteps = schedule.timesteps
    return decode(denoise(encode(request))).fields


def same(got, number, size=16):
    return torch.equal(got["image"], expected(number, size)["image"])


class Role(SchedulerDisaggMixin):
    """One of the three."""

    disagg_enums = ENUMS

    def __init__(self, role, seconds=0.0, plan="", accounts=""):
        self.role, self.seconds = RoleType(role), seconds
        if self.role is RoleType.DENOISER:
            self.disagg_schedule = Schedule()
        if plan:
            import _points  # of tests/services

            _points.follow(Path(plan), str(self.role))
        if accounts:
            threading.Thread(target=self.keep_accounts, args=(accounts,), daemon=True).start()

    def keep_accounts(self, folder):
        """Write down what this process holds, again and again."""
        while True:
            time.sleep(0.05)
            worker = self._disagg_worker if hasattr(self, "_disagg_worker") else None
            if worker is None:
                continue
            stats = worker._manager.stats()
            pool = stats.pool
            held = {
                "jobs": len(worker._jobs),
                "staged": stats.staged,
                "running": stats.running,
                "consumed": stats.consumed,
                "leases that no slot has": pool.live_leases - stats.granted,
                "freed but in use": pool.freed_leases,
            }
            path = Path(folder, worker.config.name)
            path.with_suffix(".new").write_text(json.dumps({"pid": os.getpid(), "held": held}))
            path.with_suffix(".new").rename(path)

    def disagg_compute(self, request):
        if self.seconds:
            time.sleep(self.seconds)
        failing = request.extra.get("fails", {}).get(str(self.role))
        if failing:
            kind = {"value": ValueError, "run": RuntimeError, "memory": MemoryError}[failing]
            raise kind(self.role)
        request = COMPUTE[self.role](request)
        device = self._disagg_hw.device()
        request.fields = {
            # By the device's own work, so that it is queued.
            name: value.to(device) * 1 if isinstance(value, torch.Tensor) else value
            for name, value in request.fields.items()
        }
        return request


def make(**options):
    """The factory of a RoleSpec."""
    return Role(**options)


def sleep():
    """A factory that takes too long."""
    time.sleep(600)


def until(condition, timeout_s=30.0):
    """Wait for a condition; say whether it came."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
