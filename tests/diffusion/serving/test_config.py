"""What cannot be set of a worker is said by its name, before anything is opened."""

import pytest

from hwcore.diffusion import RoleType
from hwcore.diffusion.serving.config import WorkerConfig
from hwcore.errors import ArgumentTypeError, ArgumentValueError

pytestmark = pytest.mark.usefixtures("once")
GOOD = {"role": RoleType.DENOISER, "router": "tcp://127.0.0.1:7001", "name": "denoiser-0"}
BAD = [
    ({"role": "denoiser"}, ArgumentTypeError, "role"),
    ({"router": 7001}, ArgumentTypeError, "router .*a str. Set router"),
    ({"name": ""}, ArgumentValueError, "name"),
    ({"capacity": 0}, ArgumentValueError, "capacity"),
    ({"pool_bytes": 1.5}, ArgumentTypeError, "pool_bytes"),
    ({"slot_bytes": (1 << 30,)}, ArgumentValueError, "slot_bytes"),
    ({"push_timeout_s": 0}, ArgumentValueError, "push_timeout_s"),
    ({"push_timeout_s": "1"}, ArgumentTypeError, "push_timeout_s"),
]


@pytest.mark.parametrize(("options", "kind", "named"), BAD, ids=str)
def test_what_cannot_be_set_of_a_worker_is_named(options, kind, named):
    with pytest.raises(kind, match=f"WorkerConfig: {named}"):
        WorkerConfig(**GOOD | options)
