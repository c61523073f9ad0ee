"""Clients, a router and workers in one process and in made-up time, with a network that is none.

Messages are lost, come twice, late and in another order; processes are killed, stopped and started
again. A seed makes it all happen again.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import random

from hwcore.diffusion.messages import (
    FromClient,
    FromRouter,
    FromWorker,
    Refused,
    Result,
    Slot,
    Submit,
    ToClient,
    decode,
    encode,
)
from hwcore.diffusion.roles import PIPELINE
from hwcore.diffusion.router.config import RouterConfig
from hwcore.diffusion.router.core import RouterCore
from hwcore.diffusion.router.todo import Compute, Drop, Restart, Transfer
from hwcore.diffusion.router.worker_core import WorkerCore

KINDS = {kind: kind for kind in (FromClient, FromRouter, FromWorker, ToClient)}


@dataclasses.dataclass
class Faults:
    """What the network does, as chances a message; and how long a message takes, in seconds."""

    lost: float = 0.0
    twice: float = 0.0
    late: float = 0.0
    late_s: float = 2.0
    usual_s: float = 0.002


class Memory:
    """A worker's pool: slots, and what was written there."""

    def __init__(self, world, process, size_bytes):
        self.world, self.process, self.size_bytes = world, process, size_bytes
        self.slots, self.consumed, self.quarantined = {}, {}, {}
        self.content = {}

    @property
    def left(self):
        held = (*self.slots.values(), *self.consumed.values())
        held += tuple(slot for slot, _ in self.quarantined.values())
        return self.size_bytes - sum(slot.size_bytes for slot in held)

    def grant(self, size_bytes):
        if size_bytes > self.left:
            return None
        slot = Slot(next(self.world.leases), 0, size_bytes)
        self.slots[slot.lease] = slot
        return slot

    def consume(self, slot):
        if slot.lease not in self.slots:
            return False
        self.consumed[slot.lease] = self.slots.pop(slot.lease)
        return True

    def free(self, slot, writer):
        if slot.lease not in self.slots:
            return  # consumed, or given back before
        freed = self.slots.pop(slot.lease)
        if writer:
            self.quarantined[slot.lease] = freed, writer
        self.settle()

    def settle(self):
        """Let go of slots whose writers can write no more."""
        for lease, (_, writer) in list(self.quarantined.items()):
            if writer not in self.world.engines:
                del self.quarantined[lease]

    def granted(self):
        return list(self.slots.values())

    def done(self, slot):
        del self.consumed[slot.lease]
        self.content.pop(slot.lease, None)

    def write(self, lease, value):
        known = lease in self.slots or lease in self.quarantined or lease in self.consumed
        assert known, f"written to lease {lease} of {self.process.name}, which others may have"
        self.content[lease] = value


class Process:
    """A worker process: it computes by adding its role to what it is given."""

    def __init__(self, world, name, role, pool_bytes, capacity, stock):
        self.world, self.name, self.role = world, name, role
        self.made = pool_bytes, capacity, stock
        self.stopped, self.done = False, 0
        self.start()

    def open(self):
        """Take a pool, at an address of its own."""
        self.memory = Memory(self.world, self, self.made[0])
        life = next(self.world.lives)
        self.address, self.engine = f"{self.name}/{life}", f"{life:016x}"
        self.world.addresses[self.address] = self.memory
        self.world.engines.add(self.engine)

    def shut(self):
        """Let go of the pool: nothing is written from here, or to here, any more."""
        del self.world.addresses[self.address]
        self.world.engines.remove(self.engine)

    def start(self):
        pool_bytes, capacity, stock = self.made
        self.life = next(self.world.lives)
        self.alive = True
        self.open()
        self.outputs, self.writing, self.computing, self.unwanted = {}, {}, set(), set()
        self.mind = WorkerCore(
            self.role,
            self.life << 20,
            self.address,
            self.engine,
            capacity,
            pool_bytes,
            self.memory,
            stock,
        )

    def kill(self):
        self.alive = False
        self.shut()

    def run(self):
        """Take turns with the world: say, do, hear."""
        self.memory.settle()
        self.mind.tick(self.world.now)
        self.flush()

    def flush(self):
        for message, frames in self.mind.take():
            self.world.send(self.name, "router", message, frames)
        for todo in self.mind.todo():
            self.do(todo)
        for message, frames in self.mind.take():
            self.world.send(self.name, "router", message, frames)

    def hear(self, frames):
        self.mind.from_router(decode(frames[0], FromRouter), frames[1:], self.world.now)
        self.flush()

    def later(self, seconds, action):
        self.world.at(self.world.now + seconds, self, action)

    def do(self, todo):
        if isinstance(todo, Compute):
            self.computing.add(todo.job)
            self.later(self.world.chance.expovariate(1 / 0.02), lambda: self.compute(todo))
        elif isinstance(todo, Transfer):
            self.writing[todo.job] = todo.slot.lease
            self.later(self.world.chance.expovariate(1 / 0.005), lambda: self.transfer(todo))
        elif isinstance(todo, Drop):
            self.drop(todo.job)
        elif isinstance(todo, Restart):
            self.shut()
            self.open()
            self.mind.restarted(self.address, self.engine, self.memory)

    def compute(self, todo):
        if todo.slot is None:
            value = todo.frames[0].decode()
        else:
            value = self.memory.content[todo.slot.lease]
            assert todo.frames == (value.encode(),), "the manifest is of something else"
            self.memory.done(todo.slot)
            self.mind.grant()
        value += f" {self.role}"
        self.world.computed += 1
        self.done += 1
        self.computing.remove(todo.job)
        if todo.job in self.unwanted:
            self.drop(todo.job)
            return
        if self.world.chance.random() < self.world.failing:
            self.mind.failed(todo.job, "out of luck", retryable=True)
        elif todo.last:
            self.mind.finished(todo.job, (value.encode(),))
        else:
            self.outputs[todo.job] = value
            self.mind.computed(todo.job, self.world.size_of(value))

    def transfer(self, todo):
        target = self.world.addresses.get(todo.address)
        del self.writing[todo.job]
        if target is None:
            self.mind.push_failed(todo.job, todo.turn, "the peer died")
        else:
            target.write(todo.slot.lease, self.outputs[todo.job])
            self.mind.pushed(todo.job, todo.turn, (self.outputs[todo.job].encode(),))
        if todo.job in self.unwanted:
            self.drop(todo.job)

    def drop(self, job):
        self.unwanted.add(job)
        if job in self.writing or job in self.computing:  # which cannot be called back
            return
        self.unwanted.remove(job)
        self.outputs.pop(job, None)
        self.mind.dropped(job)


class World:
    """Everything.

    Parameters
    ----------
    seed : int
    faults : Faults
    workers : mapping of RoleType to int
    """

    def __init__(
        self, seed=0, faults=None, workers=None, failing=0.0, config=None, sizes=(10, 90), **made
    ):
        self.chance, self.faults, self.failing = random.Random(seed), faults or Faults(), failing
        self.now, self.computed, self.sizes = 0.0, 0, sizes
        self.leases, self.lives, self.order = (
            itertools.count(1),
            itertools.count(1),
            itertools.count(),
        )
        self.events, self.addresses, self.engines = [], {}, set()
        self.config = config or RouterConfig()
        self.router = RouterCore(self.config)
        self.asked, self.answers, self.said = {}, {}, []
        self.made = {"pool_bytes": 1000, "capacity": 4, "stock": (100, 100, 100)} | made
        counts = workers or dict.fromkeys(PIPELINE, 2)
        self.processes = {}
        for role, count in counts.items():
            for number in range(count):
                name = f"{role}-{number}"
                self.processes[name] = Process(self, name, role, **self.made)
        self.at(0.0, None, self.beat)

    # --- Time ---

    def at(self, when, process, action):
        """Do something later, unless its process has died by then."""
        life = process.life if process else None
        heapq.heappush(self.events, (when, next(self.order), process, life, action))

    def run(self, until):
        while self.events and self.events[0][0] <= until:
            when, _, process, life, action = heapq.heappop(self.events)
            self.now = max(self.now, when)
            if process is not None:
                if not process.alive or process.life != life:
                    continue
                if process.stopped:
                    self.at(self.now + 0.05, process, action)
                    continue
            action()
            if process is not None:
                process.flush()
            self.route()
        self.now = max(self.now, until)

    def beat(self):
        """Every process looks at the clock."""
        self.router.tick(self.now)
        for process in self.processes.values():
            if process.alive and not process.stopped:
                process.run()
        for key, (message, frames, due) in list(self.asked.items()):
            if key not in self.answers and self.now >= due:
                self.asked[key] = message, frames, self.now + 3.0
                self.send("client", "router", message, frames)
        self.at(self.now + 0.1, None, self.beat)

    # --- Network ---

    def send(self, source, to, message, frames):
        faults, chance = self.faults, self.chance
        packet = (encode(message), *frames)
        copies = 0 if chance.random() < faults.lost else 1
        copies += chance.random() < faults.twice
        for _ in range(copies):
            seconds = chance.expovariate(1 / faults.usual_s)
            if chance.random() < faults.late:
                seconds += chance.uniform(0, faults.late_s)
            self.deliver(self.now + seconds, source, to, packet)

    def deliver(self, when, source, to, packet):
        if to == "router":
            self.at(when, None, lambda: self.to_router(source, packet))
        elif to == "client":
            self.at(when, None, lambda: self.to_client(packet))
        elif to in self.processes:
            process = self.processes[to]
            self.at(when, process, lambda: process.hear(packet))

    def to_router(self, source, packet):
        if source == "client":
            self.router.from_client(source, decode(packet[0], FromClient), packet[1:], self.now)
        else:
            self.router.from_worker(source, decode(packet[0], FromWorker), packet[1:], self.now)

    def route(self):
        for sent in self.router.take():
            self.send("router", sent.to, sent.message, sent.frames)

    # --- Clients ---

    def submit(self, name, deadline_s=60.0, attempt=1, **options):
        message = Submit(name, attempt, deadline_s, **options)
        frames = (name.encode(),)
        self.asked[name, attempt] = message, frames, self.now + 3.0
        self.send("client", "router", message, frames)

    def to_client(self, packet):
        message = decode(packet[0], ToClient)
        self.said.append(message)
        if isinstance(message, Result | Refused):
            key = message.request_id, message.attempt
            answer = (message, packet[1:])
            assert self.answers.setdefault(key, answer) == answer, "two answers to one request"

    # --- What is asked of it afterwards ---

    def size_of(self, value):
        least, most = self.sizes
        return least + hash_of(value) % (most - least + 1)

    def check_answers(self):
        """Every request has one answer, and results are right."""
        assert self.answers.keys() == self.asked.keys()
        for (name, _), (message, frames) in self.answers.items():
            if isinstance(message, Result):
                stages = list(self.config.pipeline)
                assert frames == (" ".join([name, *stages]).encode(),)

    def check_nothing_left(self):
        """Nobody holds anything: no request, no job, no slot but those granted and free."""
        assert self.router.is_settled, vars(self.router)
        for process in self.processes.values():
            if not process.alive:
                continue
            assert process.mind.is_idle, (process.name, process.mind._jobs)
            assert (process.outputs, process.writing, process.computing) == ({}, {}, set())
            memory = process.memory
            assert memory.consumed == {}, process.name
            assert memory.quarantined == {}, process.name
            worker = self.router.workers.get(process.name)
            assert worker is not None, process.name
            assert worker.free.keys() == memory.slots.keys(), process.name
            assert worker.used == {}, process.name
            assert worker.jobs == set(), process.name


def hash_of(text):
    value = 7
    for letter in text:
        value = (value * 31 + ord(letter)) % 1_000_003
    return value
