"""Two processes compute one model, one of them a little off, and commit the same tokens."""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import time

import pytest
import torch

from hwcore import _collectives
from hwcore.errors import CaptureError
from hwcore.speculative import TreeMaskMode, build_tree, verify_greedy
from hwcore.speculative.tensor_parallel import ResultBroadcast

RANK = pathlib.Path(__file__).with_name("_rank.py")
STEPS = 2000


@pytest.fixture
def ranks(hw, tmp_path):
    """Run two ranks to their ends, or to the time limit; return their exit codes and output."""
    processes = []

    def run(limit_s, **options):
        options = {"steps": STEPS, "broadcast": True, "sampling": False, "layers": True, **options}
        # Work at once, for the many steps' sake: the order of streams is tested elsewhere.
        more = {"HWCORE_SIM_DRAIN": "eager", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        for rank in range(2):
            arguments = [str(rank), str(tmp_path), hw.info.name, json.dumps(options)]
            process = subprocess.Popen(
                [sys.executable, str(RANK), *arguments],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **more},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            processes.append(process)
        deadline = time.monotonic() + limit_s
        ended = []
        for process in reversed(processes):  # rank 0 may hang, when it is asked to
            if "hangs_at" in options and process is processes[0]:
                continue
            out, err = process.communicate(timeout=max(1, deadline - time.monotonic()))
            ended.insert(0, (process.returncode, out.strip(), err))
        return ended

    yield run
    for process in processes:
        process.kill()
        process.communicate()


def committed(ended):
    for code, out, err in ended:
        assert code == 0, out + err
    return [out.split() for _, out, _ in ended]


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [False, True], ids=["greedy", "sampled"])
def test_ranks_with_other_roundings_commit_the_same_tokens(hw, ranks, sampling):
    first, second = committed(ranks(150, sampling=sampling))
    assert first == second
    assert int(first[2]) >= STEPS  # every step emits
    assert int(first[3]) == (0 if hw.info.device_type == "cpu" else STEPS)


@pytest.mark.parametrize("sampling", [False, True], ids=["greedy", "sampled"])
def test_without_the_broadcast_they_would_not(ranks, sampling):
    first, second = committed(
        ranks(60, broadcast=False, layers=False, sampling=sampling, steps=100)
    )
    assert first[1] != second[1]


def test_a_rank_whose_peer_dies_says_so_at_once(ranks):
    (code, *_), (survivor, out, _) = ranks(60, steps=300, layers=False, dies_at=50)
    assert (code, survivor) == (7, 3)
    assert re.match(r"PeerError after \d", out), out
    assert "rank 1 got" in out
    assert "Look for the rank that ended first" in out


def test_a_rank_whose_peer_hangs_waits_as_long_as_it_was_told(ranks):
    ((code, out, _),) = ranks(60, steps=300, layers=False, hangs_at=50, timeout_s=2)
    assert code == 3
    assert re.match(r"PeerError after \d+\.\d s: ResultBroadcast: waiting for rank 0", out), out
    assert "within 2 s" in out


# --- One process ----------------------------------------------------------------------------------


def test_results_that_go_through_the_host_are_refused_within_a_capture(hw, alone, result):
    if hw.info.device_type == "cpu":
        pytest.skip("nothing goes through the host: it is there")
    broadcast = ResultBroadcast(alone, hw)
    with pytest.raises(CaptureError, match=r"through the host \(gloo\).* Do not capture it"):
        hw.graph_capture(hw.create_graph(), lambda: broadcast(result, 1, 3, 3, hw.device()))
    assert broadcast.host_syncs == 0


def test_through_the_host_means_one_wait_a_step_and_a_warning_that_names_it(
    hw, alone, result, caplog
):
    if hw.info.name != "sim":
        pytest.skip("only a simulated device tells whether it was waited for")
    from hwcore_sim import device

    broadcast = ResultBroadcast(alone, hw)
    (record,) = caplog.records
    assert "go through the host, which waits each step" in record.message
    with device.host_waits() as waits:
        broadcast(result, 1, 3, 3, hw.device())
    assert len(waits) == broadcast.host_syncs == 1


class Library:
    """A device's communication library: its collectives run on a stream of its own."""

    def __init__(self, hw, monkeypatch, rank, truth=None):
        self.hw, self.truth, self.sent = hw, truth, None
        self.stream = hw.create_stream()
        monkeypatch.setattr(_collectives, "_library", lambda group, device_type: "acme")
        monkeypatch.setattr(torch.distributed, "get_rank", lambda group=None: rank)
        monkeypatch.setattr(torch.distributed, "broadcast", self.broadcast)

    def broadcast(self, packed, source, group, async_op):
        assert (source, async_op) == (0, True)
        self.hw.wait_stream(self.stream, self.hw.current_stream())
        self.hw.record_stream(packed, self.stream)
        with self.hw.stream_context(self.stream):
            if self.truth is None:
                self.sent = packed.clone()
            else:
                packed.copy_(self.truth)
        return self

    def wait(self):
        """Make the current stream wait, and not the host."""
        self.hw.wait_stream(self.hw.current_stream(), self.stream)


@pytest.mark.usefixtures("in_any_order", "watched")
def test_a_devices_own_collective_is_ordered_in_the_current_stream(hw, alone, result, monkeypatch):
    with monkeypatch.context() as rank_0:
        library = Library(hw, rank_0, rank=0)
        broadcast = ResultBroadcast(alone, hw)
        fresh = dataclasses.replace(result, bonus_tokens=result.bonus_tokens + 1)  # queued
        assert broadcast(fresh, 1, 3, 3, hw.device()) is fresh
        sent = library.sent
        hw.synchronize()
    assert sent.tolist() == [6, 7, 8, 0, 1, 2, 3, 9, 0]
    with monkeypatch.context() as rank_1:
        Library(hw, rank_1, rank=1, truth=sent)
        broadcast = ResultBroadcast(alone, hw)
        got = broadcast(None, 1, 3, 3, hw.device())
        assert got.bonus_tokens.tolist() == [9]
        assert got.accept_index.tolist() == [[0, 1, 2]]
        assert broadcast.host_syncs == 0
    for field in dataclasses.fields(result):
        ours, theirs = getattr(result, field.name), getattr(got, field.name)
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)


@pytest.mark.parametrize("rank", [0, 1])
def test_with_the_devices_own_library_the_host_waits_for_nothing(
    hw, alone, result, monkeypatch, rank
):
    if hw.info.name != "sim":
        pytest.skip("only a simulated device tells whether it was waited for")
    from hwcore_sim import device

    truth = torch.zeros(9, dtype=torch.int64, device=hw.device()) if rank else None
    Library(hw, monkeypatch, rank, truth)
    broadcast = ResultBroadcast(alone, hw)
    with device.host_waits() as waits:
        broadcast(result, 1, 3, 3, hw.device())
    assert waits == []


@pytest.fixture
def alone(hw):
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


@pytest.fixture
def result(hw):
    tree = build_tree(
        torch.tensor([[5, 6, 7]], device=hw.device()),
        torch.tensor([[-1, 0, 1]], device=hw.device()),
        torch.tensor([4], device=hw.device()),
        tree_mask_mode=TreeMaskMode.QLEN_ONLY,
    )
    made = verify_greedy(tree, torch.tensor([[6, 7, 8]], device=hw.device()))
    hw.synchronize()
    return made
