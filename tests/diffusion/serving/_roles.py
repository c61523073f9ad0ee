"""A pipeline of three roles without a model: what they compute can be told beforehand."""

from __future__ import annotations

import enum
import os
import signal
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

    def __init__(self, role, seconds=0.0, plan=""):
        self.role, self.seconds = RoleType(role), seconds
        if self.role is RoleType.DENOISER:
            self.disagg_schedule = Schedule()
        if plan:
            follow(Path(plan))

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
            name: value.to(device) if isinstance(value, torch.Tensor) else value
            for name, value in request.fields.items()
        }
        return request


def make(**options):
    """The factory of a RoleSpec."""
    return Role(**options)


def sleep():
    """A factory that takes too long."""
    time.sleep(600)


# --- Dying at a point of the protocol -------------------------------------------------------------


def follow(plan):
    """Have this process kill itself where the file `plan` says: once, for it takes the file away.

    The file holds a point, ``module:Class.method`` with ``<`` before the call or ``>`` after it.
    """
    import importlib

    def watched(point, function):
        def call(*arguments, **options):
            die_at(plan, f"<{point}")
            result = function(*arguments, **options)
            die_at(plan, f">{point}")
            return result

        return call

    for point in POINTS:
        module, _, path = point.partition(":")
        owner_name, _, method = path.partition(".")
        owner = getattr(importlib.import_module(module), owner_name)
        setattr(owner, method, watched(point, getattr(owner, method)))


def die_at(plan, point):
    """Kill this process, if it is the one that the plan is for and the point has come."""
    try:
        told = plan.read_text()
    except OSError:
        return
    if told == point:
        plan.unlink()
        os.kill(os.getpid(), signal.SIGKILL)


WORKER = "hwcore.diffusion.serving.worker:RoleWorker."
CORE = "hwcore.diffusion.router.worker_core:WorkerCore."
MANAGER = "hwcore.diffusion.transfer:DiffusionTransferManager."
POINTS = (
    *(WORKER + name for name in ("_take", "next", "finish", "_push", "_drop")),
    *(CORE + name for name in ("_work", "_push", "_forget", "computed", "pushed", "dropped")),
    *(MANAGER + name for name in ("grant", "load_tensors_async", "send_tensors", "finish")),
)
