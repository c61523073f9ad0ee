import pytest

from examples.serving.kv_pool import KVPool
from examples.serving.request import Request
from examples.serving.scheduler import Scheduler


@pytest.fixture
def scheduler(llama):
    def make(num_slots=100, num_rows=4, emits=1, reach=1, chunk=4):
        return Scheduler(KVPool(llama, num_slots, num_rows, max_context=512), emits, reach, chunk)

    return make


def request(name="r", prompt=3, count=5, arrival=0):
    return Request(name, list(range(prompt)), count, arrival)


def names(batch):
    return [r.name for r in batch.requests]


def collect(batch, token=7, times=1):
    """What the engine does with a step's tokens."""
    for r in batch.requests:
        r.in_flight -= 1
        r.take([token] * times)


def test_a_text_is_prefilled_in_chunks_and_only_the_last_one_emits(scheduler):
    s = scheduler(chunk=4)
    s.add(request(prompt=10))
    batches = [s.schedule(0) for _ in range(3)]
    assert [b.chunk for b in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [b.start for b in batches] == [0, 4, 8]
    assert [b.following for b in batches] == [[4], [8], []], "what a draft head wants to know"
    assert [b.emits for b in batches] == [False, False, True]
    assert [len(b.new_slots) for b in batches] == [10, 0, 0]
    assert [entry for _, entry, _ in batches[0].new_slots] == list(range(10))


def test_prefills_come_first_then_everyone_decodes(scheduler):
    s = scheduler()
    for name in "ab":
        s.add(request(name))
    assert [names(s.schedule(0)) for _ in range(3)] == [["a"], ["b"], ["a", "b"]]


def test_a_request_is_there_from_its_arrival_on(scheduler):
    s = scheduler()
    s.add(request("late", arrival=2))
    s.add(request("early"))
    assert names(s.schedule(0)) == ["early"]
    assert names(s.schedule(1)) == ["early"]
    assert names(s.schedule(2)) == ["late"]


def test_there_are_no_more_requests_than_rows(scheduler):
    s = scheduler(num_rows=3)
    for name in "abc":
        s.add(request(name))
    assert [names(s.schedule(0)) for _ in range(3)] == [["a"], ["b"], ["a", "b"]]
    assert [r.name for r in s.waiting] == ["c"]


def test_an_answer_whose_tokens_are_all_on_their_way_is_not_scheduled(scheduler):
    s = scheduler()
    s.add(request(count=2))
    assert s.schedule(0) is not None  # prefill: the first token
    assert s.schedule(0) is not None  # the second
    assert s.schedule(0) is None


@pytest.mark.parametrize(("emits", "reach"), [(1, 1), (4, 4), (4, 12)])
def test_slots_suffice_for_all_that_steps_in_flight_may_emit(scheduler, emits, reach):
    s, r = scheduler(emits=emits, reach=reach), request(prompt=3, count=50)
    s.add(r)
    prefill, first, second = (s.schedule(0) for _ in range(3))
    # The first token has no entry yet; three steps are in flight, none of them collected.
    assert len(r.slots) == 3 - 1 + 2 * emits + reach
    # Everything comes true at its least: memory that was taken is used before more is.
    for batch in (prefill, first, second):
        collect(batch)
    assert len(s.schedule(0).new_slots) == (1 if emits == 1 else 0)


def test_a_full_pool_retracts_the_youngest_which_comes_back_first_with_its_tokens(scheduler):
    s = scheduler(num_slots=1 + 9, chunk=8)
    old, young, third = request("old", count=5), request("young", count=5), request("third")
    for r in (old, young, third):
        s.add(r)
    for _ in range(2):
        collect(s.schedule(0))
    collect(s.schedule(0))  # one slot more for each: 8 of 9
    assert names(s.schedule(0)) == ["old"], "the second would want a tenth"
    assert (young.row, young.slots, young.retractions) == (0, [], 1)
    assert [r.name for r in s.waiting] == ["young", "third"]
    old.in_flight -= 1
    old.take([7, 7, 7])
    s.finish(old)
    back = s.schedule(0)
    assert names(back) == ["young"]
    assert back.chunk == [0, 1, 2, 7, 7], "its prompt and the tokens it had"
    assert back.emits


def test_a_retracted_request_waits_for_its_token_in_flight(scheduler):
    s = scheduler(num_slots=1 + 9, chunk=8)
    old, young = request("old"), request("young")
    s.add(old)
    s.add(young)
    for _ in range(2):
        collect(s.schedule(0))
    step = s.schedule(0)
    assert names(step) == ["old", "young"]
    assert names(s.schedule(0)) == ["old"]
    s.running.remove(old)
    s._leave(old)  # memory enough, and yet
    assert s.schedule(0) is None
    collect(step)
    assert s.schedule(0).chunk == [0, 1, 2, 7, 7]


def test_a_request_that_ends_while_it_is_retracted_leaves_the_queue(scheduler):
    s = scheduler(num_slots=1 + 9)
    old, young = request("old"), request("young", count=2)
    s.add(old)
    s.add(young)
    for _ in range(2):
        collect(s.schedule(0))
    step = s.schedule(0)
    s._retract(young)
    collect(step)
    assert young.finished
    s.finish(young)
    assert list(s.waiting) == []


def test_what_a_request_owned_is_free_after_it_and_its_row_is_told_once(scheduler):
    s = scheduler()
    r = request()
    s.add(r)
    collect(s.schedule(0), times=5)
    row = r.row
    s.finish(r)
    assert len(s._pool.free_slots) == 99
    assert len(s._pool.free_rows) == 3
    assert s.vacated() == [row]
    assert s.vacated() == []
    assert not s.busy


def test_padding_is_never_given_away(scheduler):
    s = scheduler(num_slots=10, num_rows=4)
    assert 0 not in s._pool.free_rows
    assert 0 not in s._pool.take_slots(9)


@pytest.mark.parametrize(
    ("prompt", "count"), [(0, 5), (3, 0), (3, 97), (500, 5)], ids=["empty", "none", "pool", "long"]
)
def test_a_request_that_could_not_run_even_alone_is_refused_with_the_fix(scheduler, prompt, count):
    with pytest.raises(ValueError, match=r"request `r` has .* Shorten it, or make the pool"):
        scheduler().add(request(prompt=prompt, count=count))


def test_an_answer_ends_with_its_end_token_or_its_count():
    r = Request("r", [1], 4, end=9)
    r.take([3, 9, 5])
    assert r.tokens == [3, 9]
    assert r.finished
    r = Request("r", [1], 2, end=9)
    r.take([3, 4, 9])
    assert r.tokens == [3, 4]
