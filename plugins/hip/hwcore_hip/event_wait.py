"""How a stream waits for an event on AMD GPUs, where the plain wait was seen to cost time.

On MI355 a serving engine lost time per token by a device-side ``Event.wait`` in its overlap path,
and took to waiting on the host (SGLang #26672); a wait for a whole stream between scheduler and
forward cost 20 % of throughput on AMD and nothing elsewhere (SGLang #26380, #26646). Neither was
measured here.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal, cast, get_args

from hwcore.errors import ArgumentValueError, describe

if TYPE_CHECKING:
    from collections.abc import Callable

    from hwcore.types import Event, Stream

__all__ = ["AFFECTED", "VARIABLE", "Policy", "device_waits", "for_architecture", "requested"]

VARIABLE = "HWCORE_HIP_EVENT_WAIT"

Policy = Literal["device", "pending", "host"]
"""``device``: the plain wait. ``pending``: the same, left out where there is nothing to wait for
any more, so that the queue gets no barrier. ``host``: the host waits instead, as the engine did;
its overlap then ends at every such wait, which breaks what ``wait_event`` promises."""

AFFECTED = ("gfx942", "gfx950")
"""MI300 and MI355, by the architecture that the device's properties name."""


def requested() -> Policy | None:
    """Return the policy that the variable names, or None where it is not set.

    Raises
    ------
    ArgumentValueError
        If it names none.
    """
    asked = os.environ.get(VARIABLE, "")
    if asked and asked not in get_args(Policy):
        expected, fix = f"one of {', '.join(get_args(Policy))}", "Set one of them, or unset it"
        raise ArgumentValueError(describe("hwcore-hip", VARIABLE, asked, expected, fix))
    return cast("Policy", asked) if asked else None


def for_architecture(architecture: str) -> Policy:
    """Return the policy for a GPU, by its architecture such as ``"gfx950:sramecc+:xnack-"``."""
    return "pending" if architecture.partition(":")[0] in AFFECTED else "device"


def device_waits(
    policy: Policy, waited_for: Event | Stream, in_capture: Callable[[], bool]
) -> bool:
    """Do what the policy does before a wait of the device; say whether it is still needed.

    Parameters
    ----------
    policy : Policy
    waited_for : Event or Stream
    in_capture : callable
        Whether a graph is captured: then nothing may be asked or waited for by the host.
    """
    if policy == "device" or in_capture():
        return True
    if policy == "host":
        waited_for.synchronize()
        return False
    return not waited_for.query()
