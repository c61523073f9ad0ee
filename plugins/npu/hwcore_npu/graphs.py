"""Graphs of the NPU: captured with their attention's host lengths, which each replay updates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from hwcore.errors import ArgumentValueError, CaptureError, describe

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from hwcore.types import ReplayBatch, Stream

__all__ = ["LENGTHS", "Graph"]

LENGTHS: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "_npu_paged_attention": ("context_lens", 7, ("mla",)),
    "npu_multi_head_latent_attention": ("context_lens", 5, ("mha", "gqa", "mqa")),
    "npu_fused_infer_attention_score": ("actual_seq_lengths_kv", 6, ()),
    "npu_fused_infer_attention_score_v2": ("actual_seq_kvlen", 8, ()),
}
"""By operator: the argument with the requests' lengths, its place, attention kinds it is not for.

torch_npu passes over a key that an operator does not know, and the graph goes on with old lengths:
so the operator that was captured decides the key, and a batch of another kind is refused."""


class Graph:
    """A ``torch.npu.NPUGraph``: made by a capture, and gone again if that fails.

    Parameters
    ----------
    npu : module
        ``torch.npu``.
    """

    def __init__(self, npu: Any) -> None:
        self._npu = npu
        self._graph: Any = None
        self._lengths: list[tuple[str, Any]] = []

    def __repr__(self) -> str:
        return f"<hwcore_npu Graph, {'empty' if self._graph is None else 'captured'}>"

    def capture(self, fn: Callable[[], Any], pool: Any, stream: Stream | None) -> Any:
        """Capture ``fn()`` and return its outputs; see the hook ``graph_capture``."""
        npu = self._npu
        if self._graph is not None:
            fix = "Make a new one"
            _refuse("graph_capture", "`graph`", self, "an empty one", fix, CaptureError)
        graph, before = npu.NPUGraph(), npu.current_stream()
        modes = len(_get_current_dispatch_mode_stack())
        # Of the current device: torch_npu's own default is one stream for all devices.
        chosen = npu.Stream() if stream is None else stream
        try:
            with npu.graph(graph, pool=pool, stream=chosen, auto_dispatch_capture=True):
                outputs = fn()
            records = graph.graph_dispatch_mode.graph_dispatch_records
            self._lengths = [_captured(record) for record in records]
        except BaseException:
            # Where the capture cannot begin or end, torch_npu leaves stream and mode as they are.
            while len(_get_current_dispatch_mode_stack()) > modes:
                graph.graph_dispatch_mode.__exit__(None, None, None)
            npu.set_stream(before)
            graph.reset()
            raise
        self._graph, self._replayed, self._updated = graph, npu.Event(), npu.Event()
        return outputs

    def replay(self, buffers: Mapping[str, torch.Tensor], batch: ReplayBatch | None) -> None:
        """Bring inputs and host lengths up to date, and replay on the current stream."""
        if self._graph is None:
            fix = "Capture it first"
            _refuse("graph_replay", "`graph`", self, "a captured one", fix, CaptureError)
        updates = self._updates(batch)
        stream = self._npu.current_stream()
        if batch is not None and batch.plan_stream_active:
            _copy(batch.recomputed, buffers)
        if updates:  # even of nothing: each operator in the graph waits for its update
            side = self._graph.graph_dispatch_mode.update_stream
            side.wait_event(self._replayed)  # which reads what is updated now
            self._graph.update(cpu_update_input=updates)
            self._updated.record(side)
            stream.wait_event(self._updated)
        self._graph.replay()
        self._replayed.record(stream)

    def _updates(self, batch: ReplayBatch | None) -> list[dict[str, Any]]:
        """Return the lengths for each operator: of padding too, this step's tokens included."""
        if batch is None:
            if self._lengths:
                expected, fix = "a batch, for the graph holds lengths", "Pass a ReplayBatch"
                _refuse("graph_replay", "`batch`", batch, expected, fix)
            return []
        updates: list[dict[str, Any]] = []
        for operator, held in self._lengths:
            key, _, other_kinds = LENGTHS[operator]
            if batch.attention in other_kinds:
                expected, fix = f"a kind of `{operator}`", "Replay the graph of the batch's kind"
                _refuse("graph_replay", "`batch.attention`", batch.attention, expected, fix)
            lengths = [length + batch.bucket[1] for length in batch.padded_seq_lens]
            if held is not None and len(held) != len(lengths):
                expected = f"{len(held)} lengths, as `{operator}` was captured with"
                what, fix = "len(batch.padded_seq_lens)", "Replay the graph of the batch's bucket"
                _refuse("graph_replay", what, len(lengths), expected, fix)
            tensor = isinstance(held, torch.Tensor)
            like = torch.tensor(lengths, dtype=held.dtype) if tensor else lengths
            updates.append({} if held is None else {key: like})
        return updates


def _captured(record: Any) -> tuple[str, Any]:
    """Return a captured operator, and its lengths if they are the host's."""
    operator = record.op_cache_entry.__name__.partition(".")[0]
    if operator not in LENGTHS:
        expected = f"one whose host lengths are known: {', '.join(LENGTHS)}"
        fix = "Leave it out of graphs"
        _refuse("graph_capture", "an operator", operator, expected, fix, CaptureError)
    key, place, _ = LENGTHS[operator]
    held = record.kwargs.get(key, record.args[place] if place < len(record.args) else None)
    # Of a tensor on the device torch_npu keeps a reference of its own kind: nothing to update.
    return operator, held if isinstance(held, list | tuple | torch.Tensor) else None


def _copy(recomputed: Mapping[str, torch.Tensor], buffers: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in recomputed.items():
        if name not in buffers:
            fix = "Pass the buffers that the graph reads"
            _refuse("graph_replay", "`buffers`", list(buffers), f"`{name}` among them", fix)
        if buffers[name] is not tensor:
            buffers[name].copy_(tensor)


def _refuse(
    hook: str, what: str, got: object, expected: str, fix: str, kind: Any = ArgumentValueError
) -> NoReturn:
    raise kind(describe(f"npu: {hook}", what, got, expected, fix))
