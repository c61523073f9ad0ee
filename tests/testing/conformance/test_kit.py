"""What a conformance test is given: checks, messages, limits, skips and quirks."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest
import torch

import hwcore
from hwcore.cpu import CpuPlugin
from hwcore.errors import ArgumentTypeError, ArgumentValueError
from hwcore.testing.conformance import RawAccess, conforms, run
from hwcore.testing.conformance.deadline import DeadlineError, within
from hwcore.testing.conformance.errors import ConformanceError, SanitizerOnError
from hwcore.testing.conformance.kit import Kit
from hwcore.testing.conformance.operations import OPERATIONS, leaves, mapped
from hwcore.testing.conformance.subject import find_raw, open_kit
from hwcore.testing.sanitizer import Sanitizer


@pytest.fixture
def kit():
    with open_kit(hwcore.Backend(CpuPlugin()), RawAccess(), 1.0) as opened:
        yield opened


def failed(kit, body, hook="wait_event", needs=()):
    """Run a body as a conformance test that must fail, and return its error."""
    with pytest.raises(ConformanceError) as caught:
        conforms(hook, needs=needs)(lambda self, kit: body(kit))(None, kit)
    return caught.value


# --- Messages -------------------------------------------------------------------------------------


def test_a_check_that_fails_names_the_hook_what_came_and_the_fix(kit):
    error = failed(kit, lambda kit: kit.same("the sum", 3, 4, "as on the CPU", "Add it up"))
    assert str(error) == "wait_event: the sum got 3 (int); expected 4, as on the CPU. Add it up."
    assert error.hook == "wait_event"
    assert isinstance(error, AssertionError)
    assert isinstance(error, hwcore.HwcoreError)


def test_a_check_may_blame_another_hook(kit):
    error = failed(kit, lambda kit: kit.that(False, "it", 1, "2", "Fix it", hook="query_event"))
    assert error.hook == "query_event"
    assert str(error).startswith("query_event: it got 1")


@pytest.mark.parametrize(
    ("got", "expected"),
    [
        (torch.zeros(2), torch.zeros(3)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.int32)),
        (torch.zeros(2), torch.ones(2)),
    ],
)
def test_tensors_are_equal_in_dtype_shape_and_values(kit, got, expected):
    failed(kit, lambda kit: kit.same("it", got, expected, "so", "Fix it"))
    kit.same("it", got, got.clone(), "so", "Fix it")


def test_of_large_tensors_the_places_that_differ_are_shown(kit):
    wrong = torch.zeros(100)
    wrong[7] = 5.0
    error = failed(kit, lambda kit: kit.same("it", wrong, torch.zeros(100), "so", "Fix it"))
    assert "it, first of 1 places that differ got [5.0] (list); expected [0.0]" in str(error)


def test_an_exception_is_blamed_on_the_hook_it_came_out_of(kit):
    error = failed(kit, lambda kit: kit.hw.query_event(None, 3), hook="wait_event")
    assert error.hook == "wait_event"  # the call itself was wrong, and no hook ran
    error = failed(kit, lambda kit: kit.hw.record_event("no event"), hook="wait_event")
    assert error.hook == "record_event"
    assert str(error).startswith("record_event: the call raised AttributeError: ")
    assert error.__cause__ is not None


def test_a_plain_assertion_gets_the_hook_of_the_test(kit):
    def body(kit):
        assert kit is None, "not so"

    assert str(failed(kit, body)).startswith("wait_event: not so")


# --- Limits ---------------------------------------------------------------------------------------


def test_a_call_that_returns_in_time_passes_its_exception_on():
    within(5.0, lambda: None)
    with pytest.raises(KeyError, match="inside"):
        within(5.0, lambda: {}["inside"])


def test_a_call_that_does_not_return_is_given_up_on():
    began = time.monotonic()
    with pytest.raises(DeadlineError) as caught:
        within(0.1, threading.Event().wait, lambda thread: "where it is")
    assert caught.value.inside == "where it is"
    assert time.monotonic() - began < 5


def test_a_loop_in_python_inside_a_hook_is_ended():
    ended = threading.Event()

    def spin():
        try:
            while True:
                time.sleep(0.001)
        finally:
            ended.set()

    with pytest.raises(DeadlineError):
        within(0.1, spin, lambda thread: "a hook")
    assert ended.wait(5)


def test_a_hook_that_hangs_is_named_and_not_called_again():
    class Hangs(CpuPlugin):
        @hwcore.hookimpl
        def synchronize(self, device=None):
            threading.Event().wait()

    with open_kit(hwcore.Backend(Hangs()), RawAccess(), 0.2) as kit:
        error = failed(kit, lambda kit: kit.hw.synchronize(), hook="wait_event")
        assert error.hook == "synchronize"
        assert "synchronize: the call got no answer within 0.2 s (--timeout)" in str(error)
        began = time.monotonic()
        error = failed(kit, lambda kit: kit.hw.synchronize(), hook="wait_event")
        assert "synchronize: is not called again" in str(error)
        assert time.monotonic() - began < 0.2


def test_a_test_that_hangs_outside_any_hook_is_blamed_on_its_own(kit):
    error = failed(kit, lambda kit: time.sleep(3), hook="wait_event")
    assert error.hook == "wait_event"


def test_what_a_test_leaves_current_does_not_last(kit):
    left = []

    def body(kit):
        kit.hw.create_stream().__enter__()
        left.append(kit.hw.current_stream())

    before = kit.hw.current_stream()
    conforms("wait_event")(lambda self, kit: body(kit))(None, kit)
    assert kit.hw.current_stream() == before != left[0]


# --- Skips, quirks and calls ----------------------------------------------------------------------


def test_a_feature_that_is_not_listed_skips_the_test_and_is_noted(kit):
    with pytest.raises(pytest.skip.Exception, match="does not list `async_streams`"):
        conforms("wait_event", needs="async_streams")(lambda self, kit: 1 / 0)(None, kit)
    assert kit.notes.feature == "async_streams"


def test_a_quirk_that_is_declared_is_noted_and_one_that_is_not_is_not(kit):
    assert kit.has_quirk("capture_executes")
    assert not kit.has_quirk("fork_unsafe")
    assert kit.notes.quirks == ["capture_executes"]


def test_the_hooks_that_a_test_calls_are_noted(kit):
    def body(kit):
        kit.in_thread(lambda: kit.hw.query_event(kit.hw.create_event()))

    conforms("wait_event")(lambda self, kit: body(kit))(None, kit)
    assert kit.notes.calls == ["create_event", "query_event"]


@pytest.mark.parametrize("name", ["async_stream", "", "graph"])
def test_a_misspelt_feature_or_quirk_is_an_error_of_the_test(kit, name):
    with pytest.raises(ArgumentValueError, match="expected one of"):
        conforms("wait_event", needs=name or " ")
    with pytest.raises(ArgumentValueError, match="expected one of"):
        kit.has_quirk(name)


def test_the_backend_is_plain_again_when_the_kit_is_closed():
    backend = hwcore.Backend(CpuPlugin())
    with open_kit(backend, RawAccess()):
        assert "wrapped by hwcore conformance" in backend.hook_sources()["wait_event"]
    assert backend.hook_sources()["wait_event"] == "default"


# --- What is under test ---------------------------------------------------------------------------


def test_a_subject_that_is_no_backend_is_refused():
    with pytest.raises(ArgumentTypeError, match=r"`backend` got 3 \(int\); expected a backend's"):
        run(3)


def test_a_race_sanitizer_that_is_on_is_refused():
    backend = hwcore.Backend(CpuPlugin())
    with Sanitizer(backend), pytest.raises(SanitizerOnError, match="or unset HWCORE_SANITIZE"):
        run(backend)


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ("hwcore.cpu:CpuPlugin", "not <hwcore.cpu.CpuPlugin object"),
        ("nosuch:Thing", "No module named 'nosuch'"),
        ("bad", "No module named 'bad'"),
        ("os:path", "not <module 'posixpath'"),
        ("os:nosuch", "has no attribute 'nosuch'"),
    ],
)
def test_raw_access_that_is_none_is_an_error_of_the_user(raw, said):
    with pytest.raises(ArgumentValueError, match=f"`raw` got {raw!r}.*derived from") as caught:
        find_raw("cpu", raw)
    assert said in str(caught.value)


def test_raw_access_is_torchs_where_none_is_declared():
    assert type(find_raw("cpu")) is RawAccess


def test_a_capability_that_the_cpu_lacks_is_found_out():
    class Boasts(CpuPlugin):
        @hwcore.hookimpl
        def backend_info(self):
            info = CpuPlugin.backend_info(self)
            more = {"async_streams", "pinned_memory", "multi_device", "compile", "triton"}
            return type(info)(**{**vars(info), "capabilities": info.capabilities | more})

    report = run(lambda: hwcore.Backend(Boasts()))
    for feature in ("async_streams", "pinned_memory", "multi_device", "compile"):
        assert any(feature in m for f in report.failures for m in f.messages), feature


def test_one_device_that_is_claimed_to_be_several_fails_that_claim_alone():
    class Boasts(CpuPlugin):
        @hwcore.hookimpl
        def backend_info(self):
            info = CpuPlugin.backend_info(self)
            return type(info)(
                **{**vars(info), "capabilities": info.capabilities | {"multi_device"}}
            )

    report = run(lambda: hwcore.Backend(Boasts()))
    assert [(failure.hook, len(failure.tests)) for failure in report.failures] == [
        ("device_count", 1)
    ]
    (skipped,) = (f.tests for f in report.features_skipped if f.name == "multi_device")
    assert "identity::test_set_device_makes_the_device_current" in skipped


# --- Operations -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPERATIONS)
def test_inputs_are_random_seeded_and_may_be_an_empty_batch(name):
    def made(seed, batch):
        arguments, named = OPERATIONS[name].inputs(torch.Generator().manual_seed(seed), batch)
        return [value for _, value in leaves([arguments, list(named.values())])]

    assert repr(made(1, 3)) == repr(made(1, 3)) != repr(made(2, 3))
    assert any(isinstance(t, torch.Tensor) and t.shape[0] == 0 for t in made(1, 0))
    assert isinstance(
        OPERATIONS[name].reference(
            *OPERATIONS[name].inputs(torch.Generator(), 0)[0],
            **OPERATIONS[name].inputs(torch.Generator(), 0)[1],
        ),
        object,
    )


def test_every_tensor_of_nested_arguments_is_mapped():
    arguments, named = OPERATIONS["commit_paths"].inputs(torch.Generator().manual_seed(1), 2)
    doubled = mapped(lambda tensor: tensor * 2, (arguments, [named]))
    before = [v for _, v in leaves((arguments, [named])) if isinstance(v, torch.Tensor)]
    after = [v for _, v in leaves(doubled) if isinstance(v, torch.Tensor)]
    assert len(before) == 5
    assert all(torch.equal(a, b * 2) for a, b in zip(after, before, strict=True))


def test_kit_is_exported_for_annotations():
    from hwcore.testing import conformance

    assert conformance.Kit is Kit
    assert set(conformance.__all__) <= set(dir(conformance))
    with pytest.raises(AttributeError, match="has no attribute 'kits'"):
        SimpleNamespace(**{name: getattr(conformance, name) for name in ("kits",)})
