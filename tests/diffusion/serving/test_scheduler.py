import gc
import threading
import time

import pytest
import torch

from hwcore.diffusion.roles import PIPELINE, RoleType
from hwcore.errors import RequestError
from hwcore.testing.loop_engine import LoopEngine

from . import _roles


@pytest.fixture(params=["shared memory", "page-locked"])
def memory_kind(hw, request, monkeypatch):
    """Pools of other processes' kind; and of one whose copies a device makes when it likes."""
    if request.param == "page-locked":
        monkeypatch.setattr(
            "hwcore.diffusion.serving.memory.open_engine",
            lambda specs, size_bytes, token, **options: LoopEngine(hw, size_bytes),
        )


@pytest.mark.usefixtures("in_any_order", "watched", "memory_kind")
def test_a_request_goes_through_all_roles_and_streams_do_not_race(serve):
    served = serve()
    pending = [served.ask(number, 100 + number) for number in range(8)]
    for number, one in enumerate(pending):
        assert _roles.same(one.result(), number, 100 + number)


@pytest.mark.usefixtures("in_any_order", "watched", "memory_kind")
def test_a_role_may_compute_on_a_stream_of_its_own(serve, hw):
    class OnItsOwn(_roles.Role):
        def _disagg_prefetch_event_loop(self):
            with hw.stream_context(hw.create_stream()):
                super()._disagg_prefetch_event_loop()

    served = serve([OnItsOwn(role) for role in PIPELINE])
    pending = [served.ask(number, 100 + number) for number in range(8)]
    for number, one in enumerate(pending):
        assert _roles.same(one.result(), number, 100 + number)


@pytest.mark.usefixtures("in_any_order", "watched")
def test_what_is_computed_comes_after_what_is_loaded(hw):
    role, side = _roles.Role(RoleType.DECODER), hw.create_stream()
    role._disagg_hw = hw
    with hw.stream_context(side):
        loaded, event = torch.ones(1000, device=hw.device()) * 3, hw.create_event()
        hw.record_event(event)
    role._disagg_take_over(_roles.DiffusionRequest("r", {"latents": [loaded, None]}), event)
    assert (loaded * 2).cpu().tolist() == [6.0] * 1000


def test_a_worker_that_cannot_go_on_ends_its_loop(serve, monkeypatch):
    from hwcore.diffusion.serving import worker

    def broken(*arguments):
        raise MemoryError

    served = serve()
    monkeypatch.setattr(worker, "open_manager", broken)
    served.roles[0]._disagg_worker._link.begin_again()
    served.threads[0].join(10)
    assert not served.threads[0].is_alive()


def test_what_an_engine_adds_arrives_at_the_last_role(serve):
    got = serve().ask(1, after={"upscale": (2, None)}).result()
    assert got["after"] == {"upscale": (2, None)}


def test_outputs_larger_than_any_slot_so_far_go_too(serve):
    served = serve()
    for size in (10, 50_000, 10):  # 200 kB, in a pool of 1 MiB
        assert _roles.same(served.ask(3, size).result(), 3, size)


def test_an_output_that_no_pool_can_hold_is_an_error_with_both_sizes(serve):
    served = serve()
    with pytest.raises(RequestError, match=r"output of encoder takes \d+ bytes.*1048576") as error:
        served.ask(1, 1_000_000).result()
    assert error.value.reason == "too large"
    assert _roles.same(served.ask(1).result(), 1)


@pytest.mark.parametrize("role", PIPELINE)
def test_an_input_at_fault_fails_at_once_and_the_role_goes_on(serve, role):
    served = serve()
    with pytest.raises(RequestError, match=f"ValueError: {role}") as error:
        served.ask(1, fails={str(role): "value"}).result()
    assert (error.value.reason, error.value.retryable) == ("failed", False)
    assert _roles.same(served.ask(1).result(), 1)


def test_a_failure_of_another_kind_is_tried_again_and_then_said(serve):
    served = serve()
    with pytest.raises(RequestError, match=r"begun 3 times.*MemoryError: denoiser") as error:
        served.ask(1, fails={"denoiser": "memory"}).result()
    assert error.value.retryable
    for number in range(5):  # as often in a row ended upstream's loop
        assert _roles.same(served.ask(number).result(), number)


class Unsendable(_roles.Role):
    def disagg_compute(self, request):
        request = super().disagg_compute(request)
        if request.fields.get("image") is not None:
            request.fields["image"] = object()
        return request


def test_an_output_that_cannot_be_sent_names_itself_to_the_client(serve):
    served = serve([*map(_roles.Role, PIPELINE[:2]), Unsendable(PIPELINE[2])])
    with pytest.raises(RequestError, match=r"ArgumentTypeError: pack_tensors.*image"):
        served.ask(1).result()


class Gate(_roles.Role):
    """Computes when it is let."""

    def __init__(self, role):
        super().__init__(role)
        self.open, self.inside = threading.Event(), threading.Semaphore(0)

    def disagg_compute(self, request):
        self.inside.release()
        assert self.open.wait(20)
        return super().disagg_compute(request)


def test_the_next_input_is_loaded_while_one_is_computed(serve):
    loaded = threading.Semaphore(0)

    class Ahead(Gate):
        def disagg_span(self, span):
            if span.kind == "load":
                loaded.release()

    gate = Ahead(RoleType.DENOISER)
    served = serve([_roles.Role(PIPELINE[0]), gate, _roles.Role(PIPELINE[2])])
    pending = [served.ask(number) for number in range(3)]
    assert gate.inside.acquire(timeout=10)
    for _ in pending:  # all of them, while the first is computed
        assert loaded.acquire(timeout=10)
    gate.open.set()
    assert all(_roles.same(one.result(), number) for number, one in enumerate(pending))


def test_a_cancelled_request_leaves_nothing_behind(serve):
    gate = Gate(RoleType.DENOISER)
    served = serve([_roles.Role(PIPELINE[0]), gate, _roles.Role(PIPELINE[2])])
    pending = [served.ask(number) for number in range(3)]
    assert gate.inside.acquire(timeout=10)
    for one in pending:
        one.cancel()
    gate.open.set()
    for one in pending:
        with pytest.raises(RequestError, match="cancelled"):
            one.result()
    until_settled(served)


def test_when_all_is_over_every_byte_of_the_pools_is_free_or_granted(serve):
    served = serve()
    pending = [served.ask(number, 200) for number in range(20)]
    assert all(_roles.same(one.result(), number, 200) for number, one in enumerate(pending))
    del pending
    until_settled(served)


def until_settled(served):
    """Nobody holds anything but slots that are granted and free."""
    deadline = time.monotonic() + 10
    while True:
        gc.collect()
        left = [stats_of(role) for role in served.roles]
        settled = served.router.stats().is_settled
        if settled and all(stats == (0, 0, 0, 0) for stats in left):
            return
        assert time.monotonic() < deadline, (settled, left)
        time.sleep(0.05)


def stats_of(role):
    stats = role._disagg_worker._manager.stats()
    held = stats.pool.live_leases - stats.granted
    return stats.staged, stats.running, stats.consumed, held


def test_the_loop_ends_when_the_router_has_drained_its_role(serve):
    served = serve()
    assert _roles.same(served.ask(1).result(), 1)
    for worker in served.router.stats().workers:
        served.router.drain_worker(worker)
    for thread in served.threads:
        thread.join(10)
        assert not thread.is_alive()


def test_spans_tell_what_was_done_and_when(serve):
    spans = []

    class Watched(_roles.Role):
        disagg_span = staticmethod(spans.append)

    served = serve([Watched(role) for role in PIPELINE])
    pending = served.ask(1)
    pending.result()
    served.close()
    kinds = {(span.worker.partition("-")[0], span.kind) for span in spans}
    assert {("encoder", "compute"), ("encoder", "push"), ("denoiser", "load")} <= kinds
    assert {("denoiser", "compute"), ("denoiser", "push"), ("decoder", "compute")} <= kinds
    assert all(span.started <= span.ended for span in spans)
    assert {span.request_id for span in spans} == {pending.request_id}


@pytest.mark.usefixtures("late")
def test_tensors_are_on_the_device_of_the_role(serve, hw):
    seen = []

    class Looks(_roles.Role):
        def disagg_compute(self, request):
            seen.extend(
                value.device.type
                for value in request.fields.values()
                if isinstance(value, torch.Tensor)
            )
            return super().disagg_compute(request)

    serve([Looks(role) for role in PIPELINE]).ask(1).result()
    assert {*seen} == {hw.info.device_type}
