"""Many requests: what grows with them is a leak."""

import os
import statistics
import time

import psutil
import pytest

from hwcore.diffusion.launch import LocalLauncher
from tests.diffusion.serving import _roles

from ._deploy import deployment

pytestmark = pytest.mark.slow
REQUESTS, SAMPLES, AT_ONCE = 50_000, 25, 32


def test_memory_descriptors_and_threads_stay_as_they_are():
    made = deployment((1, 1, 1))
    with LocalLauncher(made) as launcher, launcher.client() as client:
        processes = {name: psutil.Process(pid) for name, pid in launcher.pids.items()}
        processes["client"] = psutil.Process(os.getpid())
        seen = {name: [] for name in processes}
        for part in range(SAMPLES):
            serve(client, part, REQUESTS // SAMPLES)
            for name, process in processes.items():
                seen[name].append(
                    (process.memory_info().rss, process.num_fds(), process.num_threads())
                )
        assert launcher.deaths == dict.fromkeys(launcher.deaths, 0)
        children = psutil.Process().children(recursive=True)
    for name, samples in seen.items():
        rss, fds, threads = zip(*samples, strict=True)
        # What is kept for clients that ask again has filled up by a third.
        early, late = rss[SAMPLES // 3 : SAMPLES // 2], rss[-SAMPLES // 5 :]
        growth = statistics.median(late) - statistics.median(early)
        print(f"{name}: {rss[-1] >> 20} MiB, grown by {growth / 2**20:.1f} MiB in the second half, "
              f"{fds[-1]} descriptors, {threads[-1]} threads")  # fmt: skip
        assert growth < 16 << 20, (name, [value >> 20 for value in rss])
        assert max(fds[SAMPLES // 3 :]) - min(fds[SAMPLES // 3 :]) <= 2, (name, fds)
        assert max(threads[SAMPLES // 3 :]) == min(threads[SAMPLES // 3 :]), (name, threads)
    assert not [child for child in children if child.is_running() and alive(child)]


def serve(client, part, count):
    """Some dozens at a time, of several sizes; every result is looked at."""
    pending, started = [], time.monotonic_ns()
    for number in range(count):
        size = (1, 16, 300, 4000)[number % 4]
        tree = _roles.ask(number % 8, size).to_tree()
        name = f"{part}-{number} {started}"
        one = client.submit(name, tree, deadline_s=60.0, enums=_roles.ENUMS)
        pending.append((one, number % 8, size))
        if len(pending) == AT_ONCE:
            check(pending.pop(0))
    for one in pending:
        check(one)


_right = {}


def check(asked):
    one, number, size = asked
    if (number, size) not in _right:
        _right[number, size] = _roles.expected(number, size)["image"]
    assert one.result()["image"].equal(_right[number, size])


def alive(process):
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
