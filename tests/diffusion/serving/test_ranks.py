import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from torch import distributed

from hwcore.diffusion.serving.ranks import Command, RankGroup
from hwcore.errors import ArgumentTypeError, PeerError

RANK = pathlib.Path(__file__).with_name("_ranks.py")


@pytest.fixture
def ranks(hw, tmp_path):
    """Run two ranks to their ends; return their exit codes and what they said."""
    processes = []

    def run(**options):
        more = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        for rank in range(2):
            arguments = [str(rank), str(tmp_path), hw.info.name, json.dumps(options)]
            processes.append(
                subprocess.Popen(
                    [sys.executable, str(RANK), *arguments],
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **more},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        ended = [(*process.communicate(timeout=60), process.returncode) for process in processes]
        return [(code, out.splitlines(), error) for out, error, code in ended]

    yield run
    for process in processes:
        process.kill()
        process.communicate()


def test_every_rank_gets_what_rank_0_has_on_its_own_device(ranks):
    leader, follower = ranks(requests=4)
    assert (leader[0], follower[0]) == (0, 0), leader[2] + follower[2]
    assert leader[1] == follower[1]
    assert len(leader[1]) == 4


def test_all_ranks_learn_that_one_failed(ranks):
    leader, follower = ranks(requests=3, fails_at=1)
    for _, lines, _ in (leader, follower):
        assert [json.loads(line)[1] for line in lines] == [False, True, False]


def test_a_rank_whose_leader_dies_says_so(ranks):
    leader, follower = ranks(requests=3, dies_at=1)
    assert (leader[0], follower[0]) == (7, 3)
    assert follower[1][-1].startswith("PeerError: RankGroup: waiting for rank 0")
    assert "Look for the rank that ended first" in follower[1][-1]


@pytest.fixture
def alone(hw):
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield RankGroup(distributed.group.WORLD, hw)
    distributed.destroy_process_group()


def test_what_cannot_be_sent_is_refused_before_the_others_hear_of_it(alone, monkeypatch):
    heard = []
    monkeypatch.setattr(distributed, "broadcast", lambda *arguments, **_: heard.append(arguments))
    with pytest.raises(ArgumentTypeError):
        alone.send(Command.COMPUTE, {"object": object()})
    assert heard == []


@pytest.mark.parametrize("words", [[9, 0, 0], [1, 0, 0], [1, 1 << 30, 0], [1, 5, -1]], ids=str)
def test_a_word_that_cannot_be_is_refused(alone, monkeypatch, words):
    monkeypatch.setattr(alone, "_say", lambda tensor: torch.tensor(words))
    with pytest.raises(PeerError, match="Start all ranks with the same version"):
        alone.receive()


def test_staging_through_the_host_is_said(hw, alone, caplog):
    RankGroup(distributed.group.WORLD, hw)
    said = [record.message for record in caplog.records if "go through the host" in record.message]
    assert len(said) == (0 if hw.info.device_type == "cpu" else 1)
