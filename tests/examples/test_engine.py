"""Many requests at once: the same tokens as each alone, whatever is overlapped or captured."""

import copy
import itertools
import random
import time
from functools import partial

import pytest
import torch

from examples.serving.decode import decode
from examples.serving.drafting import NO_DRAFTS, BatchLookup
from examples.serving.eagle import HeadDrafting, HeadRunner
from examples.serving.engine import Engine
from examples.serving.model import Model
from examples.serving.request import Request
from examples.serving.step import Sampling
from examples.serving.worker import Worker
from hwcore.testing.fixtures import race_sanitizer  # noqa: F401  a fixture

from ._drafts import continuation

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


@pytest.fixture
def kinds(head):
    return {
        "plain": NO_DRAFTS,
        "lookup": partial(BatchLookup, width=4),
        "chain": partial(HeadDrafting, head=head, topk=1, spec_steps=3, width=4),
        "tree": partial(HeadDrafting, head=head, topk=3, spec_steps=4, width=8),
    }


@pytest.fixture(params=["plain", "lookup", "chain", "tree"])
def drafting(request, kinds):
    return kinds[request.param]


@pytest.fixture(params=["lookup", "tree"])
def some_drafting(request, kinds):
    """For what takes long: all that they do differently, these two do."""
    return kinds[request.param]


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
    llama, answers, some_drafting, way
):
    asked = requests()
    engine = run(llama, asked, num_slots=80, drafting=some_drafting, **way)
    assert [r.tokens for r in asked] == [answers(r) for r in asked]
    assert sum(r.retractions for r in asked) > 0
    assert sorted(engine.pool.free_slots) == list(range(1, 80))
    assert sorted(engine.pool.free_rows) == [1, 2, 3, 4]


def test_more_requests_than_rows_take_rows_that_others_have_left(llama, answers):
    asked = requests(6)
    run(llama, asked, buckets=(2,), drafting=partial(BatchLookup, width=4))
    assert [r.tokens for r in asked] == [answers(r) for r in asked]


def test_the_relay_finds_every_row_written_once_and_read_once(
    llama, monkeypatch, some_drafting, way
):
    """Requests finish early and are retracted: what they left must have been discarded."""
    monkeypatch.setenv("HWCORE_DEBUG", "1")
    asked = requests()
    run(llama, asked, num_slots=80, drafting=some_drafting, **way)  # close() raises what it found
    assert sum(r.retractions for r in asked) > 0


@pytest.fixture
def drafts(monkeypatch):
    """Every draft of an engine: whose, after how many entries, its nodes, their parents."""
    seen, submit = [], Worker.submit

    def watched(drafting):
        def make(pool):
            made = drafting(pool)
            draft = made.draft

            def drafted(rows, lens, relayed, slots):
                tokens, parents = draft(rows, lens, relayed, slots)
                seen.append([lens.tolist(), tokens.tolist(), parents.tolist()])
                return tokens, parents

            made.draft = drafted
            return made

        return make

    def submitting(worker, batch, prepared):
        step = submit(worker, batch, prepared)
        if not batch.chunk:
            seen[-1].insert(0, batch.requests)
        return step

    monkeypatch.setattr(Worker, "submit", submitting)
    watched.all = lambda: [each for step in seen for each in zip(*step, strict=False)]
    return watched


def hard_requests(llama):
    """Some prompts take several chunks. With them what their texts are, further than asked."""
    asked = requests(8)
    asked[0].prompt = list(range(19)) * 2
    model = Model(llama, 200)
    return asked, {r.name: r.prompt + decode(model, r.prompt, r.count + 9).tokens for r in asked}


@pytest.mark.parametrize(("topk", "width"), [(1, 4), (3, 8)])
def test_a_head_drafts_for_requests_what_it_drafts_for_each_text(
    llama, head, drafts, topk, width, way
):
    """What the head has lost of a text costs drafts, not tokens, so that they are compared."""
    asked, texts = hard_requests(llama)
    drafting = partial(HeadDrafting, head=head, topk=topk, spec_steps=4, width=width)
    run(llama, asked, num_slots=92, drafting=drafts(drafting), **way)
    model = Model(llama, 200, head.shape.taps)
    runner = HeadRunner(head, model.num_slots, topk, 4)

    def on(*numbers):
        return torch.tensor([numbers], device=llama.device)

    for request, entries, tokens, parents in drafts.all():
        text, count = texts[request.name], on(entries)[0]
        model.length = 0
        with torch.inference_mode():
            features = model.forward(on(*text[:entries]))[1]
            start = runner.extend(
                on(*text[1 : entries + 1]), features, on(0)[0], model.slots, count
            )
            root = on(text[entries])[0]
            expected = runner.draft(start, root, count, model.slots, width)[:2]
        assert [tokens, parents] == [found[0].tolist() for found in expected]
    assert sum(r.retractions for r in asked) > 3


def test_lookup_drafts_for_requests_what_it_drafts_for_each_text(llama, drafts, way):
    asked, texts = hard_requests(llama)
    run(llama, asked, num_slots=92, drafting=drafts(partial(BatchLookup, width=4)), **way)
    for request, entries, tokens, parents in drafts.all():
        expected = continuation(texts[request.name][: entries + 1], 4)
        assert tokens[: len(expected)] == expected
        assert parents == [*range(-1, len(expected) - 1)] + [-1] * (4 - len(expected))
    assert sum(r.retractions for r in asked) > 3


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


def test_with_drafts_sampled_answers_are_the_seeds_alone(llama, some_drafting, way):
    """Neither who runs beside a request nor how it is run changes its answer.

    It is not retracted, though: the token after a prefill is drawn with a coin of its own.
    """
    asked, alone = heated(), heated()
    run(llama, asked, drafting=some_drafting, **way)
    for request in alone:
        run(llama, [request], drafting=some_drafting, overlap=False)
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
    known, steps = {}, []

    def submitting(batch, prepared):
        log.append(("submit", len(known)))
        step = submit(batch, prepared)
        known[id(step)] = len(known)
        steps.append(step)  # so that no other gets its id
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


def test_more_positions_than_the_model_is_prepared_for_are_refused(llama, head):
    with pytest.raises(ValueError, match="max_context is 513; expected at most the 512 positions"):
        Engine(llama, 100, 513)
    short = copy.copy(head)
    short.max_context = 95
    with pytest.raises(ValueError, match="max_context is 96; expected at most the 95 positions"):
        run(llama, [], drafting=partial(HeadDrafting, head=short, topk=1, spec_steps=3, width=4))


def test_nothing_races(llama, answers, race_sanitizer, some_drafting, way):  # noqa: F811
    asked = requests(6)
    run(llama, asked, num_slots=80, drafting=some_drafting, **way)
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
    some_drafting,
):
    asked = requests(6)
    with sim.drain_policy(policy):
        run(llama, asked, num_slots=80, drafting=some_drafting)
    assert [r.tokens for r in asked] == [answers(r) for r in asked]


def test_a_step_waits_for_nothing_but_the_tokens_of_the_one_before(
    sim, llama, monkeypatch, some_drafting, way
):
    monkeypatch.setenv("HWCORE_DEBUG", "0")  # it looks at arguments on the device
    engine = Engine(llama, 80, CONTEXT, buckets=(4,), drafting=some_drafting, chunk=16, **way)
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
