"""Outputs on their way to the next role."""

from __future__ import annotations

import logging
import time
import traceback
from typing import TYPE_CHECKING, NamedTuple

from hwcore.errors import HwcoreError, LateWriteError

if TYPE_CHECKING:
    from hwcore.diffusion.router.todo import Transfer
    from hwcore.diffusion.serving.config import WorkerConfig
    from hwcore.diffusion.serving.jobs import Job
    from hwcore.diffusion.serving.spans import Spans
    from hwcore.diffusion.transfer import DiffusionTransferManager

__all__ = ["Sent", "send_output"]

_log = logging.getLogger("hwcore")


class Sent(NamedTuple):
    """What became of a push.

    Attributes
    ----------
    seal : bytes
        What the receiver needs; empty where it failed.
    failure : str
        Why; empty where it did not.
    is_late : bool
        It failed, and bytes of it may land later.
    """

    seal: bytes
    failure: str = ""
    is_late: bool = False


def send_output(
    manager: DiffusionTransferManager,
    config: WorkerConfig,
    job: Job,
    todo: Transfer,
    spans: Spans,
) -> Sent:
    """Write a job's output into a slot of another worker. Raises nothing but what ends threads."""
    parts: list[tuple[str, float, float]] = []
    started = time.monotonic()
    try:
        seal = manager.send_tensors(
            job.transfer_id,
            job.output,
            todo.address,
            todo.slot,
            timeout_s=config.push_timeout_s,
            on_part=(lambda *part: parts.append(part)) if spans.are_wanted else None,
        )
        sent = Sent(seal)
    except Exception as error:  # noqa: BLE001 - the router waits for a word
        failure = f"{type(error).__name__}: {error}"
        text = failure if isinstance(error, HwcoreError) else traceback.format_exc()
        _log.warning("%s: request %s was not pushed: %s", config.name, job.request_id, text)
        sent = Sent(b"", failure, isinstance(error, LateWriteError))
    if spans.are_wanted:
        if not any(kind == "push" for kind, _, _ in parts):  # all of it was mapped here
            staged = max((ended for _, _, ended in parts), default=started)
            parts.append(("push", staged, time.monotonic()))
        for kind, began, ended in parts:
            spans.add(job.request_id, kind, began, ended)
    return sent
