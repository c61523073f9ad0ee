"""Registered host memory: locked once, unlocked once, and held in between."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os

import pytest

from hwcore.errors import CapabilityError
from hwcore.host_memory import Registration


def test_it_is_locked_where_it_lies_and_unlocked_once():
    buffer, calls = bytearray(b"abcdef"), []
    made = Registration(memoryview(buffer), lambda *a: calls.append(a), lambda a: calls.append(a))
    assert calls == [(made.address, 6)]
    assert ctypes.string_at(made.address, made.size_bytes) == b"abcdef"
    made.close()
    made.close()
    assert calls == [(made.address, 6), made.address]


def test_the_memory_cannot_go_before_it_is_unlocked():
    mapping = mmap.mmap(-1, 4096)
    made = Registration(memoryview(mapping), lambda *_: None, lambda _: None)
    with pytest.raises(BufferError):
        mapping.close()
    made.close()
    mapping.close()


def test_one_that_is_lost_is_unlocked():
    unlocked = []
    Registration(memoryview(bytearray(8)), lambda *_: None, unlocked.append)
    gc.collect()
    assert len(unlocked) == 1


def test_what_could_not_be_locked_is_not_unlocked():
    buffer, unlocked = bytearray(8), []

    def refuse(address, size_bytes):
        raise OSError

    with pytest.raises(OSError):  # noqa: PT011 - whatever the driver raises
        Registration(memoryview(buffer), refuse, unlocked.append)
    gc.collect()
    buffer.append(1)  # no longer held
    assert unlocked == []


def test_what_the_driver_says_is_named_with_the_size():
    def refuse(address, size_bytes):
        message = "part of the range is already mapped"
        raise RuntimeError(message)

    with pytest.raises(CapabilityError) as caught:
        Registration(memoryview(bytearray(8)), refuse, lambda _: None)
    assert "the driver said `part of the range is already mapped` of 8 bytes" in str(caught.value)
    assert "Close an earlier registration" in str(caught.value)


def test_a_forked_child_unlocks_nothing(monkeypatch):
    unlocked = []
    made = Registration(memoryview(bytearray(8)), lambda *_: None, unlocked.append)
    monkeypatch.setattr(os, "getpid", lambda: 1)
    made.close()
    assert unlocked == []
