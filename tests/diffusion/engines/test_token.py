"""The token reaches the processes of its launch and nobody else."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys

import pytest

from hwcore.diffusion.engines import Token
from hwcore.errors import ArgumentTypeError, ArgumentValueError

READ = "from hwcore.diffusion.engines import Token; print(Token.from_environment().mac(b'x').hex())"


def same(one, other):
    return one.mac(b"purpose", b"part") == other.mac(b"purpose", b"part")


def test_each_is_another():
    assert not same(Token.create(), Token.create())


def test_it_is_not_shown():
    token = Token(b"sixteen bytes or")
    for text in (repr(token), str(token), f"{token}"):
        assert text == "<hwcore Token>"
    assert repr(Token.off()) == "<hwcore Token, off>"


def test_the_borders_and_the_purpose_of_what_is_signed_count():
    token = Token.create()
    said = {
        token.mac(b"a", b"bc"), token.mac(b"a", b"b", b"c"), token.mac(b"ab", b"c"),
        token.mac(b"a", b"bc", b""),
    }  # fmt: skip
    assert len(said) == 4


def test_a_file_is_its_owners_and_is_not_overwritten(tmp_path):
    token, path = Token.create(), tmp_path / "token"
    before = os.umask(0)
    try:
        token.save(path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600
    assert same(Token.from_file(path), token)
    with pytest.raises(FileExistsError):
        Token.create().save(path)
    assert same(Token.from_file(path), token)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o610])
def test_a_file_that_is_open_to_others_is_refused(tmp_path, mode):
    path = tmp_path / "token"
    Token.create().save(path)
    path.chmod(mode)
    with pytest.raises(ArgumentValueError, match="chmod 600"):
        Token.from_file(path)


def test_somebody_elses_file_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "token"
    Token.create().save(path)
    mine = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: mine + 1)
    with pytest.raises(ArgumentValueError, match=f"owner {mine}"):
        Token.from_file(path)


def test_a_link_a_pipe_and_nothing_are_refused(tmp_path):
    path = tmp_path / "token"
    Token.create().save(path)
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(OSError, match="symbolic links"):
        Token.from_file(tmp_path / "link")
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(ArgumentValueError, match="expected mode -rw"):
        Token.from_file(tmp_path / "pipe")  # and it does not wait for a writer
    with pytest.raises(FileNotFoundError):
        Token.from_file(tmp_path / "missing")


@pytest.mark.parametrize("text", [b"", b"zz" * 16, b"ab", b"\xff" * 32, b"ab" * 5000])
def test_what_is_no_token_is_not_shown_either(tmp_path, text):
    path = tmp_path / "token"
    path.write_bytes(text)
    path.chmod(0o600)
    with pytest.raises(ArgumentValueError, match="that are no token") as caught:
        Token.from_file(path)
    assert not text.strip() or text.decode(errors="replace")[:8] not in str(caught.value)


def test_a_descriptor_serves_many_children():
    token = Token.create()
    fd = token.descriptor()
    try:
        for _ in range(2):
            assert same(Token.from_descriptor(os.dup(fd)), token)
        with pytest.raises(PermissionError):
            os.pwrite(fd, b"x", 0)
    finally:
        os.close(fd)


def test_a_pipe_serves_as_well():
    token = Token(b"sixteen bytes or")
    reading, writing = os.pipe()
    os.write(writing, b"sixteen bytes or".hex().encode())
    os.close(writing)
    assert same(Token.from_descriptor(reading), token)
    with pytest.raises(OSError):  # noqa: PT011 - it was closed
        os.fstat(reading)


@pytest.mark.parametrize("way", ["descriptor", "file"])
def test_a_child_finds_it_in_its_environment(tmp_path, way):
    token, path = Token.create(), tmp_path / "token"
    token.save(path)
    fd = token.descriptor()
    variable = {"HWCORE_TOKEN_FD": str(fd)} if way == "descriptor" else {
        "HWCORE_TOKEN_FILE": str(path)
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", READ], pass_fds=[fd], env={**os.environ, **variable}, check=True,
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    os.close(fd)
    assert done.stdout.strip() == token.mac(b"x").hex()


def test_an_environment_without_one_says_how_to_have_one(monkeypatch):
    monkeypatch.delenv("HWCORE_TOKEN_FD", raising=False)
    monkeypatch.delenv("HWCORE_TOKEN_FILE", raising=False)
    with pytest.raises(ArgumentValueError, match=r"pass Token\.off\(\)"):
        Token.from_environment()
    monkeypatch.setenv("HWCORE_TOKEN_FD", "three")
    with pytest.raises(ArgumentValueError, match="HWCORE_TOKEN_FD got 'three'"):
        Token.from_environment()


@pytest.mark.parametrize(
    ("secret", "error"),
    [("a" * 32, ArgumentTypeError), (b"short", ArgumentValueError), (None, ArgumentTypeError)],
)
def test_a_secret_that_is_none_is_not_shown(secret, error):
    with pytest.raises(error) as caught:
        Token(secret)
    assert secret is None or repr(secret) not in str(caught.value)


def test_it_goes_to_spawned_children_as_an_argument():
    token = Token.create()
    assert same(pickle.loads(pickle.dumps(token)), token)
    assert pickle.loads(pickle.dumps(Token.off())).is_off
