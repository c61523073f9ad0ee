"""One bucket's graph: captured with its outputs, which are handed out without their padding."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_unflatten

from hwcore.errors import CaptureError, shown

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hwcore.backend import Backend
    from hwcore.graphs.buffers import GraphBuffers
    from hwcore.graphs.slots import Bucket
    from hwcore.types import Stream

__all__ = ["Captured", "Outputs", "agree"]

_PLAIN = (bool, int, float, complex, str, bytes, enum.Enum, torch.dtype, torch.device, type(None))
"""What an output may be beside a tensor: nothing that could hold one, or that a caller changes."""


class Captured:
    """A captured graph.

    Attributes
    ----------
    bucket : Bucket
    graph : object
        What the backend replays.
    inputs : Mapping of str to Tensor
        Every slot as the graph sees it.
    writes_inputs : bool
        The captured function writes into its inputs, so that each replay spoils their padding.
    rows : list of int or None
        For each output how many of its rows belong to a request; see :func:`agree`.
    """

    def __init__(
        self,
        hw: Backend,
        fn: Callable[..., Any],
        buffers: GraphBuffers,
        bucket: Bucket,
        pool: Any,
        stream: Stream,
    ) -> None:
        self.bucket = bucket
        self.inputs = buffers.views(bucket)
        self.graph = hw.create_graph()
        # torch counts the writes to a tensor, most of them; all slots are views of one.
        before = buffers.memory._version
        outputs = hw.graph_capture(self.graph, lambda: fn(**self.inputs), pool, stream)
        self.writes_inputs = buffers.memory._version != before
        leaves, self._spec = tree_flatten_with_path(outputs)
        self.leaves = [leaf for _, leaf in leaves]
        self.names = [f"outputs{keystr(path)}" for path, _ in leaves]
        self.rows: list[int | None] = []
        static = buffers.memory.untyped_storage().data_ptr()
        for name, leaf in zip(self.names, self.leaves, strict=True):
            _check(name, leaf, static)

    def outputs(self, batch_size: int) -> Outputs:
        """Return the outputs for a batch, without padding."""
        views = [
            leaf if rows is None else leaf.narrow(0, 0, batch_size * rows)
            for leaf, rows in zip(self.leaves, self.rows, strict=True)
        ]
        return Outputs(views, self._spec)


class Outputs:
    """The real rows of a graph's outputs, in the form in which the function returned them."""

    def __init__(self, views: list[Any], spec: Any) -> None:
        self._views, self._spec = views, spec
        self._alone = spec.is_leaf() and isinstance(views[0], torch.Tensor)

    def get(self) -> Any:
        """Return them in containers and tensors of the caller's own, on the graph's memory."""
        if self._alone:
            return self._views[0].detach()
        leaves = [v.detach() if isinstance(v, torch.Tensor) else v for v in self._views]
        return tree_unflatten(leaves, self._spec)


def agree(graphs: Sequence[Captured]) -> None:
    """Settle which outputs have a row for each request, and which one for each token.

    One bucket alone does not tell: a first dimension may have either size by chance.

    Raises
    ------
    CaptureError
        If an output has neither in all buckets, or buckets have not the same outputs.
    """
    for graph in graphs:
        if graph.names != graphs[0].names:
            message = (
                f"GraphRunner.capture: fn returned {', '.join(graph.names)} for bucket "
                f"{graph.bucket}, and {', '.join(graphs[0].names)} for {graphs[0].bucket}; "
                f"expected the same for all. Return None for what a bucket lacks."
            )
            raise CaptureError(message)
        graph.rows = []
    for place, name in enumerate(graphs[0].names):
        sizes = [_first_size(graph.leaves[place]) for graph in graphs]
        if all(size is None for size in sizes):
            rows: list[int | None] = [None] * len(graphs)
        elif sizes == [graph.bucket[0] for graph in graphs]:
            rows = [1] * len(graphs)
        elif sizes == [graph.bucket[0] * graph.bucket[1] for graph in graphs]:
            rows = [graph.bucket[1] for graph in graphs]
        else:
            shapes = ", ".join(
                f"{list(getattr(graph.leaves[place], 'shape', ()))} for bucket {graph.bucket}"
                for graph in graphs
            )
            message = (
                f"GraphRunner.capture: fn returned `{name}` of shape {shapes}; expected a first "
                f"dimension of requests in all buckets, or of tokens in all, where padding is cut "
                f"off. Return it transposed, or expanded."
            )
            raise CaptureError(message)
        for graph, count in zip(graphs, rows, strict=True):
            graph.rows.append(count)


def _first_size(leaf: Any) -> int | None:
    """Return the size of a tensor's first dimension, -1 without one; None for no tensor."""
    if not isinstance(leaf, torch.Tensor):
        return None
    return leaf.shape[0] if leaf.dim() else -1


def _check(name: str, leaf: Any, static: int) -> None:
    if isinstance(leaf, torch.Tensor):
        if leaf.untyped_storage().data_ptr() == static:
            message = (
                f"GraphRunner.capture: fn returned `{name}` in the memory of an input; expected "
                f"memory of its own, for the next batch is written there. Return a clone of it."
            )
            raise CaptureError(message)
    elif not isinstance(leaf, _PLAIN):
        message = (
            f"GraphRunner.capture: fn returned `{name}`, {shown(leaf)}; expected tensors and plain "
            f"values in dicts, lists, tuples or named tuples, for padding is cut off every tensor. "
            f"Return such, or register the class with torch.utils._pytree."
        )
        raise CaptureError(message)
