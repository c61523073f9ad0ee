"""Logit processors: what changes the target's logits before verification samples from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch

from hwcore._checks import is_captured
from hwcore.errors import ArgumentTypeError, CaptureError, describe

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    LogitProcessor: TypeAlias = Callable[["WalkedRows"], Tensor]

__all__ = ["HostLogitProcessor", "LogitProcessor", "WalkedRows"]


@dataclass(frozen=True, eq=False, slots=True)
class WalkedRows:
    """The logits at the nodes that the walks have come to, and the way there.

    Attributes
    ----------
    logits : Tensor, float32, [k, vocab], device
        Before temperature. A copy: the processor may change and return it.
    requests : Tensor, int64, [k], device
        Which request of the batch each row belongs to.
    path_tokens : Tensor, int64, [k, depth], device
        The tokens of the path, the root's first and the node's own last. Where a walk has ended
        before the others, which can happen on a device, -1 follows. What came before the root is
        the caller's to know.
    """

    logits: Tensor
    requests: Tensor
    path_tokens: Tensor


class HostLogitProcessor:
    """A logit processor that runs on the host, for grammars and the like.

    Each level of each verification waits for the device: a named sync. It cannot be captured.

    Parameters
    ----------
    function : callable
        Called for each level with the logits, float32 [k, vocab] in host memory, which it may
        change; the requests, a list of int; and the tokens of their paths, a list of lists of
        int. Returns the new logits.
    name : str, optional
        How messages call it; by default the function's own name.

    Attributes
    ----------
    host_syncs : int
        How often the host has waited for the device on its account.
    why_not_captured : str
        The reason for which a worker's ``can_run`` says no to graphs.

    Raises
    ------
    ArgumentTypeError
        If ``function`` cannot be called.
    """

    def __init__(
        self,
        function: Callable[[Tensor, list[int], list[list[int]]], Tensor],
        name: str | None = None,
    ) -> None:
        if not callable(function):
            fix = "Pass a function of logits, requests and paths"
            got = describe("HostLogitProcessor", "function", function, "a callable", fix)
            raise ArgumentTypeError(got)
        self._function = function
        self.name = name or getattr(function, "__name__", type(function).__name__)
        self.host_syncs = 0
        self.why_not_captured = (
            f"logit processor `{self.name}` runs on the host, once for each level of the tree"
        )

    def __call__(self, rows: WalkedRows) -> Tensor:
        """Process the rows of one level.

        Raises
        ------
        CaptureError
            While a graph is being captured.
        """
        if is_captured(rows.logits):
            message = (
                f"hwcore: {self.why_not_captured}, which a graph cannot hold; expected a "
                f"processor on the device. Do not capture it."
            )
            raise CaptureError(message)
        if rows.logits.device.type != "cpu":
            self.host_syncs += 1
        requests: Sequence[int] = rows.requests.tolist()
        paths = [[t for t in path if t >= 0] for path in rows.path_tokens.tolist()]
        processed = self._function(rows.logits.cpu(), list(requests), paths)
        if not isinstance(processed, torch.Tensor):
            what, fix = f"what `{self.name}` returned", "Return the logits, changed"
            raise ArgumentTypeError(
                describe("HostLogitProcessor", what, processed, "a tensor", fix)
            )
        return processed.to(rows.logits.device)
