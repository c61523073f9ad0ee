"""Many requests at once: the same tokens as each alone, whatever is overlapped or captured."""

import itertools
import random
import time
from functools import partial

import pytest
import torch

from examples.serving.decode import decode
from examples.serving.drafters import Eagle
from examples.serving.drafting import PLAIN, PromptLookup
from examples.serving.eagle import EagleDrafter, HeadDrafting
from examples.serving.engine import Engine
from examples.serving.model import Model
from examples.serving.request import Request
from examples.serving.step import Sampling
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


@pytest.fixture(params=["plain", "lookup", "chain", "tree"])
def drafting(request, head):
    return {
        "plain": PLAIN,
        "lookup": partial(PromptLookup, width=4),
        "chain": partial(HeadDrafting, head=head, topk=1, spec_steps=3, width=4),
        "tree": partial(HeadDrafting, head=head, topk=3, spec_steps=4, width=8),
    }[request.param]


@pytest.fixture(params=WAYS.values(), ids=WAYS.keys())
def way(request):
    return request.param


def test_every_answer_is_the_networks_own(llama, answers, drafting, way):
    asked = requests()
    engine = run(llama, asked, drafting=drafting, **way)
    assert [r.tokens for r in asked] == [answers(r) for r in asked]
    assert any(r.tokens[-1] == 7 and len(r.tokens) < r.count for r in asked), "none ended early"
    drafts = engine.worker._drafting.width > 1
    assert (engine.timing.decoded > engine.timing.decodes) == drafts, "no draft came true"


def test_a_request_alone_on_the_same_bucket_gets_the_same_tokens(llama, drafting):
    together, alone = requests(), requests()
    run(llama, together, drafting=drafting)
    for request in alone:
        run(llama, [request], drafting=drafting)
    assert [r.tokens for r in together] == [r.tokens for r in alone]


def test_buckets_pad_as_little_as_they_can_and_change_no_token(
    llama, answers, drafting, monkeypatch
):
    sizes, prepare = set(), Worker.prepare

    def preparing(worker, batch):
        prepared = prepare(worker, batch)
        if not batch.chunk:
            sizes.add((len(batch.requests), len(prepared.rows)))
        return prepared

    monkeypatch.setattr(Worker, "prepare", preparing)
    asked = requests()
    run(llama, asked, drafting=drafting, buckets=(4, 1, 2), graphs=True)
    assert [r.tokens for r in asked] == [answers(r) for r in asked]
    assert sizes == {(1, 1), (2, 2), (3, 4), (4, 4)}


def test_a_pool_that_is_too_small_for_all_retracts_and_changes_no_token(
    llama, answers, drafting, way
):
    asked = requests()
    engine = run(llama, asked, num_slots=80, drafting=drafting, **way)
    assert [r.tokens for r in asked] == [answers(r) for r in asked]
    assert sum(r.retractions for r in asked) > 0
    assert sorted(engine.pool.free_slots) == list(range(1, 80))
    assert sorted(engine.pool.free_rows) == [1, 2, 3, 4]


def test_more_requests_than_rows_take_rows_that_others_have_left(llama, answers):
    asked = requests(6)
    run(llama, asked, buckets=(2,), drafting=partial(PromptLookup, width=4))
    assert [r.tokens for r in asked] == [answers(r) for r in asked]


def test_the_relay_finds_every_row_written_once_and_read_once(llama, monkeypatch, drafting, way):
    """Requests finish early and are retracted: what they left must have been discarded."""
    monkeypatch.setenv("HWCORE_DEBUG", "1")
    asked = requests()
    run(llama, asked, num_slots=80, drafting=drafting, **way)  # close() raises what it found
    assert sum(r.retractions for r in asked) > 0


def test_the_text_on_the_device_is_the_prompt_and_the_answer(llama, way):
    """What is drafted from; were it another one, the tokens would still be right, and slow."""
    request = requests(1)[0]
    lookup = partial(PromptLookup, width=4)
    engine = run(llama, [request], buckets=(1,), drafting=lookup, **way)
    text = request.prompt + request.tokens
    assert engine.worker._drafting._text[1, : len(text)].tolist() == text


@pytest.mark.parametrize(("topk", "width"), [(1, 4), (3, 8)])
def test_a_head_drafts_for_a_request_what_it_drafts_for_a_text(llama, head, topk, width, way):
    """A feature or an entry of the head's that is lost costs drafts, not tokens: steps are counted.

    A prompt of several chunks, and one that is retracted and comes back.
    """
    asked = requests(6)
    asked[0].prompt = list(range(19)) * 2
    drafting = partial(HeadDrafting, head=head, topk=topk, spec_steps=3, width=width)
    model = Model(llama, 200, head.shape.taps)
    for request in asked:
        request.arrival, request.end = 0, None
        engine = run(llama, [request], drafting=drafting, **way)
        drafter = Eagle(EagleDrafter(head, 1 + model.slots.shape[1], topk, 3), model, (1, width))
        alone = decode(model, request.prompt, request.count, drafter)
        assert engine.timing.decodes - len(alone.sizes) in ((0, 1) if way["overlap"] else (0,))
        assert request.tokens == alone.tokens


HEAT = 0.0, 0.8, 1.3


def heated(count=6):
    asked = requests(count)
    for i, request in enumerate(asked):
        request.temperature, request.seed = HEAT[i % len(HEAT)], 100 + i
    return asked


def test_sampled_answers_are_those_of_plain_sampling_with_the_same_coins(llama, way):
    asked = heated()
    run(llama, asked, num_slots=80, **way)
    model = Model(llama, 200)
    for r in asked:
        sampling = Sampling(r.temperature, r.seed)
        assert r.tokens == decode(model, r.prompt, r.count, sampling=sampling, end=r.end).tokens
    assert sum(r.retractions for r in asked) > 0


def test_with_drafts_sampled_answers_are_the_seeds_alone(llama, drafting, way):
    """Neither who runs beside a request nor how it is run changes its answer.

    It is not retracted, though: the token after a prefill is drawn with a coin of its own.
    """
    asked, alone = heated(), heated()
    run(llama, asked, drafting=drafting, **way)
    for request in alone:
        run(llama, [request], drafting=drafting, overlap=False)
    assert [r.tokens for r in asked] == [r.tokens for r in alone]


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


def test_nothing_races(llama, answers, race_sanitizer, drafting, way):  # noqa: F811
    asked = requests(6)
    run(llama, asked, num_slots=80, drafting=drafting, **way)
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
    drafting,
):
    asked = requests(6)
    with sim.drain_policy(policy):
        run(llama, asked, num_slots=80, drafting=drafting)
    assert [r.tokens for r in asked] == [answers(r) for r in asked]


def test_a_step_waits_for_nothing_but_the_tokens_of_the_one_before(
    sim, llama, monkeypatch, drafting, way
):
    monkeypatch.setenv("HWCORE_DEBUG", "0")  # it looks at arguments on the device
    engine = Engine(llama, 80, CONTEXT, buckets=(4,), drafting=drafting, chunk=16, **way)
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
