"""One rank of a role: rank 0 sends requests, the other says what came. Run as a script."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import sys

import torch
from torch import distributed

import hwcore
from hwcore.diffusion.serving.ranks import Command, RankGroup


def tree(number, device):
    dtypes = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.uint16, torch.bool]
    values = torch.arange(number * 1000 + 5) % 7
    return {
        "number": number,
        "tensors": [values.to(dtype).to(device) for dtype in dtypes] + [None],
        "host": torch.tensor(number),
        "empty": torch.empty(0, 3, device=device),
        "steps": (1, 2.5, "three"),
    }


def said(tree):
    parts = [
        (str(it.dtype), list(it.shape), it.cpu().to(torch.float64).sum().item())
        for it in (*tree["tensors"][:-1], tree["host"], tree["empty"])
    ]
    return [tree["number"], tree["tensors"][-1], list(tree["steps"]), parts]


def lead(ranks, hw, options):
    for number in range(options["requests"]):
        if number == options.get("dies_at"):
            os._exit(7)
        made = tree(number, hw.device())
        ranks.send(Command.WAIT)
        ranks.send(Command.COMPUTE, made)
        failed = ranks.any_failed(failed=False)
        print(json.dumps([said(made), failed]), flush=True)
    ranks.send(Command.STOP)


def follow(ranks, hw, options):
    while True:
        command, got = ranks.receive()
        if command is Command.STOP:
            return
        if command is Command.COMPUTE:
            assert all(it.device.type == hw.info.device_type for it in got["tensors"][:-1])
            fails = got["number"] == options.get("fails_at")
            print(json.dumps([said(got), ranks.any_failed(fails)]), flush=True)


def main(rank, folder, backend, options):
    hw = hwcore.use(backend)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )
    try:
        ranks = RankGroup(distributed.group.WORLD, hw, timeout_s=options.get("timeout_s", 30))
        (follow if rank else lead)(ranks, hw, options)
    except hwcore.HwcoreError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        os._exit(3)  # not to wait for a peer that is gone
    with contextlib.suppress(RuntimeError):
        distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3], json.loads(sys.argv[4]))
