"""Points of the protocol at which a process can be made to kill or to stop itself.

A plan is a file with one line: what, who, and where, such as ``SIGKILL encoder >WORKER._push``:
after that call (``<``: before it). Whoever comes to its point takes the file away first, so that it
happens once.
"""

from __future__ import annotations

import importlib
import os
import signal

OWNERS = {
    "WORKER": "hwcore.diffusion.serving.worker:RoleWorker",
    "MANAGER": "hwcore.diffusion.transfer:DiffusionTransferManager",
    "MIND": "hwcore.diffusion.router.worker_core:WorkerCore",
    "ROUTER": "hwcore.diffusion.router.core:RouterCore",
    "JOBS": "hwcore.diffusion.router.jobs:Jobs",
    "SOCKETS": "hwcore.diffusion.router.server:Router",
}

SENDS = (
    *(">MIND._work", "<WORKER._take", ">WORKER._take", ">WORKER.next", "<WORKER.finish"),
    *(">MIND.computed", "<WORKER._push", ">MANAGER.send_tensors", ">MIND.pushed", ">MIND._forget"),
)
RECEIVES = (
    *(">MANAGER.grant", ">MANAGER.consume", "<MANAGER.load_tensors_async"),
    *(">MANAGER.load_tensors_async", ">MANAGER.finish"),
)
POINTS = {
    "encoder": SENDS,
    "denoiser": (*RECEIVES, *SENDS),
    "decoder": (*RECEIVES, "<WORKER.finish", ">MIND.finished", ">MIND._forget", ">MIND.dropped"),
    "router": (
        *("<ROUTER._submit", ">ROUTER._submit", ">JOBS._start", "<JOBS._computed"),
        *(">JOBS._computed", ">JOBS._push", "<JOBS._pushed", ">JOBS._pushed"),
        *("<JOBS._finished", "<ROUTER._answer", ">ROUTER._answer", ">SOCKETS._send"),
    ),
}


def follow(plan, who):
    """Have this process, which is `who`, do as the plan says."""

    def watched(point, function):
        def call(*arguments, **options):
            act(plan, f"{who} <{point}")
            result = function(*arguments, **options)
            act(plan, f"{who} >{point}")
            return result

        return call

    for point in {point[1:] for point in POINTS[who]}:
        name, _, method = point.partition(".")
        module, _, kind = OWNERS[name].partition(":")
        owner = getattr(importlib.import_module(module), kind)
        setattr(owner, method, watched(point, getattr(owner, method)))


def act(plan, here):
    """Send this process the signal that the plan says, if it is for here."""
    try:
        what, _, where = plan.read_text().partition(" ")
        if where != here:
            return
        plan.unlink()
    except OSError:
        return
    os.kill(os.getpid(), getattr(signal, what))
