import pytest

from examples.serving.lookup import Lookup
from examples.serving.sizing import Sizer

CHEAP = {1: 1.0, 4: 1.1, 8: 1.2}
DEAR = {1: 1.0, 4: 4.0, 8: 8.0}


def copying(length=40):
    """A text whose end repeats its beginning: drafts come true."""
    return [*range(length), *range(length // 2)]


def test_without_a_match_decoding_is_plain():
    draft = Lookup([1, 2, 3]).draft(8)
    assert Sizer(CHEAP).choose(draft) == 1


def test_size_follows_cost():
    draft = Lookup(copying()).draft(8)
    assert Sizer(CHEAP).choose(draft) == 8
    assert Sizer(DEAR).choose(draft) == 1


def test_an_uneven_cost_is_stepped_over():
    draft = Lookup(copying()).draft(8)
    assert Sizer({1: 1.0, 2: 5.0, 4: 1.2}).choose(draft) == 4


def test_failure_teaches_plain_decoding_and_success_brings_trees_back():
    sizer, text = Sizer({1: 1.0, 4: 1.3, 8: 1.5}), copying()
    draft = Lookup(text).draft(8)
    assert sizer.choose(draft) > 1
    for _ in range(12):
        sizer.watch(draft, len(text))
        sizer.learn([*text, 999])
    assert sizer.choose(draft) == 1
    # Nothing of this was run as a tree: what plain decoding gave is what teaches.
    for _ in range(12):
        sizer.watch(draft, len(text))
        sizer.learn([*text, *range(20, 40)])
    assert sizer.choose(draft) == 8


def test_a_draft_is_judged_once_its_fate_is_known():
    sizer, text = Sizer(CHEAP), copying()
    draft = Lookup(text).draft(8)
    before = sizer.expected(draft, 8)
    sizer.watch(draft, len(text))
    sizer.learn([*text, 20, 21])
    assert sizer.expected(draft, 8) == before, "two tokens do not decide a chain of seven"
    sizer.learn([*text, 20, 21, 999])
    after = sizer.expected(draft, 8)
    assert after != before
    sizer.learn([*text, 20, 21, 999, 0])
    assert sizer.expected(draft, 8) == after, "a draft is counted once"


def test_expectation_of_a_part_is_that_of_its_nodes():
    sizer = Sizer(CHEAP)
    draft = Lookup(copying()).draft(8)
    assert sizer.expected(draft, 1) == 1.0
    assert sizer.expected(draft, 3) == pytest.approx(1 + sum(draft.chances[1:3]))
    assert sizer.expected(draft, 100) == sizer.expected(draft, 8)
