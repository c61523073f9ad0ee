"""One rank of a denoiser that computes on two. Run as a script."""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
import sys

import _roles
from torch import distributed

import hwcore
from hwcore.diffusion.engines import Token
from hwcore.diffusion.roles import RoleType
from hwcore.diffusion.serving.config import WorkerConfig


class Denoiser(_roles.Role):
    """Each rank computes all; the ranks compare what they have, as a layer's collective would."""

    def __init__(self, rank):
        super().__init__(RoleType.DENOISER)
        self.rank = rank

    def disagg_compute(self, request):
        if request.extra.get("dies") and self.rank:
            os._exit(7)
        if request.extra.get("fails on rank") == self.rank:
            raise ValueError(self.rank)
        request = super().disagg_compute(request)
        if request.extra.get("fails on rank") is None:
            total = request.fields["latents"].double().sum().cpu()
            mine = total.clone()
            distributed.all_reduce(total)
            assert total == 2 * mine
        return request


def main(rank, folder, backend, router):
    hw = hwcore.use(backend)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )
    role = Denoiser(rank)
    config = WorkerConfig(role=RoleType.DENOISER, router=router, name="denoiser-0")
    token = Token.from_environment()
    role._init_disagg_state(config, token, backend=hw, group=distributed.group.WORLD)
    signal.signal(signal.SIGTERM, lambda *_: role.stop_disagg())
    try:
        role._disagg_prefetch_event_loop()
    except hwcore.HwcoreError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        os._exit(3)  # not to wait for a peer that is gone
    with contextlib.suppress(RuntimeError):
        distributed.destroy_process_group()
    print("ended", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
