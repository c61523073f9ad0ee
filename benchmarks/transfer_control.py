"""What a request costs on its way: router, three roles without compute and a client, in processes.

Nothing is computed and no tensor is moved: what is left is messages, encrypted, over loopback.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import statistics
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import torch

from hwcore.cli.measurement import NotMeasuredError, Row
from hwcore.diffusion import pack_tensors
from hwcore.diffusion.engines import Token
from hwcore.diffusion.messages import Slot
from hwcore.diffusion.roles import PIPELINE, RoleType
from hwcore.diffusion.router.todo import Compute, Drop, Transfer
from hwcore.errors import CapabilityError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hwcore.diffusion.router import RouterClient

CONCURRENCY = 64
UPSTREAM = "upstream's server and mixin as threads, on another run: 3.5 ms, 255/s"


def run(quick: bool = False) -> list[Row]:
    """Return the rows of this subject."""
    torch.set_num_threads(1)
    try:
        import hwcore.diffusion.router.libraries  # noqa: F401
    except CapabilityError as error:
        raise NotMeasuredError(str(error)) from error
    rounds, count = (3, 200) if quick else (7, 1000)
    with _launched() as client:
        _seconds_each(client, 100)  # warm
        times = [_seconds_each(client, count // 5) for _ in range(rounds)]
        rates = [_rate(client, 4 * count) for _ in range(rounds)]
    p50s = [statistics.median(found) * 1e3 for found in times]
    p99s = [statistics.quantiles(found, n=100)[-1] * 1e3 for found in times]
    detail = f"best round's p50 {min(p50s):.2f} ms, median p99 {statistics.median(p99s):.2f} ms"
    spread = f"{min(rates):.0f} to {max(rates):.0f}/s over {rounds} rounds; {UPSTREAM}"
    what = f"requests a second, {CONCURRENCY} at a time"
    return [
        Row("p50 of a request, one at a time", statistics.median(p50s), "ms", 2.0, True, detail),
        Row(what, statistics.median(rates), "/s", 1000.0, False, spread),
    ]


def _seconds_each(client: RouterClient, count: int) -> list[float]:
    times = []
    for _ in range(count):
        start = time.perf_counter()
        client.submit(secrets.token_hex(8), {"text": "x"}, deadline_s=30).result()
        times.append(time.perf_counter() - start)
    return times


def _rate(client: RouterClient, count: int) -> float:
    room = threading.Semaphore(CONCURRENCY)
    start = time.perf_counter()
    asked = []
    for _ in range(count):
        room.acquire()
        pending = client.submit(secrets.token_hex(8), {"text": "x"}, deadline_s=30)
        pending.future.add_done_callback(lambda _: room.release())
        asked.append(pending)
    for pending in asked:
        pending.result()
    return count / (time.perf_counter() - start)


# --- Processes ------------------------------------------------------------------------------------


@contextlib.contextmanager
def _launched() -> Iterator[RouterClient]:
    """Start a router and a worker of each role, and connect."""
    from hwcore.diffusion.router import RouterClient

    token = Token.create()
    with contextlib.ExitStack() as stack:
        clients, workers = _start(stack, token, "router").split()
        for role in PIPELINE:
            _start(stack, token, role, workers)
        yield stack.enter_context(RouterClient(clients, token))


def _start(stack: contextlib.ExitStack, token: Token, *arguments: str) -> str:
    """Start this file as another process; return its first line."""
    fd = token.descriptor()
    process = subprocess.Popen(
        [sys.executable, __file__, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        pass_fds=[fd],
        env={**os.environ, "HWCORE_TOKEN_FD": str(fd), "OMP_NUM_THREADS": "1"},
    )
    os.close(fd)
    stack.enter_context(process)
    stack.callback(process.kill)
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        message = f"the process for {arguments} ended: {process.wait(10)}"
        raise RuntimeError(message)
    return line


def serve() -> None:
    """Be the router."""
    from hwcore.diffusion.router import Router

    router = Router(Token.from_environment())
    print(router.client_address, router.worker_address, flush=True)
    router.serve_forever()


class NoMemory:
    """A pool of which only the bookkeeping is real."""

    def __init__(self) -> None:
        self.engine_id = secrets.token_hex(8)
        self.address, self.size_bytes = f"none:{self.engine_id}", 1 << 30
        self._leases, self._slots = itertools.count(1), dict[int, Slot]()

    def grant(self, size_bytes: int) -> Slot | None:
        """Return a new slot."""
        slot = Slot(next(self._leases), 0, size_bytes)
        self._slots[slot.lease] = slot
        return slot

    def consume(self, slot: Slot) -> bool:
        """Take a slot for a job."""
        return self._slots.pop(slot.lease, None) is not None

    def free(self, slot: Slot, _writer: str) -> None:
        """Give a slot back."""
        self._slots.pop(slot.lease, None)

    def granted(self) -> list[Slot]:
        """Return the free slots."""
        return list(self._slots.values())


def work(role: RoleType, address: str) -> None:
    """Be a worker that computes nothing."""
    from hwcore.diffusion.router import WorkerLink

    result = [bytes(frame) for frame in pack_tensors({"text": "done"})]
    link = WorkerLink(
        address,
        Token.from_environment(),
        name=f"{role}-0",
        role=role,
        memory=NoMemory(),
        capacity=CONCURRENCY,
        sizes=[4096] * CONCURRENCY,
    )
    if not link.wait_registered(30):
        message = f"{role} was not registered"
        raise RuntimeError(message)
    print("ready", flush=True)
    while True:
        todo = link.next(None)
        if isinstance(todo, Compute):
            if todo.last:
                link.finished(todo.job, result)
            else:
                link.computed(todo.job, 100)
        elif isinstance(todo, Transfer):
            link.pushed(todo.job, todo.turn, [b"manifest"])
        elif isinstance(todo, Drop):
            link.dropped(todo.job)
        else:
            message = f"nothing is lost here, but {todo} is to be done"
            raise RuntimeError(message)  # noqa: TRY004 - its type is not at fault


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "router":
        serve()
    else:
        work(RoleType(sys.argv[1]), sys.argv[2])
