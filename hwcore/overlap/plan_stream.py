"""PlanStream: the next step is prepared on a side stream, and joined before it is used."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch.utils._pytree import tree_leaves

from hwcore import _env
from hwcore.errors import ArgumentValueError, CapabilityError, describe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor

    from hwcore.backend import Backend
    from hwcore.types import Stream

    Recompute = Callable[[Mapping[str, Any], Any], Tensor]

__all__ = ["PlanStream", "Prepared", "recomputes"]

_registered: dict[str, Recompute] = {}


def recomputes(name: str) -> Callable[[Recompute], Recompute]:
    """Register how an output of a block is computed again after the join, as a decorator.

    Parameters
    ----------
    name : str
        The output, such as ``"mrope_positions"``: what a backend's
        ``plan_stream_policy().recompute_after_join`` calls it.

    Returns
    -------
    decorator
        For a function of the block's outputs and of what ``join`` was given as ``context``; it
        returns the tensor that takes the output's place, and runs on the stream that joins.

    Raises
    ------
    ArgumentValueError
        If the name has another function already.
    """

    def register(function: Recompute) -> Recompute:
        if _registered.setdefault(name, function) is not function:
            expected, fix = "a name that has none", "Pass PlanStream(recompute=...) instead"
            raise ArgumentValueError(describe("recomputes", "`name`", name, expected, fix))
        return function

    return register


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Prepared:
    """What a joined block hands over.

    Attributes
    ----------
    outputs : dict of str to any
        What the block put there, with the recomputed tensors in their places.
    recomputed : dict of str to Tensor
        Those alone: what ``ReplayBatch.recomputed`` tells a backend.
    plan_stream_active : bool
        The block ran on a side stream.
    """

    outputs: dict[str, Any]
    recomputed: dict[str, Tensor]
    plan_stream_active: bool


class PlanStream:
    """Prepares a step on a side stream while the main stream works.

    >>> plan = PlanStream()
    >>> draft_tokens, seq_lens = draft()
    >>> plan.mark()  # a block may read what was submitted so far
    >>> forward()
    >>> with plan.block(draft_tokens, seq_lens) as outputs:
    ...     outputs["positions"] = positions_of(draft_tokens, seq_lens)
    >>> prepared = plan.join()
    >>> verify(prepared.outputs["positions"])

    The block's stream waits for the mark (without one since the last block: for all that the main
    stream holds when the block is entered) before anything in it runs. ``join`` makes its own
    stream wait for the block, marks the outputs' memory as used there, and computes again what the
    backend does not trust across the join (``plan_stream_policy().recompute_after_join``). The
    host waits for nothing.

    Parameters
    ----------
    backend : Backend, optional
        By default the process's own.
    device : torch.device, optional
        By default the backend's current one.
    enabled : bool, optional
        The user's switch; by default ``HWCORE_PLAN_STREAM``, else what the backend's policy says.
        Off, a block runs on the stream that enters it, with the same results.
    recompute : mapping of str to callable, optional
        Functions as :func:`recomputes` takes them, before those.

    Attributes
    ----------
    enabled : bool
    reason : str
        Why not.

    Raises
    ------
    CapabilityError
        If it is switched on, but the backend's policy is off and its device has no streams that
        run side by side.

    Notes
    -----
    What this cannot stop, and the race sanitizer reports:

    - A block that reads a tensor of the main stream written after the mark.
    - A block that writes memory that the main stream still reads, such as a static buffer: put
      both into the blocks of a :class:`StreamFence`.
    - A tensor that is read in a block without being passed to it, and freed before the block has
      run: passing it keeps its memory.
    - The main stream reading memory that the block wrote, before ``join``.

    One block at a time, in one thread. An exception in a block ends it, leaves the streams as they
    were before it, and is raised by ``join``; one that is no ``Exception`` (KeyboardInterrupt)
    passes through at once.

    Source: SGLang's plan stream for EAGLE v2, whose races on three devices (pull requests 23423,
    22113, 28034) were each mended on one.
    """

    def __init__(
        self,
        *,
        backend: Backend | None = None,
        device: torch.device | None = None,
        enabled: bool | None = None,
        recompute: Mapping[str, Recompute] | None = None,
    ) -> None:
        from hwcore.activation import current_backend

        self._backend = backend or current_backend()
        self._device = device or self._backend.device()
        policy = self._backend.plan_stream_policy()
        self._untrusted = policy.recompute_after_join
        self._functions = dict(recompute or {})
        wanted = _env.plan_stream() if enabled is None else enabled
        info = self._backend.info
        if wanted and not policy.enabled and "async_streams" not in info.capabilities:
            message = (
                f"PlanStream: it is switched on, but backend `{info.name}` cannot: "
                f"{policy.reason}; expected a device that can, or the switch off. "
                f"Leave out enabled=True and unset {_env.PLAN_STREAM}."
            )
            raise CapabilityError(message)
        self.enabled = policy.enabled if wanted is None else wanted
        self.reason = "" if self.enabled else policy.reason or "it was switched off"
        self._stream: Stream | None = None
        if self.enabled:
            self._stream = self._backend.create_stream(self._device)
        self._frontier = self._backend.create_event(self._device)
        self._planned = self._backend.create_event(self._device)
        self._marked = False
        self._inside = False
        self._outputs: dict[str, Any] | None = None
        self._error: Exception | None = None

    def __repr__(self) -> str:
        return f"<hwcore PlanStream {'on' if self.enabled else f'off: {self.reason}'}>"

    def mark(self) -> None:
        """Let the next block read what the current stream holds now, and not wait for more."""
        if self._inside:
            _misuse("mark", "a block is open", "Mark on the main stream, before the block")
        self._backend.record_event(self._frontier, self._backend.current_stream(self._device))
        self._marked = True

    @contextlib.contextmanager
    def block(self, *inputs: Any) -> Iterator[dict[str, Any]]:
        """Run a block on the plan stream.

        Parameters
        ----------
        *inputs : tensors, or lists, tuples and dicts of them
            What the block reads of the main stream's. Their memory is kept until it has.

        Yields
        ------
        outputs : dict
            Where the block puts what ``join`` is to hand over.

        Raises
        ------
        ArgumentValueError
            If a block is open, or the last one was not joined; the error of that one is the cause.
        """
        if self._inside or self._outputs is not None:
            got = "a block is open" if self._inside else "the last block was not joined"
            _misuse("block", got, "Call join() between blocks", self._error)
        backend = self._backend
        main = backend.current_stream(self._device)
        stream = main if self._stream is None else self._stream
        if not self._marked:
            self.mark()
        backend.wait_event(self._frontier, stream)
        if stream is not main:
            for tensor in _tensors(inputs):
                backend.record_stream(tensor, stream)
        self._inside, self._marked = True, False
        outputs: dict[str, Any] = {}
        try:
            with backend.stream_context(stream):
                try:
                    yield outputs
                finally:
                    backend.record_event(self._planned, stream)
        except Exception as error:  # noqa: BLE001 - join raises it
            self._error = error
        finally:
            self._inside = False
        self._outputs = outputs

    def join(self, context: Any = None) -> Prepared:
        """Make the current stream wait for the block, and take over its outputs.

        Parameters
        ----------
        context : any
            What functions that recompute are given beside the outputs, such as the batch.

        Returns
        -------
        Prepared

        Raises
        ------
        Exception
            What was raised in the block.
        ArgumentValueError
            If there is no block to join.
        CapabilityError
            If the backend wants an output recomputed and nobody said how.
        """
        if self._inside or self._outputs is None:
            got = "the block is still open" if self._inside else "there is no block to join"
            _misuse("join", got, "Leave a block() first")
        outputs, error = self._outputs, self._error
        self._outputs = self._error = None
        backend = self._backend
        consumer = backend.current_stream(self._device)
        backend.wait_event(self._planned, consumer)
        if self._stream is not None:
            for tensor in _tensors(outputs):
                backend.record_stream(tensor, consumer)
        if error is not None:
            raise error
        recomputed: dict[str, Tensor] = {}
        if self.enabled:
            for name in sorted(self._untrusted & outputs.keys()):
                recomputed[name] = self._function(name)(outputs, context)
        return Prepared({**outputs, **recomputed}, recomputed, self.enabled)

    def _function(self, name: str) -> Recompute:
        function = self._functions.get(name) or _registered.get(name)
        if function is None:
            message = (
                f"PlanStream.join: backend `{self._backend.info.name}` wants `{name}` recomputed "
                f"after the join, and there is no function for it; expected one. Decorate it with "
                f"hwcore.overlap.recomputes({name!r}), or pass PlanStream(recompute=...)."
            )
            raise CapabilityError(message)
        return function


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _misuse(method: str, got: str, fix: str, cause: Exception | None = None) -> NoReturn:
    message = f"PlanStream.{method}: {got}; expected block() and join() in turn. {fix}."
    raise ArgumentValueError(message) from cause
