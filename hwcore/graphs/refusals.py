"""What a graph runner refuses, in words."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from hwcore.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    CaptureError,
    HwcoreError,
    describe,
)
from hwcore.graphs.prepared import Prepared

if TYPE_CHECKING:
    from hwcore.graphs.prepared import Verdict

__all__ = ["as_tuple", "at_least", "misuse", "refuse_batch", "refuse_prepared", "refuse_recomputed"]


def at_least(where: str, least: int, **numbers: object) -> None:
    """Raise unless every number is an int, and not below ``least``."""
    for name, number in numbers.items():
        if type(number) is not int or number < least:
            message = describe(where, f"`{name}`", number, f"an int ≥ {least}", "Pass one")
            raise ArgumentValueError(message)


def as_tuple(method: str, seq_lens: object) -> tuple[int, ...]:
    """Return lengths as a tuple; refuse a tensor, whose elements would be read one by one."""
    if not isinstance(seq_lens, (tuple, list)):
        where, fix = f"GraphRunner.{method}", "Pass the lengths as the host knows them"
        expected = "a tuple or list of ints"
        raise ArgumentTypeError(describe(where, "`seq_lens`", seq_lens, expected, fix))
    return tuple(seq_lens)


def misuse(
    method: str, got: str, expected: str, fix: str, kind: type[HwcoreError] = CaptureError
) -> NoReturn:
    """Refuse a call that the runner is in no state for."""
    message = f"GraphRunner.{method}: the call got {got}; expected {expected}. {fix}."
    raise kind(message)


def refuse_batch(method: str, verdict: Verdict) -> NoReturn:
    """Refuse a batch that no graph takes."""
    fix = "Add a bucket, or ask can_run() and run it eagerly: run(..., or_eager=True)"
    message = f"GraphRunner.{method}: the batch got no graph: {verdict.reason}. {fix}."
    raise (CaptureError if verdict.kind == "not captured" else ArgumentValueError)(message)


def refuse_prepared(prepared: object) -> NoReturn:
    """Refuse to replay what is not in the buffers."""
    expected, fix = "the latest of prepare(), not replayed yet", "Prepare the batch again"
    kind = ArgumentValueError if isinstance(prepared, Prepared) else ArgumentTypeError
    raise kind(describe("GraphRunner.replay", "`prepared`", prepared, expected, fix))


def refuse_recomputed(given: list[str], lacking: frozenset[str]) -> NoReturn:
    """Refuse to replay before all inputs are there, and can be trusted."""
    expected = (
        f"{', '.join(sorted(lacking))} among them, not given to prepare(), or not trusted by this "
        f"device after a plan stream"
    )
    fix = "Compute it on the replaying stream and pass it"
    message = describe("GraphRunner.replay", "`recomputed`", given, expected, fix)
    raise ArgumentValueError(message)
