"""A process that evaluates what a test sends it: the other side of a transfer."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys
import time

PRELUDE = """
import os, sys, time, threading, signal
sys.path.insert(0, {folder!r})
import _remote
if {isolated}:
    isolated = _remote.isolate()
import torch
torch.set_num_threads(1)
from hwcore.diffusion.engines import Token, open_engine
from hwcore.types import TransferEngineSpec
token = Token.from_environment()
engine = open_engine([TransferEngineSpec({kind!r}, "tcp")], {size_bytes}, token)
print(repr((engine.id, engine.address)), flush=True)
for line in sys.stdin:
    code = eval(line)
    try:
        result = eval(code)
    except SyntaxError:
        try:
            exec(code)
            result = None
        except Exception as error:
            result = error
    except Exception as error:
        result = error
    if isinstance(result, Exception):
        result = (type(result).__name__, str(result))
    print(repr(result), flush=True)
"""


class Remote:
    """Another process with an engine; ``address`` and ``id`` are that engine's."""

    def __init__(self, kind, token, size_bytes=1 << 20, isolated=False, stderr=None):
        fd = token.descriptor()
        prelude = PRELUDE.format(
            folder=str(pathlib.Path(__file__).parent),
            kind=kind,
            size_bytes=size_bytes,
            isolated=isolated,
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", prelude],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            pass_fds=[fd],
            env={**os.environ, "HWCORE_TOKEN_FD": str(fd), "OMP_NUM_THREADS": "1"},
        )
        os.close(fd)
        self.id, self.address = self._answer()

    def ask(self, code):
        """Evaluate an expression there, or run statements, and return what came of it."""
        self.tell(code)
        return self._answer()

    def tell(self, code):
        """Do not wait for the answer."""
        self.process.stdin.write(repr(code) + "\n")
        self.process.stdin.flush()

    def _answer(self):
        line = self.process.stdout.readline()
        assert line, f"the process ended: {self.process.wait(10)}"
        return eval(line)

    def kill(self):
        self.process.kill()
        self.process.wait(10)

    def close(self):
        self.kill()
        self.process.stdin.close()
        self.process.stdout.close()
        if self.process.stderr:
            self.process.stderr.close()


def isolate():
    """Give this process a network of its own, with a loopback; say whether it may."""
    import ctypes
    import fcntl
    import socket
    import struct

    new_net, new_user = 0x40000000, 0x10000000
    libc = ctypes.CDLL(None)
    if libc.unshare(new_net) and libc.unshare(new_user | new_net):
        return False
    with socket.socket() as sock:
        up = struct.pack("16sh14x", b"lo", 1)
        fcntl.ioctl(sock, 0x8914, up)  # SIOCSIFFLAGS
    return True


def forked(call):
    """Return what ``call`` returns in a forked child, or the name and text of its error."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            said = repr(call())
        except Exception as error:  # noqa: BLE001 - whatever it is
            said = repr((type(error).__name__, str(error)))
        os.write(writing, said.encode())
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        said = pipe.read().decode()
    os.waitpid(child, 0)
    return eval(said)


def stop(pid):
    """Stop a process; every thread of it has stopped when this returns."""
    os.kill(pid, signal.SIGSTOP)
    tasks = pathlib.Path(f"/proc/{pid}/task")

    def stopped(task):
        return (task / "stat").read_text().rpartition(")")[2].split()[0] in "Tt"

    assert within(10, lambda: all(map(stopped, tasks.iterdir())))


def within(seconds, condition):
    """Say whether ``condition()`` comes true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True
