"""Transfer engines between two processes, over one memcpy and over bare sockets of the same run."""

from __future__ import annotations

import ctypes
import fcntl
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

from hwcore.cli.measurement import Row, interleaved, nanoseconds
from hwcore.diffusion.checksum import bytes_of, checksum, copy_with_checksum
from hwcore.diffusion.engines import Token, open_engine
from hwcore.types import TransferEngineSpec

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

KIB, MIB = 1 << 10, 1 << 20
SIZES = {KIB: "1 KiB", 64 * KIB: "64 KiB", MIB: "1 MiB", 16 * MIB: "16 MiB", 64 * MIB: "64 MiB"}
POOL = 64 * MIB
READY = struct.Struct("!cQQ")  # how to load, size, checksum


def run(quick: bool = False) -> list[Row]:
    """Return the rows of this subject."""
    torch.set_num_threads(1)
    rounds = 5 if quick else 21
    source = torch.randint(0, 256, (POOL,), dtype=torch.uint8)
    return [
        *_checksums(source, rounds),
        *_engine("shm", source, rounds),
        *_engine("tcp", source, rounds),
        *_mooncake(quick),
    ]


def _seconds(call: Callable[[], Any], size_bytes: int) -> float:
    """Return the median of some calls: many of small ones, few of large ones."""
    times = []
    for _ in range(51 if size_bytes <= 64 * KIB else 3):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _rates(medians: dict[str, float], size_bytes: int) -> str:
    if size_bytes < MIB:
        return nanoseconds(medians)
    return ", ".join(f"{name} {size_bytes / s / 1e9:.1f} GB/s" for name, s in medians.items())


def _checksums(source: Tensor, rounds: int) -> list[Row]:
    rows, target = [], torch.zeros_like(source)
    for size in (MIB, POOL):
        a, b = source[:size], target[:size]
        medians = interleaved(
            {
                "memcpy": partial(_seconds, partial(b.copy_, a), size),
                "checksum": partial(_seconds, partial(checksum, a), size),
                "both": partial(_seconds, partial(copy_with_checksum, b, a), size),
            },
            rounds,
        )
        what = f"checksum of {SIZES[size]}, speed over memcpy's"
        ratio = medians["memcpy"] / medians["checksum"]
        rows.append(Row(what, ratio, "x", None, False, _rates(medians, size)))
    return rows


class Other:
    """The process that receives, and the sockets to it."""

    def __init__(self, kind: str) -> None:
        token = Token.create()
        fd = token.descriptor()
        self.control, theirs = socket.socketpair()
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--receive", kind, str(theirs.fileno())],
            pass_fds=[fd, theirs.fileno()],
            env={**os.environ, "HWCORE_TOKEN_FD": str(fd)},
        )
        os.close(fd)
        theirs.close()
        address, port = json.loads(self.control.recv(1000))
        self.raw = socket.create_connection(("127.0.0.1", port))
        self.raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.engine = open_engine([TransferEngineSpec(kind, "tcp")], POOL, token)
        self.peer = self.engine.connect(address, 10)

    def ready(self, how: bytes, size_bytes: int, summed: int = 0) -> None:
        """Have the other process load what landed, and wait until it has."""
        self.control.sendall(READY.pack(how, size_bytes, summed))
        if self.control.recv(1) != b"k":
            message = f"the other process found something else than {size_bytes} bytes it was sent"
            raise RuntimeError(message)

    def bare(self, view: memoryview) -> None:
        """Send over a bare socket, and wait until it was received."""
        self.control.sendall(READY.pack(b"r", len(view), 0))
        self.raw.sendall(view)
        self.control.recv(1)

    def close(self) -> None:
        """End both."""
        self.control.close()
        self.raw.close()
        self._process.wait(30)
        self.engine.close()


def receive(kind: str, control: socket.socket) -> None:
    """Load what lands, in the other process, until the connection ends."""
    torch.set_num_threads(1)
    engine = open_engine([TransferEngineSpec(kind, "tcp")], POOL, Token.from_environment())
    with socket.create_server(("127.0.0.1", 0)) as listener:
        control.sendall(json.dumps([engine.address, listener.getsockname()[1]]).encode())
        raw, _ = listener.accept()
    memory = engine.memory
    while message := control.recv(READY.size, socket.MSG_WAITALL):
        how, size, summed = READY.unpack(message)
        if how == b"r":
            view = bytes_of("receive", "memory", memory[:size])
            while view:
                view = view[raw.recv_into(view) :]
        if how == b"p":
            control.sendall(b"k")
            continue
        view_of = memory[:size].clone() if how == b"c" else memory[:size]
        right = how != b"s" or checksum(view_of) == summed
        _ = int(view_of[0]) + int(view_of[-1])
        control.sendall(b"k" if right else b"x")
    engine.close()


def _engine(kind: str, source: Tensor, rounds: int) -> list[Row]:
    """Measure stage, push and load; a push over shared memory is the staging itself."""
    other, target, rows = Other(kind), torch.zeros_like(source), []
    pool = other.engine.memory if other.peer.memory is None else other.peer.memory
    shared = other.peer.memory is not None

    def send(size: int, how: bytes) -> None:
        summed = 0
        if how == b"s":
            summed = copy_with_checksum(pool[:size], source[:size])
        else:
            pool[:size].copy_(source[:size])
        if not shared:
            other.peer.write(pool[:size], 0, 30)
        other.ready(how, size, summed)

    for size, name in SIZES.items():
        part, there = source[:size], target[:size]
        view = bytes_of("benchmark", "source", part)
        calls: dict[str, Callable[[], Any]] = {
            "memcpy": partial(there.copy_, part),
            "view": partial(send, size, b"v"),
            "view, summed": partial(send, size, b"s"),
            "clone": partial(send, size, b"c"),
            "bare socket": partial(other.bare, view),
            "ping-pong": partial(other.ready, b"p", 0),
        }
        subjects = {key: partial(_seconds, call, size) for key, call in calls.items()}
        medians = interleaved(subjects, rounds)
        large, detail = shared and size >= 16 * MIB, _rates(medians, size)
        for key, target_of in (("view", 0.75), ("view, summed", 0.40), ("clone", None)):
            what = f"{kind}, {name}, stage to load, {key}: share of a memcpy's speed"
            ratio = medians["memcpy"] / medians[key]
            rows.append(Row(what, ratio, "x", target_of if large else None, False, detail))
        if size == KIB:
            what = f"{kind}, {name}, stage to load, view: over a bare unix ping-pong"
            ratio = medians["view"] / medians["ping-pong"]
            rows.append(Row(what, ratio, "x", 3.0 if shared else None, True, detail))
        if not shared:
            what = f"{kind}, {name}, stage to load, view: speed over a bare TCP socket's"
            ratio = medians["bare socket"] / medians["view"]
            rows.append(Row(what, ratio, "x", None, False, detail))
    other.close()
    return rows


def _mooncake(quick: bool) -> list[Row]:
    """Measure in a process with a network of its own: Mooncake listens on all interfaces."""
    remark = ""
    if importlib.util.find_spec("mooncake") is None:
        remark = "it is not installed: pip install 'hwcore[mooncake]'"
    else:
        done = subprocess.run(
            [sys.executable, __file__, "--mooncake", *(["--quick"] if quick else [])],
            capture_output=True,
            text=True,
            check=False,
        )
        if not done.returncode:
            return [Row(**row) for row in json.loads(done.stdout)]
        remark = done.stderr.strip().splitlines()[-1]
    return [Row("mooncake was not measured", 0.0, "", None, True, remark)]


def mooncake_rows(rounds: int) -> list[Row]:
    """Compare a push with Mooncake's own call for the same bytes."""
    other, rows = Other("mooncake"), []
    engine: Any = other.engine
    peer: Any = other.peer
    bare = engine.library._engine.transfer_sync_write
    address = engine.memory.data_ptr()

    def sync(size: int) -> None:
        if bare(peer._segment, address, peer._base, size):
            message = "transfer_sync_write failed"
            raise RuntimeError(message)

    for size, name in SIZES.items():
        part = engine.memory[:size]
        medians = interleaved(
            {
                "push": partial(_seconds, partial(peer.write, part, 0, 30), size),
                "transfer_sync": partial(_seconds, partial(sync, size), size),
            },
            rounds,
        )
        what = f"mooncake, {name}, push: speed over its bare transfer_sync"
        ratio = medians["transfer_sync"] / medians["push"]
        target = 0.95 if size >= 16 * MIB else None
        rows.append(Row(what, ratio, "x", target, False, _rates(medians, size)))
    other.close()
    return rows


def _isolate() -> None:
    """Give this process a network of its own, if it may."""
    libc = ctypes.CDLL(None)
    if libc.unshare(0x40000000) and libc.unshare(0x50000000):  # as root; as another user
        return
    with socket.socket() as sock:
        fcntl.ioctl(sock, 0x8914, struct.pack("16sh14x", b"lo", 1))  # SIOCSIFFLAGS: up


if __name__ == "__main__":
    if sys.argv[1] == "--receive":
        receive(sys.argv[2], socket.socket(fileno=int(sys.argv[3])))
    else:
        _isolate()
        torch.set_num_threads(1)
        rows = mooncake_rows(3 if "--quick" in sys.argv else 15)
        print(json.dumps([asdict(row) for row in rows]))
