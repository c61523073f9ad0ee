"""Many requests at once: the same tokens as each alone, whatever is overlapped or captured."""

import itertools
import random
import time

import pytest
import torch

from examples.serving.engine import Engine
from examples.serving.request import Request
from examples.serving.worker import Worker
from hwcore.testing.fixtures import race_sanitizer  # noqa: F401  a fixture

CONTEXT = 96
WAYS = {
    "off": {"overlap": False},
    "overlap": {"overlap": True},
    "overlap and graphs": {"overlap": True, "graphs": True},
}


@pytest.fixture(scope="module")
def answers(network):
    """What transformers decodes greedily after a prompt. Kept, for it is asked again."""
    known = {}

    def answer(request):
        key = (*request.prompt, -1, request.count)
        if key not in known:
            text = list(request.prompt)
            with torch.inference_mode():
                for _ in range(request.count):
                    logits = network(torch.tensor([text], device=network.device)).logits
                    text.append(int(logits[0, -1].argmax()))
            known[key] = text[len(request.prompt) :]
        tokens = known[key]
        return tokens[: tokens.index(request.end) + 1] if request.end in tokens else tokens

    return answer


def requests(count=10):
    """Prompts of many lengths, some of which repeat themselves; some answers end early."""
    rng = random.Random(1)
    made = []
    for i in range(count):
        phrase = [rng.randrange(19) for _ in range(rng.randrange(3, 12))]
        prompt = phrase * rng.randrange(1, 4)
        end = None if i % 3 else 7
        made.append(Request(f"r{i}", prompt, rng.randrange(8, 40), arrival=2 * i, end=end))
    return made


def run(llama, asked, num_slots=600, **options):
    options = {"buckets": (4,), "chunk": 16, **options}
    engine = Engine(llama, num_slots, CONTEXT, **options)
    engine.run(asked)
    engine.close()
    return engine


@pytest.fixture(params=[1, 4], ids=["plain", "lookup"])
def width(request):
    return request.param


@pytest.fixture(params=WAYS.values(), ids=WAYS.keys())
def way(request):
    return request.param


def test_every_answer_is_the_networks_own(llama, answers, width, way):
    asked = requests()
    engine = run(llama, asked, width=width, **way)
    assert [r.tokens for r in asked] == [answers(r) for r in asked]
    assert any(r.tokens[-1] == 7 and len(r.tokens) < r.count for r in asked), "none ended early"
    assert (engine.timing.decoded > engine.timing.decodes) == (width > 1), "no draft came true"


def test_a_request_alone_on_the_same_bucket_gets_the_same_tokens(llama, width):
    together, alone = requests(), requests()
    run(llama, together, width=width)
    for request in alone:
        run(llama, [request], width=width)
    assert [r.tokens for r in together] == [r.tokens for r in alone]


def test_buckets_pad_as_little_as_they_can_and_change_no_token(llama, answers, width, monkeypatch):
    sizes, prepare = set(), Worker.prepare

    def preparing(worker, batch):
        prepared = prepare(worker, batch)
        if not batch.chunk:
            sizes.add((len(batch.requests), len(prepared["rows"])))
        return prepared

    monkeypatch.setattr(Worker, "prepare", preparing)
    asked = requests()
    run(llama, asked, width=width, buckets=(4, 1, 2), graphs=True)
    assert [r.tokens for r in asked] == [answers(r) for r in asked]
    assert sizes == {(1, 1), (2, 2), (3, 4), (4, 4)}


def test_a_pool_that_is_too_small_for_all_retracts_and_changes_no_token(llama, answers, width, way):
    asked = requests()
    engine = run(llama, asked, num_slots=80, width=width, **way)
    assert [r.tokens for r in asked] == [answers(r) for r in asked]
    assert sum(r.retractions for r in asked) > 0
    assert sorted(engine.pool.free_slots) == list(range(1, 80))
    assert sorted(engine.pool.free_rows) == [1, 2, 3, 4]


def test_more_requests_than_rows_take_rows_that_others_have_left(llama, answers):
    asked = requests(6)
    run(llama, asked, buckets=(2,), width=4)
    assert [r.tokens for r in asked] == [answers(r) for r in asked]


def test_the_relay_finds_every_row_written_once_and_read_once(llama, monkeypatch, width, way):
    """Requests finish early and are retracted: what they left must have been discarded."""
    monkeypatch.setenv("HWCORE_DEBUG", "1")
    asked = requests()
    run(llama, asked, num_slots=80, width=width, **way)  # close() raises what it found
    assert sum(r.retractions for r in asked) > 0


def test_the_text_on_the_device_is_the_prompt_and_the_answer(llama, width, way):
    """What is drafted from; were it another one, the tokens would still be right, and slow."""
    request = requests(1)[0]
    engine = run(llama, [request], buckets=(1,), width=width, **way)
    text = request.prompt + request.tokens
    assert engine.worker._lookup._text[1, : len(text)].tolist() == text


def test_the_hosts_gap_is_what_it_does_between_two_steps_without_its_waits(llama, monkeypatch):
    now = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(now)))
    engine = Engine(llama, 200, CONTEXT, buckets=(4,), overlap=False)
    synchronize = engine._hw.synchronize_event

    class SlowDevice:
        def synchronize_event(self, event):
            for _ in range(1000):
                next(now)
            synchronize(event)

    engine._hw = SlowDevice()
    engine.run([Request("r", [1, 2, 3], 5)])
    assert engine.timing.steps == 5
    assert engine.timing.total_s > 5000
    assert engine.timing.gap_s < 100


@pytest.mark.parametrize("overlap", [False, True])
def test_with_overlap_a_step_is_submitted_before_the_tokens_of_the_last_are_here(llama, overlap):
    engine, log = Engine(llama, 200, CONTEXT, buckets=(4,), chunk=16, overlap=overlap), []
    submit, collect = engine.worker.submit, engine._collect
    known = {}

    def submitting(batch, prepared):
        log.append(("submit", len(known)))
        step = submit(batch, prepared)
        known[id(step)] = len(known)
        return step

    def collecting(step):
        log.append(("collect", known[id(step)]))
        collect(step)

    engine.worker.submit, engine._collect = submitting, collecting
    engine.run([Request("r", [1, 2, 3], 3)])
    order = [0, 0, 1, 1, 2, 2] if not overlap else [0, 1, 0, 2, 1, 2]
    kinds = ["submit", "collect"] * 3
    if overlap:
        kinds = ["submit", "submit", "collect", "submit", "collect", "collect"]
    assert log == list(zip(kinds, order, strict=True))


def test_nothing_races(llama, answers, race_sanitizer, width, way):  # noqa: F811
    asked = requests(6)
    run(llama, asked, num_slots=80, width=width, **way)
    assert [r.tokens for r in asked] == [answers(r) for r in asked]


def test_what_is_copied_to_the_device_lives_until_it_has_been(sim, llama, answers):
    asked = requests(6)
    with sim.pinned_reuse("early"):  # freed pinned memory is handed out at once
        run(llama, asked, num_slots=80)
    assert [r.tokens for r in asked] == [answers(r) for r in asked]


@pytest.mark.parametrize("policy", ["eager", "random:1", "random:2"])
def test_the_order_in_which_streams_run_changes_no_token_and_shows_no_race(
    sim,
    llama,
    answers,
    race_sanitizer,  # noqa: F811
    policy,
    width,
):
    asked = requests(6)
    with sim.drain_policy(policy):
        run(llama, asked, num_slots=80, width=width)
    assert [r.tokens for r in asked] == [answers(r) for r in asked]


def test_a_step_waits_for_nothing_but_the_tokens_of_the_one_before(
    sim, llama, monkeypatch, width, way
):
    monkeypatch.setenv("HWCORE_DEBUG", "0")  # it looks at arguments on the device
    engine = Engine(llama, 80, CONTEXT, buckets=(4,), width=width, chunk=16, **way)
    collect, collected = engine._collect, []

    def collecting(step):
        with sim.host_waits() as waits:
            collect(step)
        collected.append(waits)

    engine._collect = collecting
    asked = requests(6)
    for request in asked:
        engine.scheduler.add(request)
    while engine.scheduler.busy:
        before = len(collected)
        with sim.host_waits() as waits:
            engine.step()
        assert waits == [wait for step in collected[before:] for wait in step]
        assert all(waits == ["called Event.synchronize"] for waits in collected)
    assert len(collected) > 40
    assert sum(r.retractions for r in asked) > 0
