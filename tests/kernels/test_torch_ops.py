"""What a device lacks runs on the CPU and looks as if it had not."""

import concurrent.futures
import logging
import sys
import threading

import pytest
import torch

from hwcore.errors import CaptureError
from hwcore.graphs.tape import Tape
from hwcore.kernels import kernel, references, torch_ops
from hwcore.kernels.torch_ops import OPERATORS, TORCH, TorchOps, asked
from hwcore.testing.conformance.groups.cpu_fallback import CALLS
from hwcore.testing.conformance.operations import OPERATIONS
from hwcore.testing.sanitizer import Sanitizer

from ._backends import answering

MODULE = sys.modules[TorchOps.__module__]  # the package's attribute of that name is the function
NAMES = frozenset(map(asked, OPERATORS))
VALUES = torch.tensor([[3.0, 1.0, 2.0, 0.5], [0.0, 5.0, 4.0, 1.5]])


@pytest.fixture
def ops(hw):
    """Operations that all run on the CPU, of a backend that stays alive meanwhile."""
    backend, _ = answering(hw, on_cpu=NAMES)
    yield torch_ops(backend)
    assert backend.info


@pytest.fixture
def values(hw):
    return VALUES.clone().to(hw.device())


# --- Asking ---------------------------------------------------------------------------------------


def test_each_operator_is_asked_for_once_with_a_tensor_of_the_device(hw, values):
    backend, was_asked = answering(hw)
    for _ in range(2):
        torch_ops(backend).sum(values)
    assert sorted(was_asked) == sorted((hw.info.device_type, name) for name in NAMES)


def test_threads_that_come_at_once_ask_once_and_get_the_same(hw, values, caplog):
    backend, was_asked = answering(hw, on_cpu=["sum"])
    barrier = threading.Barrier(8)

    def come(_):
        barrier.wait()
        ops = torch_ops(backend)
        ops.sum(values)
        return ops

    with concurrent.futures.ThreadPoolExecutor(8) as pool, caplog.at_level(logging.WARNING):
        found = list(pool.map(come, range(8)))
    assert all(ops is found[0] for ops in found)
    assert len(was_asked) == len(NAMES)
    assert found[0].on_cpu == {"sum": 8}
    assert len(caplog.records) == 1


def test_what_the_device_has_is_torchs_own_function(hw, values):
    backend, _ = answering(hw, on_cpu=["topk"])
    ops = torch_ops(backend)
    others = [name for name in OPERATORS if name != "topk"]
    assert [getattr(ops, name) is getattr(TORCH, name) for name in others] == [True] * len(others)
    assert TORCH.sum is torch.sum
    assert set(ops.on_cpu) == {"topk"}


def test_a_reference_gets_the_operations_only_where_one_runs_on_the_cpu(hw, values):
    def reference(tensor, *, ops=TORCH):
        return ops

    everything, _ = answering(hw)
    lacks, _ = answering(hw, on_cpu=["sum"])
    assert kernel(everything, reference) is reference
    assert kernel(lacks, reference)(values) is torch_ops(lacks)


def test_the_conformance_kit_knows_every_reference():
    assert {"gather_rows", "assert_and_invalidate"} <= references().keys() <= OPERATIONS.keys()


def test_tensors_of_the_host_make_no_device_context(processes, hw):
    if hw.info.name != "sim":
        pytest.skip("only there a context is made that can be seen")
    script = """
        import torch, hwcore
        from hwcore.kernels import gather_rows, kernel, torch_ops
        from hwcore_sim.plugin import SimPlugin
        hw = hwcore.Backend(SimPlugin())
        ops = torch_ops(hw)
        rows, out = torch.arange(6).view(3, 2), torch.zeros(1, 2, dtype=torch.int64)
        print(kernel(hw, gather_rows)(rows, torch.tensor([2]), out).tolist())
        print(ops.sum(rows).item(), ops.is_bound, hw.is_initialized())
        held = kernel(hw, gather_rows)
        there = [tensor.to(hw.device()) for tensor in (rows, torch.tensor([1]), out)]
        print(held(*there).tolist(), ops.is_bound, torch_ops(hw) is ops)
    """
    assert processes.run(script).output == ["[[4, 5]]", "15 False False", "[[2, 3]] True True"]


def test_a_child_forked_while_another_thread_asks_can_ask_itself(site):
    script = """
        import os, threading, warnings
        import hwcore, torch
        from hwcore.cpu import CpuPlugin
        from hwcore.kernels import torch_ops
        warnings.simplefilter("ignore")  # of forking with threads: the very thing

        asking, go_on = threading.Event(), threading.Event()

        class Plugin(CpuPlugin):
            slow = False

            @hwcore.hookimpl
            def needs_cpu_fallback(self, tensor, purpose):
                if self.slow:
                    asking.set()
                    go_on.wait()
                return False

        plugin = Plugin()
        backend, other = hwcore.Backend(plugin), hwcore.Backend(CpuPlugin())
        plugin.slow = True
        thread = threading.Thread(target=torch_ops, args=(backend,))
        thread.start()
        asking.wait()
        child = os.fork()
        if not child:
            torch_ops(other)
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        go_on.set()
        thread.join()
    """
    assert site.run(script, timeout_s=60).output == ["0"]


def test_operations_do_not_keep_their_backend_alive(hw, values):
    import gc
    import weakref

    backend, _ = answering(hw, on_cpu=["sum"])
    ops, gone = torch_ops(backend), weakref.ref(backend)
    del backend
    gc.collect()
    assert gone() is None
    assert ops.sum(values).item() == VALUES.sum().item()


# --- Running --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPERATORS)
def test_each_gives_what_torch_gives(hw, late, ops, values, name):
    got, want = CALLS[asked(name)](ops, values), CALLS[asked(name)](TORCH, VALUES)
    assert type(got) is type(want)
    pairs = zip(got, want, strict=True) if isinstance(want, tuple) else [(got, want)]
    for there, here in pairs:
        assert there.device.type == hw.info.device_type
        assert (there.dtype, there.shape) == (here.dtype, here.shape)
        assert there.tolist() == here.tolist()
    assert ops.on_cpu[asked(name)] == 1


def test_named_results_stay_named(ops, values):
    found = ops.topk(values, 2)
    assert isinstance(found, torch.return_types.topk)
    assert found.indices.tolist() == VALUES.topk(2).indices.tolist()


@pytest.mark.parametrize("strided", [False, True])
def test_out_is_written_and_is_the_tensor_that_comes_back(hw, ops, values, strided):
    out = torch.zeros(2, 4, 2, device=hw.device())[..., 0] if strided else torch.empty_like(values)
    assert ops.cumsum(values, 1, out=out) is out
    assert out.tolist() == VALUES.cumsum(1).tolist()


def test_out_may_be_several_tensors(hw, ops, values):
    places = torch.empty(2, 4, dtype=torch.int64, device=hw.device())
    ordered = torch.empty_like(values)
    found = ops.sort(values, 1, out=(ordered, places))
    assert found[0] is ordered
    assert found[1] is places
    assert ordered.tolist() == VALUES.sort(1).values.tolist()
    assert places.tolist() == VALUES.sort(1).indices.tolist()


def test_an_empty_out_is_resized_and_one_of_a_wrong_dtype_refused_as_by_torch(hw, ops, values):
    out = torch.empty(0, device=hw.device())
    assert ops.amax(values, 1, out=out).tolist() == [3.0, 5.0]
    assert out.shape == (2,)
    with pytest.raises(RuntimeError, match=r"[Ee]xpected .*type|dtype"):
        ops.amax(values, 1, out=torch.empty(2, dtype=torch.int64, device=hw.device()))


def test_out_that_is_an_input_too_is_both(ops, values):
    ops.cumsum(values, 1, out=values)
    assert values.tolist() == VALUES.cumsum(1).tolist()


def test_in_place_into_a_view_leaves_the_rest_alone(hw, late, ops):
    whole = torch.zeros(4, 6, dtype=torch.int32, device=hw.device())
    view = whole[:, 1::2]
    rows = torch.tensor([2, 0], device=hw.device())
    assert ops.index_fill_(view, 0, rows, -1) is view
    filled = [0, -1] * 3
    assert whole.tolist() == [filled, [0] * 6, filled, [0] * 6]


def test_keyword_tensors_and_lists_of_tensors_are_brought_along(hw, ops, values, monkeypatch):
    index = torch.tensor([[1], [0]], device=hw.device())
    assert ops.gather(input=values, dim=1, index=index).tolist() == [[1.0], [0.0]]
    monkeypatch.setattr(MODULE, "OPERATORS", ("stack", "unbind", "index_put_"))
    backend, _ = answering(hw, on_cpu=["stack", "unbind", "index_put"])
    more = torch_ops(backend)
    assert more.stack([values, values]).tolist() == [VALUES.tolist()] * 2
    assert [it.device.type for it in more.unbind(values)] == [hw.info.device_type] * 2
    more.index_put_(values, (index[:, 0], index[:, 0]), torch.tensor(9.0, device=hw.device()))
    assert values.tolist() == [[9.0, 1.0, 2.0, 0.5], [0.0, 9.0, 4.0, 1.5]]


@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (3, 0)])
def test_tensors_without_dimensions_or_elements(hw, ops, shape):
    empty = torch.ones(shape, device=hw.device())
    assert ops.sum(empty).item() == float(shape == ())
    assert ops.cumsum(empty, 0).shape == shape


def test_what_is_on_the_host_is_left_to_torch_and_not_counted(hw, ops):
    if hw.info.device_type == "cpu":
        pytest.skip("the host is the device")
    got = ops.cumsum(VALUES, 1)
    assert got.device.type == "cpu"
    assert Tape().capture(lambda: ops.sum(VALUES)).item() == VALUES.sum().item()
    assert not any(ops.on_cpu.values())


def test_without_a_tensor_torch_answers(hw, monkeypatch):
    monkeypatch.setattr(MODULE, "OPERATORS", ("arange",))
    backend, _ = answering(hw, on_cpu=["arange"])
    assert TorchOps(backend).arange(3).tolist() == [0, 1, 2]
    assert torch_ops(backend).arange(3, device=hw.device()).tolist() == [0, 1, 2]


def test_gradients_pass(ops, values):
    values.requires_grad_()
    ops.cumsum(values, 1).sum().backward()
    assert values.grad.tolist() == [[4.0, 3.0, 2.0, 1.0]] * 2


# --- What is seen of it ---------------------------------------------------------------------------


def test_runs_are_counted_and_the_first_is_logged(hw, ops, values, caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            ops.sum(values)
        ops.amax(values)
    assert {name: times for name, times in ops.on_cpu.items() if times} == {"sum": 3, "amax": 1}
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith(f"hwcore: backend `{hw.info.name}` has no `sum` (needs_cpu_fallback)")
    assert "`amax`" in second


def test_the_host_waits_for_each_tensor_that_is_copied(hw, late, ops, values):
    if hw.info.name != "sim":
        pytest.skip("only a simulated device tells what was waited for")
    from hwcore_sim import device

    with device.host_waits() as waits:
        TORCH.topk(values, 2)
    assert waits == []
    with device.host_waits() as waits:
        ops.topk(values, 2)
    assert waits == ["copied to the host", *["copied from the host while blocking"] * 2]


def refused(ops, values, capture):
    with pytest.raises(CaptureError) as caught:
        capture(lambda: ops.topk(values, 2))
    message = str(caught.value)
    assert "`topk` runs on the CPU" in message
    assert "needs_cpu_fallback" in message
    assert not any(ops.on_cpu.values()), "nothing was run"


def test_a_tape_refuses_it(ops, values):
    refused(ops, values, Tape().capture)


def test_a_graph_of_the_device_refuses_it_and_the_device_goes_on(hw, ops, values):
    graph = hw.create_graph()
    refused(ops, values, lambda fn: hw.graph_capture(graph, fn))
    assert values.sum().item() == VALUES.sum().item()


def test_in_a_side_stream_it_comes_after_what_the_stream_holds_and_before_what_follows(
    hw, in_any_order
):
    backend, _ = answering(hw, on_cpu=NAMES)
    ops = torch_ops(backend)
    with Sanitizer(backend):
        main = backend.current_stream()
        numbers = torch.zeros(4, device=backend.device())
        side = backend.create_stream()
        backend.wait_stream(side, main)
        with backend.stream_context(side):
            numbers.add_(2)
            sums = ops.cumsum(numbers, 0)
            ops.index_fill_(numbers, 0, torch.tensor([1], device=backend.device()), 9)
            doubled = sums * 2
        backend.wait_stream(main, side)
        for tensor in (sums, doubled):
            backend.record_stream(tensor, main)
        assert doubled.tolist() == [4.0, 8.0, 12.0, 16.0]
        assert numbers.tolist() == [2.0, 9.0, 2.0, 2.0]
