"""What every transfer engine does, and no more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, Self

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    from torch import Tensor

__all__ = ["Engine", "Peer"]


class Engine(Protocol):
    """A process's pool, and its way into the pools of others.

    Who has the launch token may write anywhere in the pool. Who may write where, and when, is
    agreed on by the layer above. All methods may be called from any thread; in a forked child all
    but ``close``, which does nothing there, raise ForkError.

    Attributes
    ----------
    name : str
        ``"shm"``, ``"tcp"`` or ``"mooncake"``.
    id : str
        16 hexadecimal digits, new with each engine; how others know it.
    address : str
        What a peer passes to :meth:`connect`: one line, no secret.
    size_bytes : int
    memory : Tensor, uint8, [size_bytes], on the CPU
        The pool. Peers write into it at any time. Views of it stay good after :meth:`close`.
    dropped : Mapping of str to int
        Connections and frames that were dropped, by reason.
    """

    name: str
    id: str
    size_bytes: int

    @property
    def address(self) -> str: ...  # noqa: D102 - see the class
    @property
    def memory(self) -> Tensor: ...  # noqa: D102
    @property
    def dropped(self) -> Mapping[str, int]: ...  # noqa: D102

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None: ...

    def connect(self, address: str, timeout_s: float) -> Peer:
        """Return the pool of the engine at ``address``.

        Raises
        ------
        PeerTimeoutError
            If it did not answer in ``timeout_s`` seconds.
        PeerRefusedError
            If one of the two has another token or uid.
        PeerError
            If nobody is there, or it is no engine.
        ArgumentTypeError, ArgumentValueError, ClosedError, ForkError
        """
        ...

    def writers(self) -> Mapping[str, bool]:
        """Return the ``id`` of each engine that connected here, and whether it can still write.

        False: nothing of it will land any more, its process being gone or its mapping. Of those
        the last 1024 are listed; who is not listed cannot write.
        """
        ...

    def refuse(self, engine_id: str) -> bool:
        """Take no connection of an engine from now on, and say whether it can still write.

        For a writer that was taken for dead and may only be stopped: what it has been told to
        write it could write after its memory was given to others. Where a connection can be cut
        (tcp), it is; where the pool is mapped (shm) or written by a network's hardware (mooncake),
        only the end of the writer's process or peer takes its access away. So call it again, or
        look at :meth:`writers`, until it says False: nothing of that engine lands after that.

        Parameters
        ----------
        engine_id : str
            Its ``id``. That of an engine that never was is taken as well.

        Notes
        -----
        65,536 are remembered. After that none more is: the answer is True for good, and the log
        says so.
        """
        ...

    def close(self) -> None:
        """Let go of all peers, connections, threads and files. Once is enough."""
        ...


class Peer(Protocol):
    """Another engine's pool, as this process may write it.

    Attributes
    ----------
    id : str
        That engine's ``id``.
    size_bytes : int
    memory : Tensor, uint8, [size_bytes], on the CPU, or None
        The pool itself, mapped here: what is written into it has landed. None: use :meth:`write`.
    """

    id: str
    size_bytes: int

    @property
    def memory(self) -> Tensor | None: ...  # noqa: D102 - see the class

    @property
    def alive(self) -> bool:
        """Whether it is connected, as far as is known here; a hung process is alive."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None: ...

    def fileno(self) -> int:
        """Return a descriptor that polls as readable once the peer is gone; -1 after close."""
        ...

    def write(self, source: Tensor, offset: int, timeout_s: float) -> None:
        """Write into the peer's pool; return when the bytes have landed.

        Writes of several threads go one after the other.

        Parameters
        ----------
        source : Tensor, uint8, [n], contiguous, on the CPU
            Not to be changed before the return.
        offset : int
            In bytes; ``[offset, offset + n)`` lies in the pool.
        timeout_s : float
            Seconds at most, the wait for other threads included; a quarter of one more where it
            is to be seen whether bytes may land later.

        Raises
        ------
        LateWriteError
            If they had not landed by then, and still may; this peer takes no more. They land no
            more once this engine is closed and :meth:`Engine.writers` there says False.
        PeerTimeoutError
            If they had not landed by then, and never will.
        PeerError
            If the peer is gone or refused them; some may have landed.
        ArgumentTypeError, ArgumentValueError, ClosedError, ForkError
            Nothing was written.
        """
        ...

    def close(self) -> None:
        """Disconnect. Once is enough; a :meth:`write` that runs fails."""
        ...
