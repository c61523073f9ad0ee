"""The whole way of a tree through the transfer manager, over one memcpy of the same run."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import statistics
import struct
import subprocess
import sys
import time
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

import hwcore
from hwcore.cli.bench import load
from hwcore.cli.measurement import Row, interleaved
from hwcore.diffusion import DiffusionTransferManager, Staged
from hwcore.diffusion.engines import Token, open_engine
from hwcore.diffusion.messages import Slot
from hwcore.types import TransferEngineSpec

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

KIB, MIB = 1 << 10, 1 << 20
SIZES = {KIB: "1 KiB", MIB: "1 MiB", 16 * MIB: "16 MiB", 64 * MIB: "64 MiB"}
POOL = 80 * MIB
SAID = struct.Struct("!cI")  # what to do, and of how many bytes
MOST = 4096  # of a message; a seal of one tensor has less than 100 bytes
GRANTED = struct.Struct("!QQQ")

engines = load("transfer_engines")


def run(quick: bool = False) -> list[Row]:
    """Return the rows of this subject."""
    torch.set_num_threads(1)
    rounds = 5 if quick else 21
    rows = _wire()
    for kind in ("shm", "tcp"):
        for summed in (False, True):
            rows += _whole_way(kind, summed, rounds)
    return rows + _mooncake(quick)


def manager(kind: str, summed: bool, token: Token) -> DiffusionTransferManager:
    """Open one on the host's backend."""
    # The manager's own checksum is from end to end: no other of each frame.
    engine = open_engine([TransferEngineSpec(kind, "tcp")], POOL, token, checksum=False)
    return DiffusionTransferManager(engine, hwcore.load_backend("cpu"), checksum=summed)


class Other:
    """A manager here, and the process that loads what it sends."""

    def __init__(self, kind: str, summed: bool) -> None:
        token = Token.create()
        fd = token.descriptor()
        # A message is one call of the system here and there, with a seal in it or without.
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--receive", kind, str(int(summed)), str(theirs.fileno())],
            pass_fds=[fd, theirs.fileno()],
            env={**os.environ, "HWCORE_TOKEN_FD": str(fd)},
        )
        os.close(fd)
        theirs.close()
        self.address = json.loads(self._control.recv(1000))
        self.manager = manager(kind, summed, token)

    def slot(self, size_bytes: int) -> Slot:
        """Return a new slot; the one before is free."""
        self._control.send(SAID.pack(b"g", size_bytes))
        return Slot(*GRANTED.unpack(self._control.recv(MOST)))

    def loaded(self, seal: bytes) -> None:
        """Have the other process load what is in its slot, and wait until it has it."""
        self._control.send(b"l" + seal)
        if self._control.recv(MOST) != b"k":
            message = "the other process ended"
            raise RuntimeError(message)

    def ping(self) -> None:
        """Wait for an answer."""
        self._control.send(b"p")
        self._control.recv(MOST)

    def close(self) -> None:
        """End both."""
        self._control.close()
        self._process.wait(30)
        self.manager.close()


def receive(kind: str, summed: bool, control: socket.socket) -> None:
    """Load what lands, in the other process, until the connection ends."""
    torch.set_num_threads(1)
    receiver = manager(kind, summed, Token.from_environment())
    control.send(json.dumps(receiver.address).encode())
    slot = None
    while said := control.recv(MOST):
        what = said[:1]
        if what == b"l":
            assert slot is not None
            receiver.consume(slot)
            view = receiver.load_tensors(slot, said[1:])
            view[-1].item()  # it is usable, to its last byte
            control.send(b"k")
            del view
            receiver.finish(slot)
            slot = None
        elif what == b"g":
            if slot is not None:
                receiver.free(slot)
            slot = receiver.grant(SAID.unpack(said)[1])
            assert slot is not None
            control.send(GRANTED.pack(slot.lease, slot.offset, slot.size_bytes))
        else:
            control.send(b"k")
    receiver.close()


def _seconds(other: Other, size_bytes: int, call: Callable[[Slot], Any]) -> float:
    """Return the median of some calls, each with a slot that was granted before."""
    times = []
    for _ in range(51 if size_bytes <= 64 * KIB else 3):
        slot = other.slot(size_bytes)
        started = time.perf_counter()
        call(slot)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _ways(other: Other, part: Tensor, there: Tensor) -> dict[str, Callable[[Slot], Any]]:
    sender = other.manager

    def send(slot: Slot) -> None:
        other.loaded(sender.send_tensors("r", part, other.address, slot))

    def stage_and_push(slot: Slot) -> None:
        staged = sender.stage_tensors("r", part)
        seal = sender.push_to_peer(staged, other.address, slot, 30)
        staged.free()
        other.loaded(seal)

    return {
        "memcpy": lambda slot: there.copy_(part),
        "ping-pong": lambda slot: other.ping(),
        "sent": send,
        "staged, then pushed": stage_and_push,
    }


def _push(sender: DiffusionTransferManager, staged: Staged, address: str, slot: Slot) -> bytes:
    return sender.push_to_peer(staged, address, slot, 30)


def _whole_way(kind: str, summed: bool, rounds: int) -> list[Row]:
    source = torch.randint(0, 256, (64 * MIB,), dtype=torch.uint8)
    other, target, rows = Other(kind, summed), torch.zeros_like(source), []
    label = f"{kind}, {'checksum' if summed else 'no checksum'}"
    goal = 0.40 if summed else 0.75
    for size, name in SIZES.items():
        ways = _ways(other, source[:size], target[:size])
        subjects = {key: partial(_seconds, other, size, call) for key, call in ways.items()}
        medians = interleaved(subjects, rounds)
        detail = engines._rates(medians, size)
        if size == KIB:
            ratio = medians["sent"] / medians["ping-pong"]
            what = f"{label}, {name}, sent and loaded: over a bare unix ping-pong"
            rows.append(Row(what, ratio, "x", 3.0 if kind == "shm" else None, True, detail))
            continue
        for way in ("sent", "staged, then pushed"):
            ratio = medians["memcpy"] / medians[way]
            has_goal = kind == "shm" and way == "sent" and size >= 16 * MIB
            what = f"{label}, {name}, {way}, and loaded: share of a memcpy's speed"
            rows.append(Row(what, ratio, "x", goal if has_goal else None, False, detail))
    other.close()
    return rows


def _wire() -> list[Row]:
    """Return what is sent over what is useful, the seal included."""
    trees = {
        "a latent and two embeddings": [
            torch.zeros(16, 21, 60, 104, dtype=torch.bfloat16),
            *[torch.zeros(512, 4096, dtype=torch.bfloat16) for _ in range(2)],
        ],
        "1000 tensors of 64 bytes": [torch.zeros(64, dtype=torch.uint8) for _ in range(1000)],
    }
    rows = []
    token = Token.create()
    with manager("shm", True, token) as sender, manager("shm", True, token) as receiver:
        for name, tree in trees.items():
            size = sender.size_of(tree)
            slot = receiver.grant(size)
            assert slot is not None
            seal = sender.send_tensors("r", tree, receiver.address, slot)
            receiver.free(slot)
            useful = sum(tensor.nbytes for tensor in tree)
            detail = f"{size} bytes and a seal of {len(seal)} for {useful}"
            what = f"{name}: bytes sent over useful ones"
            rows.append(Row(what, (size + len(seal)) / useful, "x", 1.02, True, detail))
    return rows


def _mooncake(quick: bool) -> list[Row]:
    """Measure in a process with a network of its own: Mooncake listens on all interfaces."""
    if importlib.util.find_spec("mooncake") is None:
        reason = "it is not installed: pip install 'hwcore[mooncake]'"
    else:
        done = subprocess.run(
            [sys.executable, __file__, "--mooncake", *(["--quick"] if quick else [])],
            capture_output=True,
            text=True,
            check=False,
        )
        if not done.returncode:
            return [Row(**row) for row in json.loads(done.stdout)]
        reason = done.stderr.strip().splitlines()[-1]
    return [Row("mooncake", float("nan"), "x", None, False, "", reason)]


def mooncake_rows(rounds: int) -> list[Row]:
    """Compare pushes and the whole way with Mooncake's own call for the same bytes."""
    source = torch.randint(0, 256, (64 * MIB,), dtype=torch.uint8)
    other, target, rows = Other("mooncake", True), torch.zeros_like(source), []
    sender = other.manager
    engine: Any = sender._engine
    peer: Any = engine.connect(other.address, 10)
    bare = engine.library._engine.transfer_sync_write

    def sync(slot: Slot) -> None:
        address = engine.memory.data_ptr()
        if bare(peer._segment, address, peer._base + slot.offset, slot.size_bytes):
            message = "transfer_sync_write failed"
            raise RuntimeError(message)

    for size, name in SIZES.items():
        staged = sender.stage_tensors("r", source[:size])
        ways = _ways(other, source[:size], target[:size])
        ways["transfer_sync"] = sync
        ways["push"] = partial(_push, sender, staged, other.address)
        del ways["staged, then pushed"]  # the pool holds one tree of the largest
        subjects = {key: partial(_seconds, other, size, call) for key, call in ways.items()}
        medians = interleaved(subjects, rounds)
        staged.free()
        large, detail = size >= 16 * MIB, engines._rates(medians, size)
        for way, goal in (("push", 0.95), ("sent", 0.65)):
            ratio = medians["transfer_sync"] / medians[way]
            what = f"mooncake, {name}, {way if way == 'push' else 'sent and loaded'}: "
            what += "speed over its bare transfer_sync"
            rows.append(Row(what, ratio, "x", goal if large else None, False, detail))
    other.close()
    return rows


if __name__ == "__main__":
    if sys.argv[1] == "--receive":
        receive(sys.argv[2], sys.argv[3] == "1", socket.socket(fileno=int(sys.argv[4])))
    else:
        engines._isolate()
        torch.set_num_threads(1)
        rows = mooncake_rows(3 if "--quick" in sys.argv else 15)
        print(json.dumps([asdict(row) for row in rows]))
