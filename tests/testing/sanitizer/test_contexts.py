"""Where torch calls come from: threads, autograd, compilation, other modes, subclasses."""

from __future__ import annotations

import concurrent.futures
import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from hwcore.errors import CaptureError
from hwcore.graphs.tape import Tape
from hwcore.testing.sanitizer import RaceError, Sanitizer

TIMEOUT_S = 30


@pytest.fixture
def written(hw, sanitizer, streams, zeros):
    """A tensor with an unordered write on main; reading it on side is a race."""
    x = zeros(4, 4)
    x.add_(1)
    yield x
    hw.synchronize()


def kinds(sanitizer):
    return [race.kind for race in sanitizer.take()]


def read_on(hw, stream, x):
    with hw.stream_context(stream):
        (x * 2).sum()


# --- Threads ---


def test_a_thread_started_meanwhile_is_watched(hw, sanitizer, streams, written):
    thread = threading.Thread(target=read_on, args=(hw, streams[1], written))
    thread.start()
    thread.join(TIMEOUT_S)
    assert kinds(sanitizer) == ["read after write"]


def test_a_pool_of_threads_is_watched(hw, sanitizer, streams, written):
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        pool.submit(read_on, hw, streams[1], written).result(TIMEOUT_S)
    assert kinds(sanitizer) == ["read after write"]


def test_a_subclass_of_thread_is_watched(hw, sanitizer, streams, written):
    class Reader(threading.Thread):
        def run(self):
            read_on(hw, streams[1], written)

    thread = Reader()
    thread.start()
    thread.join(TIMEOUT_S)
    assert kinds(sanitizer) == ["read after write"]
    assert "run" not in vars(thread)
    with pytest.raises(RuntimeError, match="only be started once"):
        thread.start()


@pytest.mark.parametrize("attached", [False, True])
def test_a_thread_of_before_is_watched_if_it_attaches(hw, attached):
    begin, requests = threading.Event(), []

    def serve():
        begin.wait(TIMEOUT_S)
        for work in requests:
            work()

    thread = threading.Thread(target=serve)
    thread.start()
    with Sanitizer(hw, on_race="collect") as sanitizer:
        side = hw.create_stream()
        x = torch.zeros(8, device=hw.device())

        def work():
            with sanitizer.attach_thread() if attached else torch.no_grad():
                read_on(hw, side, x)

        requests.append(work)
        begin.set()
        thread.join(TIMEOUT_S)
        assert bool(sanitizer.take()) is attached
        hw.synchronize()


def test_a_thread_that_outlives_the_sanitizer_goes_on(hw):
    go_on, results = threading.Event(), []

    def work():
        go_on.wait(TIMEOUT_S)
        results.append((torch.ones(3, device=hw.device()) + 1).tolist())

    with Sanitizer(hw):
        thread = threading.Thread(target=work)
        thread.start()
    go_on.set()
    thread.join(TIMEOUT_S)
    assert results == [[2, 2, 2]]


def test_an_error_in_a_thread_reaches_its_caller(hw, sanitizer):
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        future = pool.submit(lambda: torch.ones(2) @ torch.ones(3))
        with pytest.raises(RuntimeError, match="size"):
            future.result(TIMEOUT_S)


def test_many_threads_at_once(hw, sanitizer):
    def work(number):
        stream = hw.create_stream()
        with hw.stream_context(stream):
            x = torch.full((8,), float(number), device=hw.device())
            for _ in range(50):
                x = x + 1
            value = x.cpu()
        return value[0].item()

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        values = list(pool.map(work, range(16), timeout=TIMEOUT_S))
    assert values == [number + 50 for number in range(16)]
    assert kinds(sanitizer) == []


# --- Autograd, compilation, modes, subclasses ---


def test_backward_is_watched(hw, sanitizer, streams, zeros):
    _, side = streams
    weight, inputs = zeros(4).requires_grad_(), zeros(4)
    (weight * inputs).sum().backward()
    assert kinds(sanitizer) == []
    with hw.stream_context(side):
        weight.grad.add_(1)
    assert kinds(sanitizer) == ["write after write"]
    hw.synchronize()


def test_races_in_backward_are_told_apart_by_who_called_it(hw, sanitizer, streams, zeros):
    _, side = streams
    weights = [zeros(4).requires_grad_() for _ in range(2)]
    inputs = [zeros(4) for _ in range(2)]
    first, second = ((w * x).sum() for w, x in zip(weights, inputs, strict=True))
    hw.synchronize()
    first.backward()
    second.backward()
    for x in inputs:
        with hw.stream_context(side):
            x.add_(1)
    races = sanitizer.take()
    assert [race.kind for race in races] == ["write after read"] * 2
    for race in races:
        assert "test_races_in_backward_are_told_apart" in race.previous.stack[0]
    assert races[0].previous.stack != races[1].previous.stack
    hw.synchronize()


def test_training_is_no_race(hw, sanitizer):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        *(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)), torch.nn.Softmax(1)
    ).to(hw.device())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    inputs = torch.rand(16, 4).to(hw.device())
    labels = (inputs.argmax(1) % 3).to(hw.device())
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = -model(inputs).gather(1, labels[:, None]).log().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert kinds(sanitizer) == []


@pytest.mark.parametrize("op", ["relu", "exp", "sigmoid", "softmax"])
def test_calls_whose_result_autograd_keeps(hw, sanitizer, streams, zeros, op):
    weight = zeros(4).requires_grad_()
    with torch.no_grad():
        weight.fill_(1)
    with hw.stream_context(streams[1]):
        kept = torch.softmax(weight, 0) if op == "softmax" else getattr(torch, op)(weight)
    assert kinds(sanitizer) == ["read after write"]
    hw.synchronize()
    del kept


def test_a_view_as_another_dtype(hw, sanitizer, streams, zeros):
    data = zeros(8, dtype=torch.uint8)
    data.add_(1)
    with hw.stream_context(streams[1]):
        numbers = data.view(torch.float32)
        assert kinds(sanitizer) == []
        numbers.mul_(2)
    assert kinds(sanitizer) == ["write after write"]
    hw.synchronize()


@pytest.mark.parametrize("read", ["tolist", "numpy"])
def test_a_tape_still_refuses_host_reads(sanitizer, read):
    x = torch.zeros(3)
    with pytest.raises(CaptureError, match=f"the host read torch.Tensor.{read} at .*test_contexts"):
        Tape().capture(lambda: getattr(x, read)())


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_grad_modes(hw, sanitizer, streams, written, guard):
    with guard():
        read_on(hw, streams[1], written)
    assert kinds(sanitizer) == ["read after write"]


def test_a_composite_op_in_inference_mode_runs_once(hw, sanitizer, zeros):
    x = zeros(4)
    with torch.inference_mode():
        x.add_(3).square_()
    assert x.tolist() == [9, 9, 9, 9]


def test_a_compiled_function(hw, sanitizer, streams, written):
    compiled = torch.compile(lambda x: (x * 2).sum(), backend="eager")
    with hw.stream_context(streams[1]):
        compiled(written)
    assert kinds(sanitizer) == ["read after write"]
    torch._dynamo.reset()


@pytest.mark.parametrize("fake_first", [False, True])
def test_fake_tensors_are_not_followed(hw, fake_first):
    modes = [FakeTensorMode(), Sanitizer(hw)]
    first, second = modes if fake_first else reversed(modes)
    with first, second:
        x = torch.ones(4, device=hw.device())
        y = x.add_(1).view(2, 2).t().contiguous() * x[0]
        assert type(y).__name__ == "FakeTensor"


def test_meta_and_sparse_tensors_are_not_followed(hw, sanitizer):
    meta = torch.ones(4, device="meta") * 2
    sparse = torch.eye(3).to_sparse() * 2
    assert sparse.to_dense().trace() == 6
    del meta
    assert kinds(sanitizer) == []


def test_a_tensor_subclass(hw, sanitizer, streams, written):
    class Wrapper(torch.Tensor):
        @staticmethod
        def __new__(cls, inner):
            return torch.Tensor._make_wrapper_subclass(
                cls, inner.shape, dtype=inner.dtype, device=inner.device
            )

        def __init__(self, inner):
            self.inner = inner

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            inner = [a.inner if isinstance(a, cls) else a for a in args]
            return func(*inner, **(kwargs or {}))

    with hw.stream_context(streams[1]):
        Wrapper(written) * 2
    assert kinds(sanitizer) == ["read after write"]


def test_a_plain_subclass_and_a_parameter(hw, sanitizer, streams, written):
    class Named(torch.Tensor):
        pass

    with hw.stream_context(streams[1]):
        written.as_subclass(Named) * 2
    assert kinds(sanitizer) == ["read after write"]
    with hw.stream_context(streams[1]):
        torch.nn.Parameter(written) * 2
    assert kinds(sanitizer) == ["read after write"]


def test_another_dispatch_mode_inside(hw, sanitizer, streams, written):
    class Counter(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls += 1
            return func(*args, **(kwargs or {}))

    with Counter() as counter:
        read_on(hw, streams[1], written)
    assert counter.calls == 2
    assert kinds(sanitizer) == ["read after write"]


def test_vmap_does_not_disturb(hw, sanitizer, zeros):
    x = zeros(4, 4)
    assert torch.func.vmap(lambda row: row + 1)(x).sum().item() == 16
    assert kinds(sanitizer) == []


def test_a_higher_order_op_does_not_disturb(hw, sanitizer, zeros):
    x = zeros(4)
    result = torch.cond(x.sum() == 0, lambda x: x + 1, lambda x: x - 1, (x,))
    assert result.sum().item() == 4
    torch._dynamo.reset()


def test_an_op_of_the_programs_own(hw, sanitizer, streams, written):
    @torch.library.custom_op("hwcore_test::double_into", mutates_args=("out",))
    def double_into(x: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(x * 2)

    out = torch.empty_like(written)
    with hw.stream_context(streams[1]):
        double_into(written, out)
    assert kinds(sanitizer) == ["read after write"]
    out.add_(1)
    (race,) = sanitizer.take()
    assert race.previous.op == "hwcore_test::double_into"
    hw.synchronize()


def test_a_sanitizer_that_raises_leaves_the_modes_as_they_were(hw):
    depth = torch._C._len_torch_dispatch_stack()

    def program():
        side = hw.create_stream()
        read_on(hw, side, torch.zeros(8, device=hw.device()))

    with pytest.raises(RaceError), Sanitizer(hw, on_race="raise"):
        program()
    assert torch._C._len_torch_dispatch_stack() == depth
    hw.synchronize()
