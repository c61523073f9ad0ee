"""A recording stand-in for ``torch.cuda``, which no CPU build of torch can run.

Whatever is asked of it must exist in the real module, and each call must bind to the signature
there: a plugin that calls what torch does not have fails here.
"""

from __future__ import annotations

import contextlib
import inspect
import pathlib
import re
import types

import torch

REAL = torch.cuda


class FakeCuda:
    """``torch.cuda`` of a machine with two devices; ``answers`` replace what functions return."""

    __name__ = "torch.cuda"

    def __init__(self, **answers):
        self.calls = []
        self.graphs = []
        self.current = "the current stream"
        self.answers = {
            "device_count": lambda: 2,
            "current_device": lambda: 0,
            "current_stream": lambda device=None: self.current,
            "stream": self._stream,
            "mem_get_info": lambda device=None: (3, 4),
            "is_current_stream_capturing": lambda: False,
            "graph_pool_handle": lambda: (0, 7),
            "CUDAGraph": self._graph,
            "get_device_properties": lambda device: types.SimpleNamespace(gcnArchName="gfx90a"),
            "is_initialized": lambda: False,
            **answers,
        }

    def __getattr__(self, name):
        real = getattr(REAL, name)
        answer = self.answers.get(name, lambda *args, **kwargs: f"a {name}")
        return recorded(name, inspect.signature(real), answer, self.calls)

    @contextlib.contextmanager
    def _stream(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def _graph(self, keep_graph=False):
        self.graphs.append(FakeGraph(self.calls))
        return self.graphs[-1]

    def named(self, name):
        """The arguments of each call of a function."""
        return [(args, kwargs) for called, args, kwargs in self.calls if called == name]


class FakeGraph:
    """``torch.cuda.CUDAGraph``; ``broken`` is what the device says at the end of a capture."""

    def __init__(self, calls):
        self.broken = self.ended = None
        self._calls = calls

    def __getattr__(self, name):
        real = getattr(REAL.CUDAGraph, name)
        signature = inspect.signature(real)
        own = signature.replace(parameters=list(signature.parameters.values())[1:])
        return recorded(name, own, getattr(self, f"_{name}", lambda **_: None), self._calls)

    def _capture_end(self):
        if self.broken:
            raise RuntimeError(self.broken)
        self.ended = True

    def _pool(self):
        if not self.ended:
            message = "Called CUDAGraph::pool() without a preceding successful capture."
            raise RuntimeError(message)
        return (0, 7)


def recorded(name, signature, answer, calls):
    """A function that takes what ``signature`` takes, notes the call and answers."""

    def call(*args, **kwargs):
        signature.bind(*args, **kwargs)
        calls.append((name, args, kwargs))
        return answer(*args, **kwargs)

    return call


def declared(name):
    """The signature that torch's own stub declares for a function of ``torch._C``."""
    stub = pathlib.Path(torch.__file__).parent / "_C/__init__.pyi"
    line = re.search(rf"^def {name}\((.*)\) -> ", stub.read_text(), re.MULTILINE)
    names = re.findall(r"(\w+):", line[1])
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Signature([inspect.Parameter(each, kind) for each in names])
