"""Waiting for room: in the order of coming, no longer than asked for, and until told otherwise."""

import threading
import time

import pytest
import torch

from hwcore.errors import (
    AllocationCancelledError,
    AllocationTimeoutError,
    ArgumentTypeError,
    ArgumentValueError,
    ClosedError,
)

PATIENCE_S = 10.0  # of a test, before it takes a thread to hang


class Waiting:
    """A call of `allocate` in a thread of its own."""

    def __init__(self, pool, size_bytes, request_id="", timeout_s=2 * PATIENCE_S):
        self.lease = self.error = None
        before = pool.stats().waiting_requests
        self._thread = threading.Thread(
            target=self._run, args=(pool, size_bytes, request_id, timeout_s), daemon=True
        )
        self._thread.start()
        until(lambda: pool.stats().waiting_requests > before or not self._thread.is_alive())

    def _run(self, pool, size_bytes, request_id, timeout_s):
        try:
            self.lease = pool.allocate(size_bytes, request_id, timeout_s=timeout_s)
        except Exception as error:  # noqa: BLE001 - the test looks at it
            self.error = error

    @property
    def is_waiting(self):
        return self._thread.is_alive()

    def end(self):
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()
        return self.lease or self.error


def until(condition):
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(1e-3)


@pytest.fixture
def full(host_pool):
    """A pool whose only lease has all of it."""
    return host_pool, host_pool.allocate(host_pool.size_bytes, "the holder")


def test_a_request_gets_the_room_that_another_frees(full):
    pool, lease = full
    waiting = Waiting(pool, 64)
    pool.free(lease)
    assert waiting.end().size_bytes == 64


def test_a_request_gets_the_room_that_a_peer_releases(full):
    pool, lease = full
    pool.quarantine(lease, "a peer")
    pool.free(lease)
    waiting = Waiting(pool, 64)
    assert waiting.is_waiting
    pool.release(lease, "a peer")
    assert waiting.end().size_bytes == 64


def test_a_request_gets_the_room_that_a_last_view_leaves(full):
    pool, lease = full
    view = lease.memory
    pool.free(lease)
    waiting = Waiting(pool, 64)
    assert waiting.is_waiting
    assert view.numel() == pool.size_bytes
    del view
    assert waiting.end().size_bytes == 64


def test_a_request_gets_the_room_that_a_stream_leaves(hw, host_pool, in_any_order):
    with host_pool.allocate(host_pool.size_bytes) as lease:
        host_pool.write_tensors_from_device(lease, [torch.ones(2000, device=hw.device())])
    assert host_pool.allocate(host_pool.size_bytes, timeout_s=PATIENCE_S).size_bytes


def test_who_came_first_is_served_first_whatever_the_size(host_pool):
    pool = host_pool
    half = pool.size_bytes // 2
    leases = [pool.allocate(half), pool.allocate(half)]
    large = Waiting(pool, pool.size_bytes)
    small = [Waiting(pool, 64) for _ in range(3)]
    pool.free(leases[0])  # the small ones would fit
    time.sleep(0.02)
    assert pool.stats().waiting_requests == 4
    with pytest.raises(AllocationTimeoutError):
        pool.allocate(64, timeout_s=0)  # nor does one that does not wait pass the line
    pool.free(leases[1])
    first = large.end()
    assert first.size_bytes == pool.size_bytes
    assert all(one.is_waiting for one in small)
    pool.free(first)
    assert all(one.end().size_bytes == 64 for one in small)


def test_those_behind_a_request_that_gives_up_are_served(host_pool):
    pool = host_pool
    pool.allocate(pool.size_bytes // 2)
    large = Waiting(pool, pool.size_bytes, timeout_s=0.05)
    small = Waiting(pool, 64)
    assert isinstance(large.end(), AllocationTimeoutError)
    assert small.end().size_bytes == 64


def test_a_request_waits_no_longer_than_asked_for_and_is_told_who_has_the_pool(full):
    pool, _ = full
    start = time.monotonic()
    with pytest.raises(AllocationTimeoutError) as caught:
        pool.allocate(64, "the late one", timeout_s=0.05)
    assert 0.05 <= time.monotonic() - start < 5
    message = str(caught.value)
    assert "64 bytes of 'the late one' in 0.05 s" in message
    assert "0 bytes free" in message
    assert f"{pool.size_bytes} bytes of 'the holder'" in message
    assert isinstance(caught.value, TimeoutError)
    assert pool.stats().waiting_requests == 0


def test_a_pool_that_is_free_in_pieces_says_so(host_pool):
    leases = [host_pool.allocate(1 << 12) for _ in range(16)]
    for lease in leases[::2]:
        host_pool.free(lease)
    with pytest.raises(AllocationTimeoutError, match="32768 bytes free, 4096 of them in one piece"):
        host_pool.allocate(4097, timeout_s=0)


def test_more_than_the_pool_has_is_refused_at_once(full):
    pool, _ = full
    with pytest.raises(ArgumentValueError, match=f"got {pool.size_bytes + 1} .* {pool.size_bytes}"):
        pool.allocate(pool.size_bytes + 1, timeout_s=PATIENCE_S)


@pytest.mark.parametrize("timeout_s", [-1, float("nan"), float("inf"), 1e9, "1", None, True])
def test_a_deadline_that_cannot_come_is_refused(host_pool, timeout_s):
    with pytest.raises((ArgumentTypeError, ArgumentValueError), match="timeout_s"):
        host_pool.allocate(64, timeout_s=timeout_s)


def test_a_request_that_is_cancelled_stops_waiting_and_others_go_on(full):
    pool, lease = full
    mine, other = Waiting(pool, 64, "mine"), Waiting(pool, 64, "another's")
    assert pool.cancel("mine") == 1
    assert isinstance(mine.end(), AllocationCancelledError)
    pool.free(lease)
    assert other.end().size_bytes == 64
    assert pool.cancel("mine") == 0


def test_those_behind_a_cancelled_request_are_served(host_pool):
    pool = host_pool
    pool.allocate(pool.size_bytes // 2)
    large, small = Waiting(pool, pool.size_bytes, "large"), Waiting(pool, 64)
    pool.cancel("large")
    assert small.end().size_bytes == 64
    large.end()


def test_closing_ends_the_waiting_of_all(full):
    pool, lease = full
    waiting = [Waiting(pool, 64), Waiting(pool, 64)]
    with pytest.raises(ClosedError):
        pool.close(timeout_s=0)
    assert all(isinstance(one.end(), ClosedError) for one in waiting)
    pool.free(lease)
    pool.close()


def test_an_interrupted_request_leaks_nothing(full, monkeypatch):
    pool, lease = full
    wait = threading.Condition.wait

    def interrupted(self, timeout=None):
        monkeypatch.setattr(threading.Condition, "wait", wait)
        pool._table.leave(lease, None)
        pool._line.serve()  # it is served, and then the signal comes
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Condition, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pool.allocate(64, timeout_s=PATIENCE_S)
    stats = pool.stats()
    assert (stats.live_leases, stats.waiting_requests) == (0, 0)
    assert stats.ranges.free_bytes == pool.size_bytes


def test_threads_that_share_a_pool_never_share_a_byte(host_pool):
    """Each fills its range with a number of its own, and finds it there after a while."""
    pool, wrong, done = host_pool, [], []

    def work(number):
        choose = torch.Generator().manual_seed(number)
        for _ in range(60):
            size = int(torch.randint(1, pool.size_bytes // 3, (1,), generator=choose))
            with pool.allocate(size, str(number), timeout_s=PATIENCE_S) as lease:
                memory = lease.memory.numpy()
                memory[:] = number
                time.sleep(0)
                if (memory != number).any():
                    wrong.append(number)
                del memory
        done.append(number)

    threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert sorted(done) == list(range(8))
    assert wrong == []
    assert pool.stats().ranges.free_bytes == pool.size_bytes
