"""The first engine that works is opened, and what is passed over is said."""

from __future__ import annotations

import pytest

from hwcore.diffusion.engines import Token, mooncake_library, open_engine
from hwcore.errors import ArgumentTypeError, ArgumentValueError, CapabilityError
from hwcore.types import TransferEngineSpec

SHM, TCP = TransferEngineSpec("shm", "memfd"), TransferEngineSpec("tcp", "tcp")


def test_a_backends_own_list_opens_shared_memory(hw, token):
    with open_engine(hw.transfer_engines(), 4096, token) as engine:
        assert engine.name == "shm"
        assert engine.memory.shape == (4096,)


def test_the_first_that_works_is_taken(token, caplog):
    specs = [
        TransferEngineSpec("pigeon", "feet"), TransferEngineSpec("shm", "memfd", memory="device"),
        TCP, SHM,
    ]  # fmt: skip
    with open_engine(specs, 4096, token) as engine:
        assert engine.name == "tcp"
    pigeon, shm = (record.getMessage() for record in caplog.records)
    assert pigeon.startswith("transfer engine pigeon is passed over: its name got 'pigeon'; ")
    assert pigeon.endswith("expected one of shm, tcp, mooncake. Leave it out of the specs.")
    assert shm.startswith("transfer engine shm is passed over: `memory` of shm got 'device'; ")
    assert shm.endswith("Give a spec for host memory as well.")


def test_where_none_works_the_error_has_every_reason(token, monkeypatch):
    def missing(package):
        message = "mooncake: no such thing."
        raise CapabilityError(message)

    monkeypatch.setattr(mooncake_library, "load", missing)
    specs = [TransferEngineSpec("mooncake", "tcp"), TransferEngineSpec("pigeon", "feet")]
    with pytest.raises(CapabilityError, match=r"mooncake: no such thing\. pigeon: its name"):
        open_engine(specs, 4096, token)


@pytest.mark.parametrize(
    ("change", "error", "part"),
    [
        ({"size_bytes": 0}, ArgumentValueError, "`size_bytes` got 0"),
        ({"size_bytes": 4096.0}, ArgumentTypeError, "an int"),
        ({"specs": []}, ArgumentValueError, "at least one"),
        ({"specs": ["shm"]}, ArgumentTypeError, "'shm' (str)"),
        ({"token": "secret"}, ArgumentTypeError, "expected Token"),
        ({"max_peers": 0}, ArgumentValueError, "at least 1"),
    ],
)
def test_a_wrong_argument_is_named(token, change, error, part):
    arguments = {"specs": [SHM], "size_bytes": 4096, "token": token} | change
    with pytest.raises(error) as caught:
        open_engine(**arguments)
    assert part in str(caught.value)


def test_a_wrong_token_argument_is_not_shown():
    with pytest.raises(ArgumentTypeError) as caught:
        open_engine([SHM], 4096, b"the secret itself")
    assert "the secret itself" not in str(caught.value)


@pytest.mark.parametrize("host", ["192.0.2.7", "10.1.2.3", "2001:db8::1"])
def test_an_address_that_others_reach_needs_to_be_allowed(token, host):
    with pytest.raises(ArgumentValueError, match="allow_remote=True if the network is yours"):
        open_engine([TCP], 4096, token, host=host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_no_address_is_none_to_give_to_peers(token, host):
    with pytest.raises(ArgumentValueError, match="an address that peers can reach"):
        open_engine([TCP], 4096, token, host=host, allow_remote=True)


def test_an_address_of_another_machine_is_named(token):
    with pytest.raises(CapabilityError, match=r"of a socket at '192\.0\.2\.7'"):
        open_engine([TCP], 4096, token, host="192.0.2.7", allow_remote=True)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.2"])
def test_other_names_of_this_machine_will_do(token, host):
    with (
        open_engine([TCP], 4096, token, host=host) as receiver,
        open_engine([TCP], 4096, Token.create(), host=host),
        open_engine([SHM], 4096, token) as sender,
    ):
        assert sender.connect(receiver.address, 5).alive


def test_the_log_and_the_address_hold_no_secret(token, caplog):
    with caplog.at_level("DEBUG"), open_engine([SHM], 4096, token) as engine:
        engine.connect(engine.address, 5)
        secret = token._secret.hex()
        assert secret not in caplog.text + engine.address + repr(engine)
        assert "\n" not in engine.address
