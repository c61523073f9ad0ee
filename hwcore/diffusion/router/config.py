"""What may be set of a router."""

from __future__ import annotations

import dataclasses
from typing import Literal, TypeAlias

from hwcore._checks import check_size, is_number
from hwcore.diffusion.roles import PIPELINE, RoleType
from hwcore.errors import ArgumentTypeError, ArgumentValueError, describe

__all__ = ["MOST_BYTES", "Policy", "RouterConfig"]

MOST_BYTES = 1 << 30
"""Of the frames of one message; clients and workers take no more from a router."""

Policy: TypeAlias = Literal["round_robin", "max_free_slots"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """The limits of a router.

    Attributes
    ----------
    pipeline : tuple of RoleType
        The roles that a request passes, in order.
    policy : str
        Which of the workers that could take a job does: each in turn, or the one that could take
        most.
    max_requests : int
        Requests that are not over; a client that submits another is told that the router is busy.
    max_workers : int
        One too many is not taken, which the router says in its log.
    max_input_bytes, max_result_bytes : int
        The largest of each that is taken, at most 1 GiB.
    max_waiting_bytes : int
        Inputs of all requests that are not over; who submits more is told that the router is busy.
    max_rounds : int
        How often a request is begun anew because a worker died or failed.
    heartbeat_s : float
        How often a worker says that it is alive.
    dead_after_s : float
        Without a word for so long a worker is taken for dead, and a client for gone.
    resend_after_s : float
        What got no answer for so long is said again.
    job_timeout_s : float
        How long a worker may compute.
    push_timeout_s : float
        How long an output may be on its way.
    keep_results_s, keep_results_bytes : float, int
        How long, and how much of them, results are kept for a client that asks again.
    """

    pipeline: tuple[RoleType, ...] = PIPELINE
    policy: Policy = "round_robin"
    max_requests: int = 4096
    max_workers: int = 1024
    max_input_bytes: int = 64 << 20
    max_result_bytes: int = 256 << 20
    max_waiting_bytes: int = 1 << 30
    max_rounds: int = 3
    heartbeat_s: float = 0.5
    dead_after_s: float = 3.0
    resend_after_s: float = 1.0
    job_timeout_s: float = 120.0
    push_timeout_s: float = 30.0
    keep_results_s: float = 60.0
    keep_results_bytes: int = 64 << 20

    def __post_init__(self) -> None:
        """Check every value."""
        where = "RouterConfig"
        if not self.pipeline or not all(isinstance(role, RoleType) for role in self.pipeline):
            expected, fix = "at least one RoleType", "Leave it out for the usual three"
            raise ArgumentValueError(describe(where, "pipeline", self.pipeline, expected, fix))
        if self.policy not in ("round_robin", "max_free_slots"):
            expected, fix = "`round_robin` or `max_free_slots`", "Take one of the two"
            raise ArgumentValueError(describe(where, "policy", self.policy, expected, fix))
        for field in dataclasses.fields(self):
            if field.name.startswith("max_"):
                check_size(where, field.name, getattr(self, field.name), 1, "Pass a count")
        check_size(where, "keep_results_bytes", self.keep_results_bytes, 0, "Pass a count")
        for name in ("max_input_bytes", "max_result_bytes"):
            if getattr(self, name) > MOST_BYTES:
                fix, got = "Send less in one message, or a file's name", getattr(self, name)
                raise ArgumentValueError(describe(where, name, got, f"at most {MOST_BYTES}", fix))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not field.name.endswith("_s"):
                continue
            if not is_number(value):
                fix = "Pass seconds"
                raise ArgumentTypeError(describe(where, field.name, value, "a number", fix))
            if not 0 < value < float("inf"):
                fix = "Pass seconds, more than none"
                raise ArgumentValueError(describe(where, field.name, value, "more than 0", fix))
        if self.dead_after_s < 2 * self.heartbeat_s:
            expected = f"at least two heartbeats of {self.heartbeat_s} s"
            fix = "Raise it, or let workers speak more often"
            got = self.dead_after_s
            raise ArgumentValueError(describe(where, "dead_after_s", got, expected, fix))
