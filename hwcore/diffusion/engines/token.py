"""The secret that the processes of one launch share; whoever lacks it may write nowhere."""

from __future__ import annotations

import fcntl
import hmac
import os
import secrets
import stat
from typing import TYPE_CHECKING

from hwcore import _env
from hwcore.errors import ArgumentTypeError, ArgumentValueError, describe

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Token"]

_LEAST_BYTES = 16
_MOST_BYTES = 4096


class Token:
    """The secret of one launch. Its repr does not show it.

    Made once by whoever starts the processes (:meth:`create`), and handed to each by an inherited
    descriptor (:meth:`descriptor`, :meth:`from_descriptor`) or by a file that no other user may
    read (:meth:`save`, :meth:`from_file`). Never by an argument or a variable: others can read
    those.

    Parameters
    ----------
    secret : bytes
        At least 16 of them, random.
    """

    __slots__ = ("_off", "_secret")

    def __init__(self, secret: bytes) -> None:
        fix = "Make one with Token.create()"
        if not isinstance(secret, bytes):
            shape = type(secret).__name__  # the value itself is not for a traceback
            raise ArgumentTypeError(describe("Token", "`secret`", shape, "bytes", fix))
        if not _LEAST_BYTES <= len(secret) <= _MOST_BYTES:
            expected = f"{_LEAST_BYTES} to {_MOST_BYTES} bytes"
            got = f"{len(secret)} bytes"
            raise ArgumentValueError(describe("Token", "`secret`", got, expected, fix))
        self._secret = secret
        self._off = False

    def __repr__(self) -> str:
        return "<hwcore Token, off>" if self._off else "<hwcore Token>"

    @property
    def is_off(self) -> bool:
        """Whether this is :meth:`off`."""
        return self._off

    @classmethod
    def create(cls) -> Token:
        """Return a new random token."""
        return cls(secrets.token_bytes(32))

    @classmethod
    def off(cls) -> Token:
        """Return the token that authenticates nobody: any local process may then write.

        All processes of a launch must use it, or none. An engine that is opened with it says so
        in the log.
        """
        token = cls(b"no authentication")
        token._off = True
        return token

    # --- To another process ---

    def save(self, path: str | Path) -> None:
        """Write a new file that its owner alone may read.

        Raises
        ------
        FileExistsError
            If there is one: it is not overwritten.
        """
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(fd, "wb") as file:
            os.fchmod(fd, 0o600)  # whatever the umask took or left
            file.write(self._secret.hex().encode())

    @classmethod
    def from_file(cls, path: str | Path) -> Token:
        """Read what :meth:`save` wrote.

        Raises
        ------
        ArgumentValueError
            If the file is a link, somebody else's, open to others, or holds no token.
        OSError
            If it cannot be read.
        """
        where, what = "Token.from_file", f"the file {os.fspath(path)}"
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, "rb") as file:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_mode & 0o077:
                got, fix = stat.filemode(status.st_mode), "Run chmod 600 on it, or make a new one"
                raise ArgumentValueError(describe(where, what, got, "mode -rw-------", fix))
            if status.st_uid != os.geteuid():
                got, expected = f"owner {status.st_uid}", f"owner {os.geteuid()}, this process's"
                fix = "Have the same user write it with Token.save"
                raise ArgumentValueError(describe(where, what, got, expected, fix))
            return cls._decoded(where, what, file.read(2 * _MOST_BYTES + 1))

    def descriptor(self) -> int:
        """Return a new descriptor that holds the token, for ``pass_fds`` of a child.

        Any number of children may read it. Close it once they are started.
        """
        fd = os.memfd_create("hwcore-token", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.write(fd, self._secret.hex().encode())
        seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        return fd

    @classmethod
    def from_descriptor(cls, fd: int) -> Token:
        """Read a token from an inherited descriptor, a file's or a pipe's, and close it.

        Raises
        ------
        ArgumentValueError
            If it holds none.
        OSError
            If it cannot be read.
        """
        with open(fd, "rb", buffering=0) as file:
            if file.seekable():
                text = os.pread(fd, 2 * _MOST_BYTES + 1, 0)  # the position is every child's
            else:
                text = b""
                while len(text) <= 2 * _MOST_BYTES and (part := file.read(_MOST_BYTES)):
                    text += part
        return cls._decoded("Token.from_descriptor", f"descriptor {fd}", text)

    @classmethod
    def from_environment(cls) -> Token:
        """Read the token that ``HWCORE_TOKEN_FD`` or ``HWCORE_TOKEN_FILE`` points to.

        The descriptor comes first. It can be read once in a process; children find no
        ``HWCORE_TOKEN_FD`` afterwards.

        Raises
        ------
        ArgumentValueError
            If neither is set, or what is set holds no token.
        OSError
            If it cannot be read.
        """
        number, path = os.environ.get(_env.TOKEN_FD, ""), os.environ.get(_env.TOKEN_FILE, "")
        if number:
            if not (number.isascii() and number.isdigit()):
                what = f"the variable {_env.TOKEN_FD}"
                fix = "Set it to what Token.descriptor() returned, and pass that descriptor"
                raise ArgumentValueError(describe("Token", what, number, "a number", fix))
            token = cls.from_descriptor(int(number))
            del os.environ[_env.TOKEN_FD]
            return token
        if path:
            return cls.from_file(path)
        what = f"{_env.TOKEN_FD} and {_env.TOKEN_FILE}"
        fix = "Set one where the process is started; to do without a token pass Token.off()"
        raise ArgumentValueError(describe("Token", what, None, "one of them to be set", fix))

    @classmethod
    def _decoded(cls, where: str, what: str, text: bytes) -> Token:
        try:
            return cls(bytes.fromhex(text.decode("ascii").strip()))
        except ValueError:  # ours of a wrong length among them
            got = f"{len(text)} bytes that are no token"
            fix = "Write it with Token.save or Token.descriptor"
            raise ArgumentValueError(describe(where, what, got, "a token", fix)) from None

    # --- Use ---

    def mac(self, purpose: bytes, *parts: bytes) -> bytes:
        """Return 32 bytes that only who has the token can make for this purpose and parts."""
        return mac(self._secret, purpose, *parts)


def mac(key: bytes, purpose: bytes, *parts: bytes | bytearray | memoryview) -> bytes:
    """Return HMAC-SHA-256 of parts whose borders count."""
    text = b"".join(len(part).to_bytes(4, "big") + part for part in (purpose, *parts))
    return hmac.digest(key, text, "sha256")
