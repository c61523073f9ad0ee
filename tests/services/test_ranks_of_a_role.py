import os
import pathlib
import subprocess
import sys
import time

import pytest

from hwcore.diffusion.roles import PIPELINE
from hwcore.errors import RequestError
from tests.diffusion.serving import _roles

from ._deploy import PATHS

RANK = pathlib.Path(__file__).with_name("_role_of_ranks.py")


@pytest.fixture
def served(hw, serve, tmp_path):
    """A pipeline whose denoiser computes on two ranks, in processes of their own."""
    served = serve([_roles.Role(PIPELINE[0]), _roles.Role(PIPELINE[2])])
    fd = served.token.descriptor()
    more = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "HWCORE_TOKEN_FD": str(fd)}
    served.ranks = [
        subprocess.Popen(
            [sys.executable, str(RANK), str(rank), str(tmp_path),
             hw.info.name, served.router.worker_address],
            env={**os.environ, "PYTHONPATH": PATHS, **more},
            pass_fds=[fd],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    os.close(fd)
    yield served
    for rank in served.ranks:
        rank.kill()
        rank.communicate()


def test_all_ranks_compute_each_request_and_end_together(served):
    pending = [served.ask(number, 100 + number) for number in range(6)]
    assert all(
        _roles.same(one.result(), number, 100 + number) for number, one in enumerate(pending)
    )
    time.sleep(1.2)  # rank 0 has nothing to do, and says so to the other
    assert _roles.same(served.ask(7).result(), 7)
    served.ranks[0].terminate()
    for rank in served.ranks:
        out, error = rank.communicate(timeout=30)
        assert out == "ended\n", error


@pytest.mark.parametrize("rank", [0, 1])
def test_a_request_fails_when_one_rank_fails_and_the_ranks_stay_together(served, rank):
    with pytest.raises(RequestError, match=r"ValueError|another rank of the role failed"):
        served.ask(1, **{"fails on rank": rank}).result()
    assert _roles.same(served.ask(2).result(), 2)


def test_when_a_rank_dies_its_role_ends_and_says_which(served):
    assert _roles.same(served.ask(1).result(), 1)
    pending = served.ask(2, dies=True, deadline_s=8.0)
    out, _ = served.ranks[0].communicate(timeout=30)
    assert served.ranks[0].returncode == 3
    assert out.startswith("PeerError: RankGroup"), out
    assert "Look for the rank that ended first" in out
    with pytest.raises(RequestError):
        pending.result()
