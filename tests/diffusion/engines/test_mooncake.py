"""The real Mooncake between two processes, in a network of their own where the machine allows."""

from __future__ import annotations

import ctypes
import importlib.util

import pytest

from hwcore.diffusion.engines import Token
from hwcore.diffusion.engines.mooncake_library import SYSTEM_PACKAGES

from ._remote import Remote


def lacking():
    """Return what the tests lack, or nothing."""
    if importlib.util.find_spec("mooncake") is None:
        return "pip install 'hwcore[mooncake]'"
    for library in ("libibverbs.so.1", "libnuma.so.1", "libcurl.so.4"):
        try:
            ctypes.CDLL(library)
        except OSError:
            return f"apt-get install {SYSTEM_PACKAGES}"
    return ""


if what := lacking():
    pytest.skip(f"Mooncake is not run here; to have it: {what}", allow_module_level=True)

START = """
other = _remote.Remote('mooncake', token, 64 << 20)
peer = engine.connect(other.address, 10)
from hwcore.diffusion.checksum import checksum
other.ask('from hwcore.diffusion.checksum import checksum')
"""


@pytest.fixture
def driver():
    """A process with an engine, and `other`, a second one that it started and is connected to."""
    process = Remote("mooncake", Token.create(), 64 << 20, isolated=True)
    assert process.ask(START) is None
    yield process
    process.tell("other.close(); os._exit(0)")
    process.process.wait(20)
    process.close()


def test_bytes_land_from_the_pool_and_from_elsewhere(driver):
    assert driver.ask("peer.memory") is None
    said = driver.ask("""
source = torch.randint(0, 256, (40 << 20,), dtype=torch.uint8)
engine.memory[: 40 << 20].copy_(source)
peer.write(source, 12345, 20)
first = other.ask('checksum(engine.memory[12345 : 12345 + (40 << 20)])')
peer.write(engine.memory[: 40 << 20], 1, 20)
second = other.ask('checksum(engine.memory[1 : 1 + (40 << 20)])')
""")
    assert said is None
    assert driver.ask("first == second == checksum(source)") is True
    assert driver.ask("[peer.write(source[:1024], 0, 5) for _ in range(50)][-1]") is None
    assert driver.ask("other.ask('engine.dropped')") == {}


def test_a_killed_peer_is_an_error_at_once(driver):
    driver.ask("threading.Timer(0.3, other.kill).start()")
    name, message = driver.ask("[peer.write(engine.memory, 0, 30) for _ in range(10000)]")
    assert name == "PeerError"
    assert "expected the bytes to land" in message
    assert driver.ask("other.process.wait(10) and peer.alive") is False
    started = driver.ask("time.monotonic()")
    assert driver.ask("peer.write(engine.memory, 0, 30)")[0] == "PeerError"
    assert driver.ask("engine.connect(other.address, 5)")[0] == "PeerError"
    assert driver.ask("time.monotonic()") - started < 3


def test_a_stopped_peer_is_late_and_the_pool_closes(driver):
    driver.ask("_remote.stop(other.process.pid)")
    started = driver.ask("time.monotonic()")
    name, message = driver.ask("[peer.write(engine.memory, 0, 1) for _ in range(3)]")
    assert name == "LateWriteError"
    assert "no answer after 1 s" in message
    assert driver.ask("engine.connect(other.address, 1)")[0] == "PeerTimeoutError"
    assert driver.ask("time.monotonic()") - started < 6
    driver.ask("os.kill(other.process.pid, signal.SIGCONT)")
    assert driver.ask("engine.close()") is None


def test_what_mooncake_gives_up_may_land_late_and_no_more_once_its_writer_has_closed(driver):
    driver.ask("_remote.stop(other.process.pid)")
    driver.ask("filled = engine.memory.fill_(1)")
    name, message = driver.ask("[peer.write(engine.memory, 0, 60) for _ in range(3)]")
    assert name == "LateWriteError"
    assert "Mooncake said that it failed" in message
    driver.ask("sender = engine.id; engine.close()")
    driver.ask("os.kill(other.process.pid, signal.SIGCONT)")
    writers = "_remote.within(20, lambda: other.ask('engine.writers()') == {sender: False})"
    assert driver.ask(writers) is True
    driver.ask("landed = other.ask('int(engine.memory.sum())')")
    change = "_remote.within(0.3, lambda: other.ask('int(engine.memory.sum())') != landed)"
    assert driver.ask(change) is False


def test_a_fork_is_refused_where_it_would_hang(driver):
    write = "peer.write(torch.ones(9, dtype=torch.uint8), 0, 5)"
    assert driver.ask(f"_remote.forked(lambda: {write})")[0] == "ForkError"
    assert driver.ask(write) is None


def test_it_is_silent_and_programs_do_not_inherit_its_listeners(capfd):
    process = Remote("mooncake", Token.create(), isolated=True)
    try:
        inherited = process.ask(
            "[fd for fd in os.listdir('/proc/self/fd') if int(fd) > 2 and os.path.exists("
            "'/proc/self/fd/' + fd) and os.get_inheritable(int(fd)) and 'socket' in "
            "os.readlink('/proc/self/fd/' + fd)]"
        )
        assert inherited == []
        assert process.ask(START) is None
        assert process.ask("peer.write(torch.ones(9, dtype=torch.uint8), 0, 5)") is None
        process.ask("peer.close(), engine.close(), other.close()")
        process.tell("os._exit(0)")
        process.process.wait(20)
    finally:
        process.close()
    said = capfd.readouterr().err.splitlines()
    assert [line for line in said if "without authentication" not in line] == []


def test_an_engine_that_is_refused_does_not_connect_and_a_connected_one_may_write_to_its_end(
    driver,
):
    driver.ask("third = _remote.Remote('mooncake', token, 1 << 20)")
    assert driver.ask("engine.refuse(third.id)") is False
    name, _ = driver.ask("third.ask(f'engine.connect({engine.address!r}, 5)')")
    assert name == "PeerRefusedError"
    assert driver.ask("third.close()") is None
    driver.ask("other.ask(f'peer = engine.connect({engine.address!r}, 10)')")
    assert driver.ask("engine.refuse(other.id)") is True
    assert driver.ask("other.ask('peer.write(torch.ones(9, dtype=torch.uint8), 0, 5)')") is None
    driver.ask("other.kill()")
    assert driver.ask("_remote.within(10, lambda: engine.refuse(other.id) is False)") is True


MANAGERS = """
import hwcore
from hwcore.diffusion import DiffusionTransferManager
manager = DiffusionTransferManager(engine, hwcore.use('cpu'), chunk_bytes=1 << 20)
other.ask('import hwcore; from hwcore.diffusion import DiffusionTransferManager')
other.ask("manager = DiffusionTransferManager(engine, hwcore.use('cpu'))")
tree = [torch.arange(3_000_000.0), torch.ones(3)]
other.ask(f'slot = manager.grant({manager.size_of(tree)})')
from hwcore.diffusion.messages import Slot
slot = eval(other.ask('repr(slot)'))
"""


def test_a_manager_sends_a_tree_by_both_ways(driver):
    assert driver.ask(MANAGERS) is None
    driver.ask("seal = manager.send_tensors('r', tree, other.address, slot)")
    driver.ask("staged = manager.stage_tensors('r', tree)")
    assert driver.ask("manager.push_to_peer(staged, other.address, slot, 10) == seal") is True
    driver.ask("other.ask('manager.consume(slot)')")
    driver.ask("other.ask(f'got = manager.load_tensors(slot, {seal!r})')")
    total = driver.ask("other.ask('got[0].sum().item(), got[1].sum().item()')")
    assert total == driver.ask("tree[0].sum().item(), tree[1].sum().item()")
