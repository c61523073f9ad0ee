"""Workers without compute, as threads and as processes of their own; and processes of routers."""

from __future__ import annotations

import contextlib
import itertools
import os
import pathlib
import secrets
import subprocess
import sys
import threading
import time

from hwcore.diffusion import pack_tensors, unpack_tensors
from hwcore.diffusion.engines import Token
from hwcore.diffusion.messages import Slot
from hwcore.diffusion.roles import RoleType
from hwcore.diffusion.router import Router, RouterClient, RouterConfig, WorkerLink
from hwcore.diffusion.router.todo import Compute, Drop, Restart, Transfer
from hwcore.errors import ClosedError, HwcoreError

FAST = {"heartbeat_s": 0.1, "dead_after_s": 0.6, "resend_after_s": 0.2}


class Memory:
    """A worker's pool, of which only the bookkeeping is real."""

    def __init__(self, size_bytes=1 << 20):
        self.engine_id, self.size_bytes = secrets.token_hex(8), size_bytes
        self.address = f"echo:{self.engine_id}"
        self.leases, self.lock = itertools.count(1), threading.Lock()
        self.slots, self.consumed, self.quarantined = {}, {}, {}

    def grant(self, size_bytes):
        with self.lock:
            held = (*self.slots.values(), *self.consumed.values(), *self.quarantined.values())
            if sum(slot.size_bytes for slot in held) + size_bytes > self.size_bytes:
                return None
            slot = Slot(next(self.leases), 0, size_bytes)
            self.slots[slot.lease] = slot
            return slot

    def consume(self, slot):
        with self.lock:
            if slot.lease not in self.slots:
                return False
            self.consumed[slot.lease] = self.slots.pop(slot.lease)
            return True

    def free(self, slot, writer):
        with self.lock:
            freed = self.slots.pop(slot.lease, None)
            if freed is not None and writer:
                self.quarantined[slot.lease] = freed

    def granted(self):
        with self.lock:
            return list(self.slots.values())

    def done(self, slot):
        with self.lock:
            del self.consumed[slot.lease]


class Echo:
    """A worker that adds its role to the text that it is given."""

    def __init__(self, address, token, role, name=None, capacity=16, sizes=(1 << 12,) * 16, **made):
        self.role, self.name = RoleType(role), name or f"{role}-0"
        self.memory = Memory(made.pop("pool_bytes", 1 << 20))
        self.link = WorkerLink(
            address,
            token,
            name=self.name,
            role=self.role,
            memory=self.memory,
            capacity=capacity,
            sizes=sizes,
        )
        self.outputs, self.computed, self.restarts = {}, 0, 0
        self.slow_s, self.hangs = made.pop("slow_s", 0.0), made.pop("hangs", False)
        assert not made
        self.thread = threading.Thread(target=self.run, name=f"echo-{self.name}", daemon=True)
        self.thread.start()

    def run(self):
        with contextlib.suppress(ClosedError):
            while True:
                todo = self.link.next(1.0)
                if todo is not None:
                    self.do(todo)

    def do(self, todo):
        if isinstance(todo, Compute):
            while self.hangs:
                time.sleep(0.01)
            try:
                self.compute(todo)
            except ClosedError:
                raise
            except HwcoreError as error:  # what it was given is at fault
                self.link.failed(todo.job, str(error), retryable=False)
        elif isinstance(todo, Transfer):
            self.link.pushed(todo.job, todo.turn, (self.outputs[todo.job],))
        elif isinstance(todo, Drop):
            self.outputs.pop(todo.job, None)
            self.link.dropped(todo.job)
        elif isinstance(todo, Restart):
            self.restarts += 1
            self.memory = Memory(self.memory.size_bytes)
            self.link.restarted(self.memory)

    def compute(self, todo):
        if self.slow_s:
            time.sleep(self.slow_s)
        self.computed += 1
        if todo.slot is None:
            text = unpack_tensors(todo.frames)["text"]
        else:
            text = todo.frames[0].decode()
            self.memory.done(todo.slot)
            self.link.memory_freed()
        text = self.output(text)
        if todo.last:
            self.link.finished(todo.job, pack_tensors(self.result(text)))
        else:
            self.outputs[todo.job] = text.encode()
            self.link.computed(todo.job, len(text))

    def output(self, text):
        return f"{text} {self.role}"

    def result(self, text):
        return {"text": text}

    def close(self):
        self.hangs = False
        self.link.close()
        self.thread.join(10)
        assert not self.thread.is_alive()


PIPELINE = "encoder denoiser decoder"


def answer_to(text):
    return f"{text} {PIPELINE}"


class Child:
    """A process that runs a router or a worker, to be killed."""

    def __init__(self, token, code, **variables):
        prelude = f"import sys; sys.path.insert(0, {str(pathlib.Path(__file__).parent)!r})\n"
        prelude += "from _peers import *\ntoken = Token.from_environment()\n"
        fd = token.descriptor()
        self.process = subprocess.Popen(
            [sys.executable, "-c", prelude + code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=[fd],
            env={**os.environ, "HWCORE_TOKEN_FD": str(fd), "OMP_NUM_THREADS": "1", **variables},
        )
        os.close(fd)

    def line(self):
        """Return the next line that it prints."""
        line = self.process.stdout.readline()
        assert line, f"the process ended: {self.process.wait(10)}"
        return line.strip()

    def kill(self):
        """Kill it, and wait for that."""
        self.process.kill()
        self.process.wait(10)

    def close(self):
        self.kill()
        self.process.stdin.close()
        self.process.stdout.close()


def router_process(token, ports=(0, 0)):
    """Start a router in another process; return it and its two addresses."""
    child = Child(
        token,
        f"router = Router(token, RouterConfig(**FAST), client_port={ports[0]}, "
        f"worker_port={ports[1]})\n"
        "print(router.client_address, router.worker_address, flush=True)\n"
        "router.serve_forever()\n",
    )
    return child, *child.line().split()


def port_of(address):
    return int(address.rpartition(":")[2])


def within(seconds, condition):
    """Say whether ``condition()`` comes true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


__all__ = [
    "FAST",
    "Child",
    "Echo",
    "Memory",
    "Router",
    "RouterClient",
    "RouterConfig",
    "Token",
    "answer_to",
    "port_of",
    "router_process",
    "within",
]
