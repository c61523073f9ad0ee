"""A library's lines go to the log; what others write to descriptor 2 meanwhile stays there."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading

from hwcore.diffusion.engines.diversion import diverted

NOISE = b"E1128 18:06:07.222822  1061 transfer_metadata.cpp:1098] Local segment not found\n"


def test_the_librarys_lines_are_logged_and_others_passed_on(capfd, caplog):
    with caplog.at_level("DEBUG"), diverted():
        os.write(2, b"WARNING: Logging before InitGoogleLogging() is written to STDERR\n" + NOISE)
        os.write(2, b"someone else's\n" + NOISE + b"without an end")
    assert capfd.readouterr().err == "someone else's\nwithout an end"
    assert [record.levelname for record in caplog.records] == ["DEBUG"] * 3
    assert "Local segment not found" in caplog.text


def test_blocks_that_overlap_restore_it_once_and_after_an_error(capfd):
    entered, leave = threading.Event(), threading.Event()

    def inside():
        with diverted():
            entered.set()
            leave.wait(5)

    thread = threading.Thread(target=inside)
    fds = len(os.listdir("/proc/self/fd"))
    thread.start()
    assert entered.wait(5)
    with contextlib.suppress(KeyError), diverted():
        os.write(2, b"first\n")
        {}["missing"]
    os.write(2, b"second\n")
    leave.set()
    thread.join()
    os.write(2, b"third\n")
    assert capfd.readouterr().err == "first\nsecond\nthird\n"
    assert len(os.listdir("/proc/self/fd")) == fds


def test_many_lines_do_not_stop_it(capfd):
    with diverted():
        for _ in range(3000):
            os.write(2, NOISE)
    assert capfd.readouterr().err == ""


def test_a_process_without_standard_error_does_without():
    code = (
        "import os; os.close(2); from hwcore.diffusion.engines.diversion import diverted\n"
        "with diverted(): print('inside', flush=True)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=60, check=True
    )
    assert done.stdout == "inside\n"
