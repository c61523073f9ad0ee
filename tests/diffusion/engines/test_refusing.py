"""A writer that was taken for dead and wakes later writes nothing any more."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from hwcore.diffusion.engines import host
from hwcore.errors import ArgumentTypeError, ArgumentValueError, PeerRefusedError

from ._remote import stop, within


def test_an_engine_that_is_refused_cannot_connect_and_others_can(kind, opened):
    receiver, refused = opened(kind), opened(kind)
    assert receiver.refuse(refused.id) is False
    with pytest.raises(PeerRefusedError):
        refused.connect(receiver.address, 5)
    assert within(5, lambda: receiver.dropped == {"refused": 1})
    assert receiver.writers() == {}
    opened(kind).connect(receiver.address, 5).write(torch.ones(3, dtype=torch.uint8), 0, 5)
    assert receiver.memory.sum() == 3


def test_a_stopped_process_that_connects_after_it_was_refused_writes_nothing(kind, opened, remote):
    receiver, other = opened(kind), remote(kind)
    stop(other.process.pid)
    other.tell(f"engine.connect({receiver.address!r}, 5).write(torch.ones(9).byte(), 0, 5)")
    assert receiver.refuse(other.id) is False
    os.kill(other.process.pid, signal.SIGCONT)
    assert other._answer()[0] == "PeerRefusedError"
    assert not receiver.memory.any()


@pytest.mark.parametrize("kind", ["shm"], indirect=True)
def test_a_mapping_can_be_written_until_its_process_ends(kind, opened, remote):
    receiver, other = opened(kind), remote(kind)
    other.ask(f"peer = engine.connect({receiver.address!r}, 5)")
    stop(other.process.pid)
    assert receiver.refuse(other.id) is True
    assert receiver.refuse(other.id) is True
    os.kill(other.process.pid, signal.SIGCONT)
    assert (
        other.ask("peer.write(torch.ones(3, dtype=torch.uint8), 0, 5)") is None
    )  # so it was right
    other.kill()
    assert within(5, lambda: receiver.refuse(other.id) is False)


@pytest.mark.parametrize("kind", ["tcp"], indirect=True)
def test_a_connection_is_cut_even_within_a_frame(kind, opened, remote):
    receiver, other = opened(kind), remote(kind, 64 << 20)
    other.ask(f"peer = engine.connect({receiver.address!r}, 5)")
    assert receiver.refuse(other.id) is True  # its thread has not ended yet
    assert within(5, lambda: receiver.refuse(other.id) is False)
    name, _ = other.ask("peer.write(torch.ones(1 << 20, dtype=torch.uint8), 0, 5)")
    assert name == "PeerError"
    assert not receiver.memory.any()


@pytest.mark.parametrize(
    ("engine_id", "error"),
    [
        (None, ArgumentTypeError),
        (b"0123456789abcdef", ArgumentTypeError),
        ("", ArgumentValueError),
        ("tcp:127.0.0.1:1", ArgumentValueError),
        ("0123456789ABCDEF", ArgumentValueError),
    ],
)
def test_what_is_no_engines_id_is_no_news(kind, opened, engine_id, error):
    with pytest.raises(error, match="16 hexadecimal digits"):
        opened(kind).refuse(engine_id)


def test_one_too_many_to_remember_may_write_for_good_and_the_log_says_so(
    kind, opened, monkeypatch, caplog
):
    monkeypatch.setattr(host, "_REFUSED_AT_MOST", 2)
    receiver, third = opened(kind), opened(kind)
    assert receiver.refuse("0" * 16) is False
    assert receiver.refuse("1" * 16) is False
    assert receiver.refuse(third.id) is True
    assert "cannot be refused" in caplog.text
    assert receiver.refuse("1" * 16) is False  # known
