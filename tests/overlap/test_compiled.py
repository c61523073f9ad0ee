"""The fused operation of debugging: compiled where the policy says so, plain elsewhere."""

import pytest
import torch
import torch._dynamo
from torch._dynamo.testing import CompileCounterWithBackend

import hwcore
from hwcore.cpu import CpuPlugin
from hwcore.errors import ConsumeOnceError
from hwcore.kernels import assert_and_invalidate
from hwcore.overlap import FutureMap, RelayPayload, RelaySpec
from hwcore.types import CompilePolicy

BATCHES = [1, 2, 3, 8, 17, 64, 100, 255, 256]


@pytest.fixture
def compiling(monkeypatch):
    """A backend on CPU tensors whose policy compiles; and what it compiled."""
    counter = CompileCounterWithBackend("inductor")

    asked = []

    class Plugin(CpuPlugin):
        @hwcore.hookimpl
        def compile_policy(self, request):
            asked.append((request.name, request.dynamic, request.fullgraph))
            return CompilePolicy(enabled=True, backend="inductor", dynamic=True)

    real = torch.compile

    def counted(model, *, backend, **options):
        assert backend == "inductor"
        return real(model, backend=counter, **options)

    monkeypatch.setattr(torch, "compile", counted)
    torch._dynamo.reset()
    backend = hwcore.Backend(Plugin())
    backend.counter, backend.asked = counter, asked
    yield backend
    torch._dynamo.reset()


def steps(backend):
    """Run steps of every batch size and return all that they gave."""
    seen = []
    with FutureMap(RelaySpec(pool_size=300, hidden_size=3), backend=backend, debug=True) as relay:
        for count in BATCHES:
            batch = torch.arange(1, count + 1)
            hidden = torch.arange(3 * count).view(count, 3).bfloat16()
            relay.stash(batch, RelayPayload(batch * 2, hidden_states=hidden))
            relay.publish(batch, batch)
            got = relay.resolve(torch.cat((batch[:-1], batch[-1:])))
            seen.append((got.next_token.tolist(), got.hidden_states.tolist()))
            relay.check()
            assert relay.resolve(batch).next_token.tolist() == [-1] * count
            with pytest.raises(ConsumeOnceError) as caught:
                relay.check()
            seen.append((caught.value.row, caught.value.iteration, caught.value.kind))
    return seen


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning")  # torch's own
def test_compiled_it_gives_the_same_and_is_not_compiled_again_for_each_batch(compiling):
    if torch.accelerator.is_available():
        pytest.skip("compiled for the host, in the process of the host's backend")
    plain = steps(hwcore.Backend(CpuPlugin()))
    compiling.asked.clear()  # activation asks as well
    assert steps(compiling) == plain
    assert compiling.asked == [("assert_and_invalidate", True, True)], "fullgraph: no break"
    assert 1 <= compiling.counter.frame_count <= 3, "the first, and two more at most"


def test_where_the_policy_says_no_it_stays_plain(monkeypatch):
    class Plugin(CpuPlugin):
        @hwcore.hookimpl
        def compile_policy(self, request):
            return CompilePolicy(enabled=False, reason="this test says so")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("it was compiled"))
    assert steps(hwcore.Backend(Plugin())) == steps(hwcore.Backend(CpuPlugin()))


def test_a_kernel_of_the_devices_own_is_not_compiled(monkeypatch):
    """What it launches no compiler of torch's need understand."""
    calls = []

    class Plugin(CpuPlugin):
        @hwcore.hookimpl
        def compile_policy(self, request):
            return CompilePolicy(enabled=True, reason="this test says so")

        @hwcore.hookimpl
        def kernels(self):
            return {"assert_and_invalidate": watched}

    def watched(*arguments):
        calls.append(torch.compiler.is_compiling())
        return assert_and_invalidate(*arguments)

    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("it was compiled"))
    steps(hwcore.Backend(Plugin()))
    assert calls == [False] * (2 * len(BATCHES))
