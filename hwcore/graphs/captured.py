"""One bucket's graph: captured with its outputs, which are handed out without their padding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_unflatten

from hwcore.errors import CaptureError

if TYPE_CHECKING:
    from collections.abc import Callable

    from hwcore.backend import Backend
    from hwcore.graphs.buffers import GraphBuffers
    from hwcore.graphs.slots import Bucket
    from hwcore.types import Stream

__all__ = ["Captured", "Outputs"]


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
        # torch counts the writes to a tensor; all slots are views of one.
        before = buffers.memory._version
        outputs = hw.graph_capture(self.graph, lambda: fn(**self.inputs), pool, stream)
        self.writes_inputs = buffers.memory._version != before
        leaves, self._spec = tree_flatten_with_path(outputs)
        self._leaves = [leaf for _, leaf in leaves]
        sizes = {bucket[0]: 1, bucket[0] * bucket[1]: bucket[1]}
        static = buffers.memory.untyped_storage().data_ptr()
        self._rows = [_rows(f"outputs{keystr(path)}", leaf, sizes, static) for path, leaf in leaves]

    def outputs(self, batch_size: int) -> Outputs:
        """Return the outputs for a batch, without padding."""
        views = [
            leaf if rows is None else leaf.narrow(0, 0, batch_size * rows)
            for leaf, rows in zip(self._leaves, self._rows, strict=True)
        ]
        return Outputs(views, self._spec)


class Outputs:
    """The real rows of a graph's outputs, in the form in which the function returned them."""

    def __init__(self, views: list[Any], spec: Any) -> None:
        self._views, self._spec = views, spec
        self._whole = views[0] if spec.is_leaf() else None

    def get(self) -> Any:
        """Return them in containers of the caller's own."""
        return self._whole if self._whole is not None else tree_unflatten(self._views, self._spec)


def _rows(name: str, leaf: Any, sizes: dict[int, int], static: int) -> int | None:
    """Return how many rows of an output belong to a request; None for one that is no tensor."""
    if not isinstance(leaf, torch.Tensor):
        return None
    if leaf.untyped_storage().data_ptr() == static:
        message = (
            f"GraphRunner.capture: fn returned `{name}` in the memory of an input; expected memory "
            f"of its own, for the next batch is written there. Return a clone of it."
        )
        raise CaptureError(message)
    if leaf.dim() == 0 or leaf.shape[0] not in sizes:
        message = (
            f"GraphRunner.capture: fn returned `{name}` of shape {list(leaf.shape)}; expected a "
            f"first dimension of {' or '.join(map(str, sizes))}, requests or tokens, where padding "
            f"is cut off. Return it transposed, or expanded."
        )
        raise CaptureError(message)
    return sizes[leaf.shape[0]]
