"""torch_npu as far as hwcore-npu calls it, on the simulated device under the name `npu`.

Signatures are those of the real one; `make contract` compares them. Behaviour is what torch_npu's
own source says of graphs, its flaws included: a capture that cannot begin or end leaves its stream
current and its dispatch mode on. An operator with host lengths is recorded at capture; a replay
uses what was last updated, and would wait for ever if nothing was.
"""

from __future__ import annotations

import dataclasses

import torch
from torch.utils._python_dispatch import TorchDispatchMode

OPERATORS = {
    "_npu_paged_attention": "(Tensor(a!) out, int b, int c, int d, int e, int f, int g, "
    "Tensor context_lens) -> ()",
    "npu_multi_head_latent_attention": "(Tensor(a!) out, int b, int c, int d, int e, "
    "Tensor context_lens) -> ()",
    "npu_fused_infer_attention_score": "(Tensor(a!) out, *, int[]? actual_seq_lengths_kv) -> ()",
    "npu_fused_infer_attention_score_v2": "(Tensor(a!) out, *, int[]? actual_seq_kvlen) -> ()",
    "npu_fusion_attention_v3": "(Tensor(a!) out, *, int[]? actual_seq_kvlen) -> ()",
}
"""Toys under the names of attention operators: they write the lengths that they are given."""

KEYS = {
    "_npu_paged_attention": "context_lens",
    "npu_multi_head_latent_attention": "context_lens",
    "npu_fused_infer_attention_score": "actual_seq_lengths_kv",
    "npu_fused_infer_attention_score_v2": "actual_seq_kvlen",
    "npu_fusion_attention_v3": "actual_seq_kvlen",
}

_library = []


@dataclasses.dataclass
class GraphDispatchRecord:
    event: object = None
    handle: object = None
    kwargs: dict = dataclasses.field(default_factory=dict)
    args: tuple = ()
    op_cache_entry: object = None


class GraphDispatchMode(TorchDispatchMode):
    update_stream = None

    def __new__(cls):
        if cls.update_stream is None:
            cls.update_stream = torch.npu.Stream()
        return super().__new__(cls)

    def __init__(self):
        super().__init__()
        self.graph_dispatch_records = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.__name__.partition(".")[0] not in OPERATORS:
            return func(*args, **kwargs)
        held = kwargs.get(KEYS[func.__name__.partition(".")[0]], args[-1])
        device = held is None or (isinstance(held, torch.Tensor) and held.device.type == "npu")
        memory = held if device else torch.empty_like(args[0])
        self.graph_dispatch_records.append(
            GraphDispatchRecord(
                handle=None if device else memory,
                kwargs=kwargs,
                # Of tensors on the device it keeps references of a kind of its own.
                args=tuple(WeakRef() if a is held and device else a for a in args),
                op_cache_entry=func,
            )
        )
        if memory is not None:
            args[0].copy_(memory)
        return None

    def update_capture_record(self, cpu_update_input):
        records = self.graph_dispatch_records
        if len(cpu_update_input) == 1:
            cpu_update_input = cpu_update_input * len(records)
        if len(cpu_update_input) != len(records):
            message = f"{len(records)} operators, and {len(cpu_update_input)} elements"
            raise RuntimeError(message)
        with torch.npu.stream(self.update_stream):
            for record, update in zip(records, cpu_update_input, strict=True):
                key = KEYS[record.op_cache_entry.__name__.partition(".")[0]]
                if key in update:  # any other is passed over, as by the real one
                    like = record.handle
                    values = torch.as_tensor(update[key], dtype=like.dtype).pin_memory()
                    like.copy_(values, non_blocking=True)
                    self.staged = [*getattr(self, "staged", ()), values]
                record.event = "recorded"


class WeakRef:
    pass


class Event:
    """The simulated module's own is a subclass of torch.Event, which cannot time one another."""

    def __new__(cls, enable_timing=False, blocking=False, interprocess=False):
        return torch.Event("npu", enable_timing=enable_timing, blocking=blocking)


class NPUGraph:
    def __init__(self):
        self.graph_dispatch_mode = GraphDispatchMode()
        self.auto_dispatch_capture = False
        self._native = None

    def capture_begin(self, pool=None, capture_error_mode="global"):
        from hwcore_sim.device.registration import native

        stream = torch.npu.current_stream()
        graph = native().Graph(native().Pool() if pool is None else pool)
        graph.begin(stream.device_index, stream.stream_id)
        self._native = graph

    def capture_end(self):
        graph, self._native = self._native, None
        graph.end()
        self._native = graph

    def replay(self):
        records = self.graph_dispatch_mode.graph_dispatch_records
        for record in records:
            assert record.event == "recorded", "the device would wait for this update for ever"
            record.event = None
        self._native.replay()

    def reset(self):
        if self._native is not None:
            self._native.close()
        self._native = None

    def update(self, cpu_update_input):
        if not self.auto_dispatch_capture:
            message = "captured without auto_dispatch_capture=True"
            raise RuntimeError(message)
        self.graph_dispatch_mode.update_capture_record(cpu_update_input)


class graph:
    def __init__(
        self,
        npu_graph,
        pool=None,
        stream=None,
        auto_dispatch_capture=False,
        capture_error_mode="global",
    ):
        self.pool = () if pool is None else (pool,)
        self.context = torch.npu.stream(stream)
        self.npu_graph = npu_graph
        self.npu_graph.auto_dispatch_capture = auto_dispatch_capture

    def __enter__(self):
        torch.npu.synchronize()
        torch.npu.empty_cache()
        self.context.__enter__()
        if self.npu_graph.auto_dispatch_capture:
            self.npu_graph.graph_dispatch_mode.__enter__()
        self.npu_graph.capture_begin(*self.pool)

    def __exit__(self, exc_type, exc_value, traceback):
        self.npu_graph.capture_end()
        if self.npu_graph.auto_dispatch_capture:
            self.npu_graph.graph_dispatch_mode.__exit__(exc_type, exc_value, traceback)
        self.context.__exit__(exc_type, exc_value, traceback)


def graph_pool_handle():
    from hwcore_sim.device.registration import native

    return native().Pool()


def install():
    """Make the simulated device `torch.npu`, with graphs as torch_npu has them."""
    from hwcore_sim import device

    npu = device.start("npu")
    for fake in (Event, NPUGraph, graph, graph_pool_handle):
        setattr(npu, fake.__name__, fake)
    library = torch.library.Library("npu", "FRAGMENT")
    for name, schema in OPERATORS.items():
        library.define(name + schema)
        library.impl(name, _eager(KEYS[name]), "PrivateUse1")
    _library.append(library)


def _eager(key):
    def write(out, *args, **kwargs):
        held = kwargs.get(key, args[-1] if args else None)
        if held is not None:
            out.copy_(torch.as_tensor(held))

    return write
