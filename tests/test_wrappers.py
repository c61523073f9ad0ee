"""Wrappers around a backend's hooks: registered, seen, and gone again without a trace."""

from __future__ import annotations

import threading

import pytest

import hwcore
from hwcore.errors import ArgumentValueError, PluginDefinitionError

from ._plugins import Acme


class Plugin(Acme):
    @hwcore.hookimpl
    def graph_replay(self, graph):
        graph.append("run")


@pytest.fixture
def backend():
    return hwcore.Backend(Plugin())


def tracer(tag="trace"):
    class Tracer:
        @hwcore.hookimpl(wrapper=True)
        def graph_replay(self, graph):
            graph.append(f"{tag} in")
            result = yield
            graph.append(f"{tag} out")
            return result

    return Tracer()


def replayed(backend):
    calls = []
    backend.graph_replay(calls)
    return calls


def test_a_wrapper_runs_while_it_is_registered(backend):
    plain = backend.graph_replay
    wrapper = tracer()
    backend.register(wrapper, "tracer")
    assert replayed(backend) == ["trace in", "run", "trace out"]
    assert backend.hook_sources()["graph_replay"] == "plugin, wrapped by tracer"
    backend.unregister(wrapper)
    assert replayed(backend) == ["run"]
    assert backend.graph_replay is plain
    assert backend.hook_sources()["graph_replay"] == "plugin"
    backend.register(wrapper)
    assert len(replayed(backend)) == 3


def test_two_wrappers_nest_in_the_order_of_their_registration(backend):
    inner, outer = tracer("inner"), tracer("outer")
    backend.register(inner, "a")
    backend.register(outer, "b")
    assert replayed(backend) == ["outer in", "inner in", "run", "inner out", "outer out"]
    assert backend.hook_sources()["graph_replay"] == "plugin, wrapped by a, b"
    backend.unregister(inner)
    assert replayed(backend) == ["outer in", "run", "outer out"]


def test_a_wrapper_of_the_old_form_runs(backend):
    class Old:
        @hwcore.hookimpl(hookwrapper=True)
        def graph_pool(self):
            outcome = yield
            outcome.force_result((outcome.get_result(), "old"))

    backend.register(Old())
    assert backend.graph_pool() == (None, "old")


def test_a_wrapper_sees_the_defaults_filled_in(backend):
    class Seer:
        @hwcore.hookimpl(wrapper=True)
        def create_event(self, blocking, device, enable_timing):
            seen.append((device, enable_timing, blocking))
            return (yield)

        @hwcore.hookimpl(wrapper=True)
        def graph_replay(self, batch, buffers):
            seen.append((batch, buffers))
            return (yield)

    seen = []
    backend.create_event()  # the device's check is over
    backend.register(Seer())
    backend.create_event()
    assert backend.create_event(None, True).enable_timing, "and so does the hook itself"
    backend.create_event(blocking=True)
    backend.graph_replay([])
    assert seen == [(None, False, False), (None, True, False), (None, False, True), (None, None)]


def test_a_wrapper_of_a_hook_that_is_not_checked_yet_runs_once_it_is(backend):
    class Seer:
        @hwcore.hookimpl(wrapper=True)
        def create_stream(self, priority):
            seen.append(priority)
            return (yield)

    seen = []
    backend.register(Seer())
    backend.create_stream(priority=-1)
    assert seen == [-1], "and the check itself is no call of the user's"


def test_what_a_wrapper_or_the_hook_raises_arrives(backend):
    class Fails:
        @hwcore.hookimpl(wrapper=True)
        def graph_replay(self, graph):
            if graph == "wrapper":
                msg = "wrapper"
                raise OSError(msg)
            try:
                return (yield)
            finally:
                seen.append("left")

    seen = []
    backend.register(Fails())
    with pytest.raises(OSError, match="wrapper"):
        backend.graph_replay("wrapper")
    with pytest.raises(AttributeError, match="append"):
        backend.graph_replay(3)
    assert seen == ["left"]


def test_every_call_is_answered_while_wrappers_come_and_go(backend):
    class Doubler:
        @hwcore.hookimpl(wrapper=True)
        def device_count(self):
            return 2 * (yield)

    def call():
        try:
            while not stop.is_set():
                answers.append(backend.device_count())
        except Exception as error:  # noqa: BLE001 - shown by the assertion below
            answers.append(error)

    stop, answers = threading.Event(), []
    thread = threading.Thread(target=call)
    thread.start()
    wrapper = Doubler()
    for _ in range(300):
        backend.register(wrapper)
        backend.unregister(wrapper)
    stop.set()
    thread.join()
    assert set(answers) <= {1, 2}, set(answers)
    assert len(answers) > 300
    assert backend.device_count() == 1


# --- Refused --------------------------------------------------------------------------------------


def implements():
    class Wrong:
        @hwcore.hookimpl
        def graph_replay(self):
            pass

    return Wrong()


def invents():
    class Wrong:
        @hwcore.hookimpl(wrapper=True)
        def graph_repaly(self):
            yield

    return Wrong()


def takes_too_much():
    class Wrong:
        @hwcore.hookimpl(wrapper=True)
        def device_count(self):
            return (yield)

        @hwcore.hookimpl(wrapper=True)
        def graph_replay(self, graph, speed):
            return (yield)

    return Wrong()


def does_not_yield():
    class Wrong:
        @hwcore.hookimpl(wrapper=True)
        def device_count(self):
            return (yield)

        @hwcore.hookimpl(wrapper=True)
        def graph_replay(self, graph):
            return None

    return Wrong()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (implements, r"implements a hook, `graph_replay`; expected hook wrappers only. Mark it"),
        (invents, r"names an unknown hook, `graph_repaly`; expected hook wrappers only"),
        (takes_too_much, r"does not fit the contract: .*speed"),
        (does_not_yield, r"does not fit the contract: .*generator function"),
    ],
)
def test_a_wrapper_that_does_not_fit_leaves_nothing_behind(backend, make, message):
    wrong = make()
    with pytest.raises(PluginDefinitionError, match=rf"(?s)plugin `acme` .*{message}") as caught:
        backend.register(wrong)
    assert caught.value.plugin == "acme"
    assert replayed(backend) == ["run"]
    assert set(backend.hook_sources().values()) == {"plugin", "default"}
    assert backend.graph_replay == backend._functions["graph_replay"]
    with pytest.raises(ArgumentValueError):
        backend.unregister(wrong)


def test_registering_twice_is_refused(backend):
    wrapper = tracer()
    backend.register(wrapper)
    with pytest.raises(ArgumentValueError, match=r"Backend.register: `wrappers` got .*expected an"):
        backend.register(wrapper)
    with pytest.raises(ArgumentValueError, match="Unregister it first"):
        backend.register(wrapper, "another name")
    assert len(replayed(backend)) == 3


@pytest.mark.parametrize("name", ["tracer", "plugin", "default"])
def test_a_name_that_is_taken_is_refused(backend, name):
    backend.register(tracer(), "tracer")
    with pytest.raises(ArgumentValueError, match=rf"Backend.register: `name` got '{name}' \(str\)"):
        backend.register(tracer("second"), name)
    assert len(replayed(backend)) == 3


def test_unregistering_what_is_not_registered_is_refused(backend):
    with pytest.raises(ArgumentValueError, match=r"Backend.unregister: `wrappers` got .* Register"):
        backend.unregister(tracer())
    wrapper = tracer()
    backend.register(wrapper)
    backend.unregister(wrapper)
    with pytest.raises(ArgumentValueError):
        backend.unregister(wrapper)


@pytest.mark.parametrize("nothing", [None, 3, object()], ids=repr)
def test_an_object_that_wraps_nothing_is_refused(backend, nothing):
    with pytest.raises(ArgumentValueError, match=r"`wrappers` got .*; expected .*wrapper=True"):
        backend.register(nothing)
    assert replayed(backend) == ["run"]


def test_a_hook_that_was_forgotten_to_be_marked_is_refused(backend):
    class Forgotten:
        def graph_replay(self):
            yield

    with pytest.raises(ArgumentValueError, match="wrapper=True"):
        backend.register(Forgotten())
