"""Shared memory: what its mapping allows, who gets it, when it ends, and what if it cannot be."""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import resource
import socket
import stat

import pytest
import torch

from hwcore.diffusion.engines import memory, open_engine, shm
from hwcore.errors import ArgumentValueError, CapabilityError, PeerError, PeerRefusedError
from hwcore.types import TransferEngineSpec

from ._remote import within


def path_of(engine):
    return engine.address.removeprefix("shm:")


def test_what_is_written_into_a_mapped_pool_has_landed(opened, remote):
    other = remote("shm")
    peer = opened("shm").connect(other.address, 5)
    peer.memory[5:8] = torch.tensor([1, 2, 3], dtype=torch.uint8)
    assert other.ask("engine.memory[4:9].tolist()") == [0, 1, 2, 3, 0]
    other.ask("engine.memory[9] = 4")
    assert peer.memory[9] == 4


def test_shared_memory_has_its_pages_before_it_is_mapped():
    fd = memory.create_memfd(32 << 20)
    status = os.fstat(fd)
    os.close(fd)
    assert status.st_blocks * 512 == status.st_size == 32 << 20


def test_the_pool_cannot_be_resized_under_who_maps_it(opened):
    engine = opened("shm")
    for size in (0, 2 << 20):
        with pytest.raises(PermissionError):
            os.ftruncate(engine._memfd, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(engine._memfd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


def test_nobody_else_can_reach_the_socket(opened):
    path = path_of(opened("shm"))
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(os.path.dirname(path)).st_mode) == 0o700


def test_a_writer_that_holds_a_view_can_write_after_it_closed(opened):
    receiver, sender = opened("shm"), opened("shm")
    peer = sender.connect(receiver.address, 5)
    view = peer.memory[3:4]
    peer.close()
    assert not within(0.3, lambda: receiver.writers() != {sender.id: True})
    view.fill_(9)
    assert receiver.memory[3] == 9
    del view
    gc.collect()
    assert within(5, lambda: receiver.writers() == {sender.id: False})


def test_a_writer_is_dead_with_its_process_whoever_keeps_its_socket(opened, remote):
    receiver, other = opened("shm"), remote("shm")
    other.ask(f"peer = engine.connect({receiver.address!r}, 5)")
    sleeper = other.ask(
        "import subprocess; fd = peer._sock.fileno(); "
        "sleeper = subprocess.Popen(['sleep', '60'], pass_fds=[fd], stdout=subprocess.DEVNULL)"
    )
    assert sleeper is None
    pid = other.ask("sleeper.pid")
    try:
        other.kill()
        assert within(5, lambda: receiver.writers() == {other.id: False})
    finally:
        os.kill(pid, 9)


def test_another_user_is_refused_by_both_sides(opened, monkeypatch):
    receiver, sender = opened("shm"), opened("shm")
    monkeypatch.setattr(shm, "credentials", lambda sock: (os.getpid(), os.geteuid() + 1))
    with pytest.raises(PeerRefusedError, match="is of user"):
        sender.connect(receiver.address, 5)
    assert within(5, lambda: receiver.dropped == {"uid": 1})
    assert receiver.writers() == {}


def test_memory_that_could_shrink_is_not_mapped(opened, monkeypatch):
    receiver, sender = opened("shm"), opened("shm")
    loose = os.memfd_create("loose")
    os.ftruncate(loose, receiver.size_bytes)
    sealed, receiver._memfd = receiver._memfd, loose
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(PeerError, match="expected one of a sealed memfd of 1048576 bytes"):
        sender.connect(receiver.address, 5)
    assert within(5, lambda: len(os.listdir("/proc/self/fd")) == before)
    receiver._memfd = sealed
    os.close(loose)


def test_page_locking_covers_the_pool_and_the_pools_mapped_here(token):
    class Backend:
        def __init__(self):
            self.locked, self.sizes = [], []

        def register_host_memory(self, buffer):
            self.locked.append(buffer.nbytes)
            self.sizes.append(buffer.nbytes)
            return self

        def close(self):
            self.locked.pop()

    backend, spec = Backend(), [TransferEngineSpec("shm", "memfd")]
    with open_engine(spec, 1 << 20, token) as receiver:
        sender = open_engine(spec, 4096, token, page_lock=True, backend=backend)
        sender.connect(receiver.address, 5)
        assert backend.sizes == [4096, 1 << 20]
        sender.close()
        assert backend.locked == []


def test_what_a_killed_engine_left_is_removed_by_the_next(opened, remote, monkeypatch):
    other = remote("shm")
    folder = os.path.dirname(other.address.removeprefix("shm:"))
    other.kill()
    assert os.path.exists(folder)
    os.utime(folder, (1, 1))
    lives = opened("shm")
    os.utime(os.path.dirname(path_of(lives)), (1, 1))
    opened("shm")
    assert not os.path.exists(folder)
    assert os.path.exists(path_of(lives))


# --- Where it cannot be ---------------------------------------------------------------------------


def no_memfd(*_):
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


def no_rights(sock, data, fds):
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


@pytest.mark.parametrize(
    ("owner", "name", "replacement"),
    [(os, "memfd_create", no_memfd), (socket, "send_fds", no_rights), (os, "posix_fallocate",
                                                                      no_memfd)],
)  # fmt: skip
def test_tcp_takes_its_place_and_one_line_says_so(
    opened, monkeypatch, caplog, owner, name, replacement
):
    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(owner, name, replacement)
    engine = opened("shm")
    assert engine.name == "tcp"
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "tcp takes the place of shm: " in record.getMessage()
    monkeypatch.undo()
    engine.close()
    assert within(5, lambda: len(os.listdir("/proc/self/fd")) == before)


def test_a_path_too_long_for_a_socket_is_one_of_the_reasons(opened, monkeypatch, caplog, tmp_path):
    deep = tmp_path / ("x" * 120)
    deep.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(deep))
    assert opened("shm").name == "tcp"
    assert "less than 108 bytes. Set XDG_RUNTIME_DIR or TMPDIR" in caplog.text
    assert list(deep.iterdir()) == []


def test_who_shares_memory_reaches_who_could_not(opened, monkeypatch, data):
    with monkeypatch.context() as patch:
        patch.setattr(os, "memfd_create", no_memfd)
        receiver = opened("shm")
    with opened("shm").connect(receiver.address, 5) as peer:
        assert peer.memory is None
        peer.write(data, 7, 5)
    assert torch.equal(receiver.memory[7 : 7 + len(data)], data)


def test_a_pool_larger_than_the_memory_left_is_refused_before_it_is_taken(kind, opened):
    with pytest.raises(ArgumentValueError, match="what the machine has left"):
        opened(kind, 1 << 46)


def test_a_mapping_that_the_system_refuses_names_its_size(monkeypatch):
    with pytest.raises(CapabilityError, match="of a mapping of 4611686018427387904 bytes"):
        memory.HostMemory(1 << 62)


def test_the_first_write_into_a_pool_meets_no_page_that_is_not_there(kind, opened):
    receiver = opened(kind, 16 << 20)
    pools = [receiver.memory]
    if kind == "shm":
        pools.append(opened(kind).connect(receiver.address, 5).memory)
    for pool in pools:
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
        pool.fill_(1)
        assert resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before < 100  # of 4096
