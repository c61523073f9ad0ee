"""Graphs of the NPU: captured with their attention's host lengths, which each replay updates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from hwcore.errors import ArgumentValueError, CaptureError, describe
from hwcore.graphs.native import Graph
from hwcore.graphs.native_captures import ModuleCaptures

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from hwcore.types import ReplayBatch, Stream

__all__ = ["LENGTHS", "NpuCaptures", "NpuGraph"]

T = TypeVar("T")

LENGTHS: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "_npu_paged_attention": ("context_lens", 7, ("mla",)),
    "npu_multi_head_latent_attention": ("context_lens", 5, ("mha", "gqa", "mqa")),
    "npu_fused_infer_attention_score": ("actual_seq_lengths_kv", 6, ()),
    "npu_fused_infer_attention_score_v2": ("actual_seq_kvlen", 8, ()),
}
"""By operator: the argument with the requests' lengths, its place, attention kinds it is not for.

torch_npu passes over a key that an operator does not know, and the graph goes on with old lengths:
so the operator that was captured decides the key, and a batch of another kind is refused."""


class NpuCaptures(ModuleCaptures):
    """Captures by ``torch.npu.graph``, with the operators recorded whose lengths replays update.

    Parameters
    ----------
    module : module
        ``torch.npu``.
    """

    def __init__(self, module: Any) -> None:
        super().__init__(module, module.NPUGraph)
        self._begun: dict[int, Any] = {}

    def prepare(self) -> None:
        """Do nothing: ``torch.npu.graph`` does it."""

    def begin(self, graph: Any, pool: Any) -> None:
        """Enter torch_npu's context on the stream that is current."""
        npu = self._module
        stream = npu.current_stream()
        context = npu.graph(graph, pool=pool, stream=stream, auto_dispatch_capture=True)
        self._begun[id(graph)] = context
        context.__enter__()

    def end(self, graph: Any) -> None:
        """Leave it, and refuse an operator whose lengths nobody would update."""
        self._begun.pop(id(graph)).__exit__(None, None, None)
        _lengths(graph)

    def discard(self, graph: Any, pool: Any) -> None:
        """Leave the dispatch mode too: torch_npu does not where a capture cannot begin or end."""
        mode = graph.graph_dispatch_mode
        if any(each is mode for each in _get_current_dispatch_mode_stack()):
            mode.__exit__(None, None, None)
        super().discard(graph, pool)


class NpuGraph(Graph):
    """A graph whose replays update the lengths that its attention was captured with.

    Parameters
    ----------
    captures : NpuCaptures
    module : module
        ``torch.npu``.
    """

    def __init__(self, captures: NpuCaptures, module: Any) -> None:
        super().__init__(captures)
        self._npu = module
        self._lengths: list[tuple[str, Any]] = []

    def capture(self, fn: Callable[[], T], pool: Any = None, stream: Stream | None = None) -> T:
        """Capture ``fn()``; see :meth:`hwcore.graphs.native.Graph.capture`."""
        outputs = super().capture(fn, pool, stream)
        self._lengths = _lengths(self.native)
        self._replayed, self._updated = self._npu.Event(), self._npu.Event()
        return outputs

    def replay(
        self,
        buffers: Mapping[str, torch.Tensor] | None = None,
        batch: ReplayBatch | None = None,
    ) -> Any:
        """Bring inputs and host lengths up to date, and replay on the current stream."""
        if self.native is None:
            return super().replay()  # which says so
        updates = self._updates(batch)
        stream = self._npu.current_stream()
        if batch is not None and batch.plan_stream_active:
            _copy(batch.recomputed, buffers or {})
        if updates:  # even of nothing: each operator in the graph waits for its update
            side = self.native.graph_dispatch_mode.update_stream
            side.wait_event(self._replayed)  # which reads what is updated now
            self.native.update(cpu_update_input=updates)
            self._updated.record(side)
            stream.wait_event(self._updated)
        outputs = super().replay()
        self._replayed.record(stream)
        return outputs

    def _updates(self, batch: ReplayBatch | None) -> list[dict[str, Any]]:
        """Return the lengths for each operator: of padding too, this step's tokens included."""
        if batch is None:
            if self._lengths:
                expected, fix = "a batch, for the graph holds lengths", "Pass a ReplayBatch"
                _refuse("`batch`", batch, expected, fix)
            return []
        updates: list[dict[str, Any]] = []
        for operator, held in self._lengths:
            key, _, other_kinds = LENGTHS[operator]
            if batch.attention in other_kinds:
                expected, fix = f"a kind of `{operator}`", "Replay the graph of the batch's kind"
                _refuse("`batch.attention`", batch.attention, expected, fix)
            lengths = [length + batch.bucket[1] for length in batch.padded_seq_lens]
            if held is not None and len(held) != len(lengths):
                expected = f"{len(held)} lengths, as `{operator}` was captured with"
                what, fix = "len(batch.padded_seq_lens)", "Replay the graph of the batch's bucket"
                _refuse(what, len(lengths), expected, fix)
            tensor = isinstance(held, torch.Tensor)
            like = torch.tensor(lengths, dtype=held.dtype) if tensor else lengths
            updates.append({} if held is None else {key: like})
        return updates


def _lengths(graph: Any) -> list[tuple[str, Any]]:
    """Return each operator that was recorded, and its lengths if they are the host's."""
    found = []
    for record in graph.graph_dispatch_mode.graph_dispatch_records:
        operator = record.op_cache_entry.__name__.partition(".")[0]
        if operator not in LENGTHS:
            expected = f"one whose host lengths are known: {', '.join(LENGTHS)}"
            fix, where = "Leave it out of graphs", "npu: graph_capture"
            raise CaptureError(describe(where, "an operator", operator, expected, fix))
        key, place, _ = LENGTHS[operator]
        held = record.kwargs.get(key, record.args[place] if place < len(record.args) else None)
        # Of a tensor on the device torch_npu keeps a reference of its own kind: nothing to update.
        known = isinstance(held, list | tuple | torch.Tensor)
        found.append((operator, held if known else None))
    return found


def _copy(recomputed: Mapping[str, torch.Tensor], buffers: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in recomputed.items():
        if name not in buffers:
            fix = "Pass the buffers that the graph reads"
            _refuse("`buffers`", list(buffers), f"`{name}` among them", fix)
        if buffers[name] is not tensor:
            buffers[name].copy_(tensor)


def _refuse(what: str, got: object, expected: str, fix: str) -> NoReturn:
    raise ArgumentValueError(describe("npu: graph_replay", what, got, expected, fix))
