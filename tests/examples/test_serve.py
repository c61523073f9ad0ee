import pytest

from examples.serving import serve_report
from examples.serving.model import Model
from examples.serving.serve import (
    TOLERANCE,
    WAYS,
    Difference,
    fitting_buckets,
    num_runs,
    serve,
)

PROMPTS = {"a": [3, 1, 4, 1, 5], "b": [9, 2, 6] * 3, "c": [5, 3, 5], "d": [8, 9, 7, 9]}


@pytest.fixture
def model(llama, head):
    return Model(llama, 100, head.shape.taps)


def test_all_ways_give_each_request_the_answer_it_gets_alone(model, head):
    ticks = []
    kinds = ["plain", "lookup", "EAGLE chain", "EAGLE tree"]
    options = {"head": head, "bucket": 3, "rounds": 2}
    served = serve(model, PROMPTS, 24, tick=lambda: ticks.append(1), **options)
    assert len(ticks) == num_runs(len(PROMPTS), rounds=2, head=head)
    assert served.differences == []
    assert served.sound
    assert served.compared == len(PROMPTS) * (4 * (1 + 1 + 2 * 3) - 1), "plain alone is the measure"
    assert served.retractions > 0
    assert list(served.alone) == kinds
    assert all(answers == served.alone["plain"] for answers in served.alone.values())
    assert {len(timings) for timings in served.timings.values()} == {2}
    assert set(served.timings) == {(kind, way) for kind in kinds for way in WAYS}


def test_an_answer_that_ends_early_is_compared_whole(model):
    served = serve(model, PROMPTS, 24, bucket=2, end=7)
    assert served.differences == []
    assert any(tokens[-1] == 7 and len(tokens) < 24 for tokens in served.alone["plain"].values())


def test_a_wrong_token_is_found_and_weighed(model, monkeypatch):
    from examples.serving import serve as module

    class Wrong(module.Engine):
        def run(self, requests):
            super().run(requests)
            if len(requests) > 1 and self.overlap:
                for request in requests[:2]:  # the oldest is never retracted
                    request.tokens[5] += 1

    monkeypatch.setattr(module, "Engine", Wrong)
    served = serve(model, PROMPTS, 24, bucket=2)
    assert not served.sound
    assert {(d.name, d.place) for d in served.differences} == {("a", 5), ("b", 5)}
    a, b = (d for d in served.differences if d.run == "plain, overlap")
    assert (a.other_bucket, b.other_bucket) == (False, True), "the second was retracted"
    assert a.gap > TOLERANCE
    assert "NO" in serve_report.section(served)


@pytest.mark.parametrize(
    ("gap", "other_bucket", "allowed"),
    [(0.0001, True, True), (0.0001, False, False), (0.001, True, False)],
)
def test_only_a_near_tie_on_another_bucket_is_allowed(gap, other_bucket, allowed):
    assert Difference("run", "a", 3, gap, other_bucket).allowed == allowed


def test_the_report_has_a_row_for_each_way_and_lists_each_difference(model):
    served = serve(model, PROMPTS, 12, bucket=2)
    served.differences.append(Difference("lookup, alone", "c", 4, 0.000123, True))
    text = serve_report.section(served)
    assert "4 requests" in text
    assert "is that of the request alone: yes" in text
    assert "- lookup, alone: `c` at token 4, the two largest logits 0.000123 apart\n" in text
    table = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert [line[:2] for line in table[2:]] == [
        [f"| {k}", w] for k in ("plain", "lookup") for w in WAYS
    ]
    assert {len(line) for line in table} == {2 + len(serve_report.COLUMNS)}
    served.differences.append(Difference("plain, off", "a", 4, 0.000123, False))
    text = serve_report.section(served)
    assert "is that of the request alone: NO" in text
    assert "0.000123 apart: **WRONG**" in text


def test_buckets_that_fit_double_up_to_the_largest():
    assert fitting_buckets(8) == [1, 2, 4, 8]
    assert fitting_buckets(6) == [1, 2, 4, 6]
    assert fitting_buckets(1) == [1]
