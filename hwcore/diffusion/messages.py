"""What clients, router and workers tell each other.

A *worker* is a process of one role. A *job* is one stage of a request on one worker: a number that
is never used again, so that news of a job that is over cannot be taken for news of another. A
*slot* is memory of a worker's pool that it has granted to the router; one job's output is written
there by the worker of the stage before.

The way of a request, with S and T two workers in its pipeline:

=============  ==================================================================
``Submit``     client to router, with the input
``Work``       router to S, with the input, or the slot that holds it
``Computed``   S to router: the output is ready, and how large it is
``Push``       router to S: write it there, to a slot of T
``Pushed``     S to router: it is there. The router acknowledges by ``Forget``
``Work``       router to T, and so on
``Finished``   the last worker to router, with the result; acknowledged alike
``Result``     router to client
=============  ==================================================================

A client says ``Alive`` once in a while, with the requests that it waits for. What it has missed is
said again then, and what the router does not know, for it is another one by now, it asks for.

Any message may be lost, come twice or late. A worker repeats its last word on a job with every
heartbeat until it is acknowledged, the router repeats what got no answer, and both know by the job,
and by the turn of a push, what they have done already.
"""

from __future__ import annotations

from typing import Annotated, TypeAlias

import msgspec

from hwcore.diffusion.roles import RoleType  # noqa: TC001 - msgspec resolves annotations
from hwcore.errors import PeerError, describe

__all__ = [
    "LARGEST",
    "MOST_FRAMES",
    "VERSION",
    "Abort",
    "Aborted",
    "Alive",
    "Cancel",
    "Computed",
    "Drain",
    "Failed",
    "Finished",
    "Forget",
    "FromClient",
    "FromRouter",
    "FromWorker",
    "Granted",
    "Heartbeat",
    "Progress",
    "Push",
    "Pushed",
    "Refused",
    "Register",
    "Registered",
    "Release",
    "Reset",
    "Result",
    "Slot",
    "Submit",
    "ToClient",
    "Unknown",
    "Want",
    "Welcome",
    "Work",
    "decode",
    "encode",
]

VERSION = 1
"""Raised when a message changes its meaning; both ends must have the same."""

LARGEST = 1 << 20
"""Bytes of an encoded message. Tensors do not travel in it."""

MOST_FRAMES = 4096
"""Frames that follow a message."""

Text = Annotated[str, msgspec.Meta(max_length=4096)]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]
Number = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=1e6)]


class _Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=True):
    """Something said; its class is written with it."""


class Slot(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Memory that a worker has granted.

    Attributes
    ----------
    lease : int
        The pool's name for it, with its generation: never the same for two grants of a worker.
    offset : int
        Bytes from the beginning of the pool.
    size_bytes : int
    """

    lease: Number
    offset: Number
    size_bytes: Number


# --- Clients --------------------------------------------------------------------------------------


class Submit(_Message, frozen=True):
    """A client wants a request served. Its input follows in frames of its own.

    The same request and attempt once more asks for the answer again; nothing is computed twice.
    """

    request_id: Name
    attempt: Count
    deadline_s: Seconds
    skip: Annotated[list[RoleType], msgspec.Meta(max_length=8)] = []
    progress: bool = False


class Cancel(_Message, frozen=True):
    """A client wants no answer any more."""

    request_id: Name
    attempt: Count


class Alive(_Message, frozen=True):
    """A client is there, and waits for these requests, each with its attempt."""

    requests: Annotated[list[tuple[Name, Count]], msgspec.Meta(max_length=1024)] = []


class Welcome(_Message, frozen=True):
    """The router hears the client.

    Attributes
    ----------
    heartbeat_s : float
        How often the client says that it is there.
    input_bytes : int
        No input may be larger.
    """

    heartbeat_s: Seconds
    input_bytes: Number


class Unknown(_Message, frozen=True):
    """The router does not know a request that its client waits for: it is to be submitted anew."""

    request_id: Name
    attempt: Count


class Progress(_Message, frozen=True):
    """Where a request has come to."""

    request_id: Name
    attempt: Count
    role: RoleType
    round: Count


class Result(_Message, frozen=True):
    """A request is done. Its result follows in frames of its own."""

    request_id: Name
    attempt: Count


class Refused(_Message, frozen=True):
    """A request gets no result, and why.

    Attributes
    ----------
    reason : str
        ``busy``, ``duplicate``, ``cancelled``, ``deadline``, ``too large``, ``no workers``,
        ``failed``, ``died`` or ``draining``.
    retryable : bool
        Whether the same request may have a result later.
    """

    request_id: Name
    attempt: Count
    reason: Name
    text: Text
    retryable: bool


# --- Workers --------------------------------------------------------------------------------------


class Register(_Message, frozen=True):
    """A worker is there, or there again with nothing of before.

    Attributes
    ----------
    epoch : int
        Higher at each registration of a process; a new process's is its own.
    address : str
        What the other workers' engines connect to.
    engine : str
        By which they know who connected to them: its id, 16 hexadecimal digits.
    capacity : int
        Jobs that it takes at a time, computing and waiting to be pushed.
    pool_bytes : int
        No output larger than this can be sent to it.
    """

    role: RoleType
    epoch: Number
    address: Text
    engine: Name
    capacity: Annotated[int, msgspec.Meta(ge=1, le=65536)]
    pool_bytes: Number
    slots: Annotated[list[Slot], msgspec.Meta(max_length=4096)] = []


class Heartbeat(_Message, frozen=True):
    """A worker is alive.

    Attributes
    ----------
    epoch : int
    number : int
        Counts up.
    jobs : list of int
        All that it knows.
    slots : list of Slot
        All that it has granted and that hold no job.
    """

    epoch: Number
    number: Number
    jobs: Annotated[list[Number], msgspec.Meta(max_length=65536)] = []
    slots: Annotated[list[Slot], msgspec.Meta(max_length=4096)] = []


class Granted(_Message, frozen=True):
    """More slots."""

    epoch: Number
    slots: Annotated[list[Slot], msgspec.Meta(max_length=4096)]


class Computed(_Message, frozen=True):
    """A job's output is ready to be pushed."""

    epoch: Number
    job: Number
    size_bytes: Number


class Pushed(_Message, frozen=True):
    """A job's output is in the slot that ``turn`` named. Its manifest follows in a frame."""

    epoch: Number
    job: Number
    turn: Count


class Finished(_Message, frozen=True):
    """The last job of a request is done. The result follows in frames."""

    epoch: Number
    job: Number


class Failed(_Message, frozen=True):
    """A job, or a turn of its push, failed.

    Attributes
    ----------
    turn : int
        0: the job itself. Else a push, whose output is still held.
    retryable : bool
        Whether another worker might do better: not so if the input is at fault.
    """

    epoch: Number
    job: Number
    turn: Count
    text: Text
    retryable: bool


class Aborted(_Message, frozen=True):
    """Nothing of a job is left, and nothing of it will be written any more."""

    epoch: Number
    job: Number


# --- The router to workers ------------------------------------------------------------------------
# Each names the epoch that it is meant for: what comes late must not reach a worker that has begun
# again.


class Registered(_Message, frozen=True):
    """The router knows the worker under this epoch; said again after each heartbeat.

    Attributes
    ----------
    result_bytes : int
        No result may be larger.
    """

    epoch: Number
    heartbeat_s: Seconds
    result_bytes: Number = 2**63 - 1


class Reset(_Message, frozen=True):
    """The router knows nothing of the worker under this epoch, or took it for dead.

    What the worker has is worth nothing any more: it begins again with a higher epoch.

    Attributes
    ----------
    known : int
        A higher epoch that the router has seen under the worker's name; 0 if none.
    """

    epoch: Number
    known: Number = 0


class Work(_Message, frozen=True):
    """Compute. The input follows in frames, or lies in ``slot``, its manifest in a frame."""

    epoch: Number
    job: Number
    request_id: Name
    remaining_s: Seconds
    last: bool
    slot: Slot | None = None


class Push(_Message, frozen=True):
    """Write a job's output to a slot of another worker; ``turn`` is higher for each target."""

    epoch: Number
    job: Number
    turn: Count
    address: Text
    slot: Slot


class Forget(_Message, frozen=True):
    """A job is over, and what was said of it has come."""

    epoch: Number
    job: Number


class Abort(_Message, frozen=True):
    """Give a job up, wherever it is; answered by ``Aborted``."""

    epoch: Number
    job: Number


class Want(_Message, frozen=True):
    """A slot of this size is wanted; granted when there is room."""

    epoch: Number
    size_bytes: Number


class Release(_Message, frozen=True):
    """A slot will be used by no job.

    Attributes
    ----------
    writer : str
        The engine, by its id, of a worker that died and may still write there; empty if none may.
    """

    epoch: Number
    slot: Slot
    writer: Annotated[str, msgspec.Meta(max_length=256)] = ""


class Drain(_Message, frozen=True):
    """Take no new work; the router sends none."""

    epoch: Number


FromClient: TypeAlias = Submit | Cancel | Alive
ToClient: TypeAlias = Progress | Result | Refused | Welcome | Unknown
FromWorker: TypeAlias = (
    Register | Heartbeat | Granted | Computed | Pushed | Finished | Failed | Aborted
)
FromRouter: TypeAlias = Registered | Reset | Work | Push | Forget | Abort | Want | Release | Drain

_encoder = msgspec.msgpack.Encoder()
_decoders = {
    kind: msgspec.msgpack.Decoder(kind) for kind in (FromClient, ToClient, FromWorker, FromRouter)
}


def encode(message: _Message) -> bytes:
    """Return a message as one frame."""
    return bytes((VERSION,)) + _encoder.encode(message)


def decode(frame: bytes | memoryview, kind: object) -> _Message:
    """Return the message in a frame.

    Parameters
    ----------
    frame : bytes-like
        From a peer: anything.
    kind : type alias
        ``FromClient``, ``ToClient``, ``FromWorker`` or ``FromRouter``.

    Raises
    ------
    PeerError
        If it is none of that kind, or of another version.
    """
    where, fix = "messages.decode", "Use the same hwcore at both ends"
    if not 1 < len(frame) <= LARGEST:
        expected = f"2 to {LARGEST} bytes"
        raise PeerError(describe(where, "len(frame)", len(frame), expected, fix))
    if frame[0] != VERSION:
        raise PeerError(describe(where, "the version", frame[0], str(VERSION), fix))
    try:
        message: _Message = _decoders[kind].decode(memoryview(frame)[1:])  # type: ignore[index]
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise PeerError(describe(where, "a frame", str(error), "a message", fix)) from error
    return message
