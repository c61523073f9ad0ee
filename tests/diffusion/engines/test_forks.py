"""A forked child uses nothing of its parent's, and hides the end of none of its connections."""

from __future__ import annotations

import os

import pytest

from ._remote import within

IN_CHILD = [
    "engine.memory",
    "engine.address",
    "engine.dropped",
    "engine.writers()",
    "engine.refuse('0123456789abcdef')",
    "engine.connect('tcp:127.0.0.1:1', 1)",
    "peer.memory",
    "peer.alive",
    "peer.fileno()",
    "peer.write(torch.ones(1, dtype=torch.uint8), 0, 1)",
]


def test_what_was_inherited_is_refused_and_the_parent_goes_on(kind, opened, remote):
    receiver, other = opened(kind), remote(kind)
    other.ask(f"peer = engine.connect({receiver.address!r}, 5)")
    for use in IN_CHILD:
        name, message = other.ask(f"_remote.forked(lambda: {use})")
        assert name == "ForkError", use
        assert "Open an engine in the child" in message
    assert other.ask("_remote.forked(lambda: (peer.close(), engine.close()))") == (None, None)
    assert other.ask("peer.write(torch.ones(1, dtype=torch.uint8), 0, 5)") is None
    assert receiver.memory[0] == 1
    assert other.ask("peer.alive") is True


def test_a_child_keeps_no_connection_of_its_parents_open(kind, opened, remote):
    receiver, other = opened(kind), remote(kind)
    other.ask(f"peer = engine.connect({receiver.address!r}, 5)")
    peer = opened(kind).connect(other.address, 5)
    child = other.ask("os.fork() or time.sleep(60)")
    try:
        other.kill()
        assert within(5, lambda: receiver.writers() == {other.id: False})
        assert within(5, lambda: not peer.alive)
    finally:
        os.kill(child, 9)


def test_a_child_has_no_mapping_of_a_pool_that_its_parent_writes(opened, remote):
    receiver, other = opened("shm"), remote("shm")
    other.ask(f"peer = engine.connect({receiver.address!r}, 5)")
    other.ask("count = lambda: open('/proc/self/maps').read().count('hwcore-pool')")
    assert other.ask("count()") == 2
    assert other.ask("_remote.forked(count)") == 1


OWN = "open_engine([TransferEngineSpec({kind!r}, 'any')], 4096, token).address"


@pytest.mark.parametrize("use", ["engine.close()", OWN])
def test_a_child_may_close_or_open_its_own(kind, remote, use):
    other = remote(kind)
    said = other.ask(f"_remote.forked(lambda: {use.format(kind=kind)})")
    assert said is None or said.startswith(f"{kind}:")
    assert other.ask("engine.address") == other.address
    if kind == "shm":
        assert other.ask("os.path.exists(engine.address.removeprefix('shm:'))") is True
