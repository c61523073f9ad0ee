"""Several threads, forks, and what each thread has for itself."""

from __future__ import annotations

import threading

import torch

from hwcore.errors import CaptureError

LIMIT_S = 60


def together(*functions):
    """Run functions in threads; return what they raised."""
    problems = []

    def guarded(function):
        try:
            function()
        except BaseException as error:  # noqa: BLE001
            problems.append(error)

    threads = [threading.Thread(target=guarded, args=(f,), daemon=True) for f in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
        assert not thread.is_alive(), "a thread hangs"
    return problems


def test_a_new_thread_starts_on_device_0_and_its_default_stream(sim):
    torch.accelerator.set_device_index(1)
    with torch.Stream("sim:1"):
        seen = []
        problems = together(
            lambda: seen.append(
                (
                    torch.accelerator.current_device_index(),
                    torch.accelerator.current_stream().stream_id,
                )
            )
        )
        assert not problems
        assert seen == [(0, 0)]
        assert torch.accelerator.current_device_index() == 1


def test_threads_with_streams_of_their_own_do_not_disturb_each_other(sim):
    def work(value):
        stream = torch.Stream("sim")
        for _ in range(200):
            with stream:
                x = torch.full((64,), float(value), device="sim")
                y = (x * 2).sum()
            stream.synchronize()
            assert y.item() == 128 * value

    assert not together(*(lambda v=v: work(v) for v in range(4)))


def test_threads_can_share_a_stream(sim):
    x = torch.zeros(1, device="sim")
    torch.accelerator.synchronize()

    def work():
        for step in range(500):
            x.add_(1)
            if step % 50 == 0:
                torch.accelerator.synchronize()

    assert not together(*[work] * 4)
    assert x.item() == 2000


def test_a_python_kernel_and_a_synchronising_thread_do_not_deadlock(sim):
    library = torch.library.Library("simthreads", "DEF")
    library.define("slow(Tensor x) -> Tensor")
    library.impl("slow", lambda x: x + sum(range(1000)) * 0 + 1, "CPU")
    library.impl("slow", lambda x: torch.empty_like(x), "Meta")

    def work():
        x = torch.zeros(4, device="sim")
        for step in range(100):
            x = torch.ops.simthreads.slow(x)
            if step % 10 == 0:
                torch.accelerator.synchronize()
        assert x.tolist() == [100] * 4

    assert not together(*[work] * 4)
    library._destroy()


def test_host_functions_that_free_tensors_do_not_deadlock(sim):
    def work():
        for _ in range(100):
            held = [torch.ones(16, device="sim")]
            sim.launch_host_function(held.clear)
            torch.accelerator.synchronize()

    assert not together(*[work] * 4)


def test_every_drain_policy_holds_under_threads(sim):
    def work():
        stream = torch.Stream("sim")
        for _ in range(100):
            with stream:
                x = torch.ones(8, device="sim") + 1
            stream.synchronize()
            assert x.tolist() == [2] * 8

    for policy in ("eager", "random:1"):
        with sim.drain_policy(policy):
            assert not together(*[work] * 4)


def test_autograds_own_threads_work_on_both_devices(sim):
    def work(index):
        for _ in range(20):
            x = torch.ones(8, device=f"sim:{index}", requires_grad=True)
            (x * x).sum().backward()
            assert x.grad.tolist() == [2] * 8

    assert not together(*(lambda i=i: work(i % 2) for i in range(4)))


def test_memory_is_allocated_and_freed_by_several_threads(sim):
    def work(seed):
        sizes = torch.randint(1, 10_000, (300,), generator=torch.Generator().manual_seed(seed))
        held = []
        for size in sizes.tolist():
            held.append(torch.full((size,), float(seed), device="sim"))
            if len(held) > 5:
                assert held.pop(0).sum().item() > 0

    before = torch.accelerator.memory_allocated()
    assert not together(*(lambda s=s: work(s) for s in range(1, 5)))
    torch.accelerator.synchronize()
    assert torch.accelerator.memory_allocated() == before


def test_captures_in_several_threads_are_their_own(sim):
    def work(value):
        stream = torch.Stream("sim")
        x = torch.zeros(4, device="sim")
        torch.accelerator.synchronize()
        for _ in range(20):
            graph = sim.Graph()
            with stream:
                out = graph.capture(lambda: x + value, stream=stream)
                graph.replay()
                stream.synchronize()
            assert sim.peek(out).tolist() == [value] * 4
            graph.close()

    for _ in range(3):
        assert not together(*(lambda v=v: work(v) for v in range(3)))


def test_captures_in_several_threads_need_no_streams_of_the_callers(sim):
    started = threading.Barrier(3)

    def work(value):
        x = torch.zeros(4, device="sim")
        torch.accelerator.synchronize()
        graph = sim.Graph()
        out = graph.capture(lambda: (started.wait(LIMIT_S), x + value)[1])
        graph.replay()
        assert out.tolist() == [value] * 4
        graph.close()

    assert not together(*(lambda v=v: work(v) for v in range(3)))


def test_a_capture_on_a_stream_that_another_thread_captures_harms_only_itself(sim):
    stream, graph = torch.Stream("sim"), sim.Graph()
    x = torch.zeros(4, device="sim")
    torch.accelerator.synchronize()

    def fn():
        (problem,) = together(lambda: sim.Graph().capture(lambda: x + 2, stream=stream))
        assert isinstance(problem, CaptureError)
        assert "which another thread is capturing" in str(problem)
        return x + 1

    out = graph.capture(fn, stream=stream)
    graph.replay()
    assert out.tolist() == [1] * 4
    graph.close()


def test_a_reset_that_drops_an_error_of_pythons_does_not_deadlock(python):
    done = python(
        """
        import threading
        from hwcore_sim import device
        device.start()
        import torch
        running = True

        def work():
            while running:
                device.pending()  # takes the state mutex with the GIL held

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        for _ in range(50):
            for stream in [torch.Stream("sim") for _ in range(20)]:
                device.launch_host_function(lambda: 1 / 0, stream)
            device.set_drain_policy("eager")  # runs what is queued, and keeps the errors
            device.set_drain_policy("lazy")
            device.reset()
        running = False
        thread.join()
        print("ends")
        """,
        timeout_s=LIMIT_S,
    )
    assert (done.status, done.output) == (0, "ends"), done.errors


def test_a_fork_of_a_live_device_gets_an_error_by_name(python):
    done = python(
        """
        import os, torch
        from hwcore_sim import device
        from hwcore.errors import ForkError
        device.start()
        x = torch.ones(1, device="sim") + 1
        stream, event = torch.Stream("sim"), torch.Event("sim")
        event.record()
        pid = os.fork()
        if pid == 0:
            assert torch.sim._is_in_bad_fork()
            for number, use in enumerate([
                lambda: torch.ones(1, device="sim"),
                lambda: x + 1,
                lambda: x.item(),
                lambda: torch.accelerator.synchronize(),
                lambda: stream.synchronize(),
                lambda: event.synchronize(),
                lambda: torch.empty(1).pin_memory(),
            ]):
                try:
                    use()
                except ForkError as error:
                    assert "spawn" in str(error)
                else:
                    os._exit(10 + number)
            del x  # freed in the child: nothing happens
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(status, x.item())
        """
    )
    assert (done.status, done.output) == (0, "0 2.0"), done.errors


def test_a_fork_before_the_device_is_used_can_use_it(python):
    done = python(
        """
        import os, torch
        from hwcore_sim import device
        device.start()
        assert not device.is_initialized()
        pid = os.fork()
        if pid == 0:
            os._exit(int((torch.ones(2, device="sim") + 1).sum().item()))
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        """
    )
    assert (done.status, done.output) == (0, "4"), done.errors


def test_a_process_may_end_with_work_queued(python):
    done = python(
        """
        import torch
        from hwcore_sim import device
        device.start()
        x = torch.ones(4, device="sim")
        device.launch_host_function(lambda: print("never"))
        graph = device.Graph()
        out = graph.capture(lambda: x * 2)
        graph.replay()
        host = torch.empty(4).pin_memory().copy_(x, non_blocking=True)
        print("ends")
        """
    )
    assert (done.status, done.output) == (0, "ends"), done.errors
