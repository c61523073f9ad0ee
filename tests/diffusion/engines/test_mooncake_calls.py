"""Mooncake's return codes, one by one, on a stand-in with its signatures (0.3.13.post1)."""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import os
import threading
import time

import pytest
import torch

from hwcore.diffusion.engines import mooncake, mooncake_library
from hwcore.errors import (
    CapabilityError,
    ClosedError,
    LateWriteError,
    PeerError,
    PeerTimeoutError,
)

from ._remote import within


class TransferEngine:
    """What is used of Mooncake's, in one process: a write is a copy, unless told otherwise."""

    ports = iter(range(20000, 30000))
    initialized = registered = probed = 0
    statuses: list[int]  # of the writes to come; beyond them each lands
    pools: dict[str, int]
    asked: list[int]

    def initialize(self, arg0: str, arg1: str, arg2: str, arg3: str) -> int:
        self.host, self.port, self.batches, self.known = arg0, next(self.ports), {}, {}
        return self.initialized

    def get_rpc_port(self) -> int:
        return self.port

    def register_memory(self, buffer_addr: int, capacity: int, location: str = "*") -> int:
        if not self.registered:
            self.known[buffer_addr] = capacity
            self.pools.setdefault(f"{self.host}:{self.port}", buffer_addr)
        return self.registered

    def unregister_memory(self, arg0: int) -> int:
        return 0 if self.known.pop(arg0, 0) else -3

    def send_probe(self, peer_server_name: str) -> int:
        return self.probed

    def get_first_buffer_address(self, arg0: str) -> int:
        return self.pools[arg0]

    def transfer_submit_write(
        self, target_hostname, buffer, peer_buffer_address, length, transport_hint=""
    ) -> int:
        assert any(
            start <= buffer and buffer + length <= start + size
            for start, size in self.known.items()
        ), "the source is not registered"
        status = self.statuses.pop(0) if self.statuses else 1
        if status == "none":
            return 0
        if status == 1:
            ctypes.memmove(peer_buffer_address, buffer, length)
        batch = 94739241442640 + len(self.batches)
        self.batches[batch] = status
        return batch

    def transfer_check_status(self, arg0: int) -> int:
        status = self.batches[arg0]
        assert status is not None, "asked again after it ended: its memory is gone"
        if status:
            self.batches[arg0] = None
        return status


@pytest.fixture
def library(monkeypatch):
    """The stand-in's class, to be told what goes wrong."""
    fake = type("TransferEngine", (TransferEngine,), {"statuses": [], "pools": {}})
    module = type("module", (), {"TransferEngine": fake})
    monkeypatch.setattr(mooncake_library, "load", lambda package: module)
    monkeypatch.setattr(mooncake, "_LINGER_S", 0.05)
    return fake


@pytest.fixture
def pair(library, opened):
    """A sender, its peer, and the receiver behind that."""
    receiver, sender = opened("mooncake"), opened("mooncake")
    return sender, sender.connect(receiver.address, 5), receiver


def test_a_write_lands_from_the_pool_and_from_elsewhere(pair, data):
    sender, peer, receiver = pair
    peer.write(data, 5, 5)
    assert torch.equal(receiver.memory[5 : 5 + len(data)], data)
    sender.memory[:3] = torch.tensor([7, 8, 9])
    peer.write(sender.memory[:3], receiver.size_bytes - 3, 5)
    assert receiver.memory[-3:].tolist() == [7, 8, 9]


def test_what_is_not_in_the_pool_goes_through_registered_memory_in_parts(
    library, opened, monkeypatch, data
):
    monkeypatch.setattr(mooncake, "_BOUNCE_BYTES", 4096)
    receiver, sender = opened("mooncake"), opened("mooncake")
    peer = sender.connect(receiver.address, 5)
    peer.write(data, 11, 5)
    assert torch.equal(receiver.memory[11 : 11 + len(data)], data)
    peer.close()
    assert len(sender.library._engine.known) == 1


@pytest.mark.parametrize("failure", [-1, "none", -2, 5])
def test_one_failure_is_tried_again_and_two_are_an_error(library, pair, data, failure):
    _, peer, receiver = pair
    library.statuses += [failure]
    peer.write(data, 0, 5)
    assert torch.equal(receiver.memory[: len(data)], data)
    library.statuses += [failure, failure]
    with pytest.raises(PeerError, match="said that it failed") as caught:
        peer.write(data, 0, 5)
    assert isinstance(caught.value, LateWriteError) is (failure != "none")  # it was never begun
    with pytest.raises(PeerError, match="said that it failed"):
        peer.write(data, 0, 5)


def test_what_failed_after_a_while_is_not_tried_again_for_it_may_still_land(
    library, pair, data, monkeypatch
):
    _, peer, receiver = pair
    monkeypatch.setattr(mooncake, "_STALL_S", 0.0)
    library.statuses += [-1]
    with pytest.raises(LateWriteError, match="said that it failed"):
        peer.write(data, 0, 5)
    assert not receiver.memory.any()


def test_the_receiver_hears_of_the_end_only_when_an_abandoned_write_has_ended(library, pair, data):
    sender, peer, receiver = pair
    library.statuses += [0]
    with pytest.raises(LateWriteError):
        peer.write(data, 0, 0.1)
    peer.close()
    assert not within(0.3, lambda: receiver.writers() != {sender.id: True})
    sender.library._engine.batches[sender._abandoned[0].batch] = -1
    sender.connect(receiver.address, 5).close()  # looks what has ended
    assert within(5, lambda: receiver.writers() == {sender.id: False})
    assert not sender._abandoned


def test_a_write_that_hangs_ends_at_its_deadline_and_its_memory_is_kept(library, pair, data):
    sender, peer, _ = pair
    library.statuses += [0]
    started = time.monotonic()
    with pytest.raises(LateWriteError, match=r"no answer after 0\.2 s"):
        peer.write(data, 0, 0.2)
    assert time.monotonic() - started < 2
    ((batch, holder, _),) = sender._abandoned
    peer.close()
    assert holder.any()  # still mapped
    sender.library._engine.batches[batch] = -1  # it ends, and the engine can close
    sender.close()


def test_a_write_that_never_ends_leaves_its_memory_behind_and_says_so(
    library, pair, data, monkeypatch, caplog
):
    sender, peer, receiver = pair
    monkeypatch.setattr(mooncake_library, "PROGRESS_S", -0.9)
    monkeypatch.setattr(mooncake, "_leaked", leaked := [])
    library.statuses += [0]
    with pytest.raises(LateWriteError):
        peer.write(data, 0, 0.1)
    sender.close()
    assert "1 writes never ended" in caplog.text
    assert not within(0.3, lambda: receiver.writers() != {sender.id: True})
    leaked[-1][0].connection.close()  # as the end of the process would
    assert within(5, lambda: receiver.writers() == {sender.id: False})


def test_closing_ends_a_write_that_hangs(library, pair, data):
    sender, peer, _ = pair
    library.statuses += [0]
    ended = []

    def write():
        with pytest.raises(ClosedError, match="closed meanwhile") as caught:
            peer.write(data, 0, 60)
        ended.append(caught.value)

    thread = threading.Thread(target=write)
    thread.start()
    assert within(5, lambda: sender.library._engine.batches)
    peer.close()
    thread.join(5)
    assert ended
    sender.library._engine.batches[next(iter(sender.library._engine.batches))] = 1


def test_a_peer_that_does_not_answer_the_probe_is_named(library, opened):
    receiver, sender = opened("mooncake"), opened("mooncake")
    library.probed = -102
    with pytest.raises(PeerError, match="answered the probe with -102"):
        sender.connect(receiver.address, 5)


def test_a_handshake_that_takes_a_minute_ends_at_the_deadline(library, opened):
    receiver, sender = opened("mooncake"), opened("mooncake")
    over = threading.Event()
    library.send_probe = lambda self, segment: over.wait(5) and 0
    started = time.monotonic()
    with pytest.raises(PeerTimeoutError, match=r"for 0\.3 s"):
        sender.connect(receiver.address, 0.3)
    assert time.monotonic() - started < 3
    over.set()


def test_a_set_up_that_fails_leaves_nothing(library, opened):
    opened("mooncake").close()
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    library.initialized = -1
    with pytest.raises(CapabilityError, match="initialize returned -1 for protocol 'any'"):
        opened("mooncake")
    library.initialized, library.registered = 0, -7
    with pytest.raises(CapabilityError, match="register_memory returned -7"):
        opened("mooncake")
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before


def test_that_it_listens_everywhere_is_said(library, opened, caplog):
    opened("mooncake")
    assert "listens on all interfaces of this machine without authentication" in caplog.text


def test_a_writer_is_dead_only_when_its_last_bytes_must_have_come(pair, monkeypatch):
    sender, peer, receiver = pair
    monkeypatch.setattr(mooncake, "_LINGER_S", 0.5)
    assert receiver.writers() == {sender.id: True}
    peer.close()
    assert not within(0.3, lambda: receiver.writers() != {sender.id: True})
    assert within(5, lambda: receiver.writers() == {sender.id: False})


def test_closing_in_a_forked_child_asks_nothing_of_the_library(pair):
    sender, peer, receiver = pair
    sender._pid += 1
    peer._pid += 1
    peer.close()
    sender.close()
    sender._pid -= 1
    peer._pid -= 1
    peer.write(torch.ones(3, dtype=torch.uint8), 0, 5)
    assert receiver.memory.sum() == 3


# --- Where it is not installed as it should be ----------------------------------------------------


def installed(monkeypatch, *names):
    distributions = [
        type("D", (), {"metadata": {"Name": name}, "version": "1.0"})() for name in names
    ]
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: distributions)


def failing(monkeypatch, error):
    def raises(name):
        raise error

    monkeypatch.setattr(importlib, "import_module", raises)
    monkeypatch.setenv("MC_TCP_PROGRESS_TIMEOUT_SEC", "5")


def test_two_packages_of_the_family_are_named(monkeypatch):
    installed(monkeypatch, "mooncake-transfer-engine", "Mooncake_Transfer_Engine_efa", "torch")
    with pytest.raises(
        CapabilityError,
        match=r"Mooncake_Transfer_Engine_efa 1\.0 and mooncake-transfer-engine 1\.0 are",
    ):
        mooncake_library.load()


def test_a_missing_package_is_named_by_what_the_backend_wants(monkeypatch):
    installed(monkeypatch)
    failing(monkeypatch, ModuleNotFoundError("No module named 'mooncake'", name="mooncake"))
    with pytest.raises(CapabilityError, match=r"pip install 'hwcore\[mooncake\]'\."):
        mooncake_library.load()
    with pytest.raises(CapabilityError, match=r"pip install mooncake-for-this-device\."):
        mooncake_library.load("mooncake-for-this-device")


def test_a_missing_system_library_is_named(monkeypatch):
    installed(monkeypatch, "mooncake-transfer-engine")
    failing(monkeypatch, ImportError("libibverbs.so.1: cannot open shared object file"))
    with pytest.raises(CapabilityError, match=r"libibverbs\.so\.1.*apt-get install libibverbs1 "):
        mooncake_library.load()
