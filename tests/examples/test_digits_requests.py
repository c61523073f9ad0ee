"""Requests and prompts: what is asked for, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest

from examples.disaggregated_diffusion.prompts import LENGTH, Style, phrasings, tokenize
from examples.disaggregated_diffusion.requests import (
    GUIDANCES,
    STEPS,
    Request,
    Scheduler,
    workload,
)
from hwcore.errors import ArgumentTypeError, ArgumentValueError

REQUEST = Request("one", ("a 7",), 3, 2.0, Scheduler.EULER, 4, 5)


@pytest.fixture(name="long")
def _long():
    return [one.request for one in workload()]


def test_the_workload_is_of_1_to_4096_samples_spread_by_their_logarithm(long):
    sizes = sorted(request.num_samples for request in long)
    assert len(long) == 64
    assert (sizes[0], sizes[-1]) == (1, 4096)
    octaves = [sum(2**k <= size < 2 ** (k + 1) for size in sizes) for k in range(13)]
    assert min(octaves[:12]) >= 4  # 4096 is alone in the last
    assert sizes != [request.num_samples for request in long]


def test_the_workload_mixes_guidance_schedulers_and_numbers_of_prompts(long):
    assert {request.guidance for request in long} == set(GUIDANCES)
    assert {request.scheduler for request in long} == set(Scheduler)
    assert {len(request.prompts) for request in long} == {1, 2, 3, 4}
    assert {request.num_inference_steps for request in long} == set(STEPS.values())
    assert len({request.seed for request in long}) == 64
    assert len({request.request_id for request in long}) == 64


def test_all_digits_are_asked_for():
    for short in (False, True):
        assert {digit for one in workload(short) for digit in one.digits} == set(range(10))


def test_the_workload_is_the_same_every_time_and_another_with_another_seed():
    assert workload() == workload()
    assert workload(seed=12) != workload()


def test_the_short_workload_is_small():
    sizes = [one.request.num_samples for one in workload(short=True)]
    assert len(sizes) == 16
    assert (min(sizes), max(sizes)) == (1, 256)
    assert sum(sizes) < 1000


def test_prompts_and_labels_of_the_workload_agree():
    for one in workload():
        known = [
            {text for style in Style for some in phrasings(digit, style) for text in some}
            for digit in one.digits
        ]
        for prompt, texts in zip(one.request.prompts, known, strict=True):
            assert prompt in texts
        labels = one.labels()
        assert len(labels) == one.request.num_samples
        assert labels[: len(one.digits)] == list(one.digits)


def test_a_request_travels_as_a_tree():
    assert Request.from_tree(REQUEST.to_tree()) == REQUEST


@pytest.mark.parametrize("tree", [None, {}, REQUEST.to_tree() | {"more": 1}])
def test_a_tree_that_is_no_request_is_refused(tree):
    with pytest.raises(ArgumentTypeError, match=r"the tree.*Request\.to_tree"):
        Request.from_tree(tree)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("request_id", 7, ArgumentTypeError),
        ("prompts", ["a 7"], ArgumentTypeError),
        ("prompts", (), ArgumentValueError),
        ("prompts", ("7",) * 33, ArgumentValueError),
        ("prompts", (7,), ArgumentTypeError),
        ("prompts", ("x" * LENGTH,), ArgumentValueError),
        ("prompts", ("sieben\u0301",), ArgumentValueError),
        ("prompts", ("a 7",) * 4, ArgumentValueError),  # and three samples
        ("num_samples", 0, ArgumentValueError),
        ("num_samples", 4097, ArgumentValueError),
        ("num_samples", True, ArgumentTypeError),
        ("num_samples", 2.0, ArgumentTypeError),
        ("guidance", 0.5, ArgumentValueError),
        ("guidance", float("nan"), ArgumentValueError),
        ("guidance", float("inf"), ArgumentValueError),
        ("guidance", 2, ArgumentTypeError),
        ("scheduler", "euler", ArgumentTypeError),
        ("num_inference_steps", 0, ArgumentValueError),
        ("num_inference_steps", 1001, ArgumentValueError),
        ("seed", -1, ArgumentValueError),
        ("seed", 2**63, ArgumentValueError),
    ],
)
def test_a_request_names_what_is_wrong_with_it(name, value, error):
    with pytest.raises(error) as caught:
        dataclasses.replace(REQUEST, **{name: value})
    assert ("num_samples" if value == ("a 7",) * 4 else name) in str(caught.value)


def test_a_tree_from_a_peer_is_checked_as_well():
    for changed in ({"guidance": 0.0}, {"prompts": None}, {"prompts": 3}, {"prompts": "a 7"}):
        with pytest.raises((ArgumentTypeError, ArgumentValueError), match=r"guidance|prompts"):
            Request.from_tree(REQUEST.to_tree() | changed)


def test_case_does_not_matter_and_the_empty_prompt_has_a_beginning():
    upper, lower = (tokenize([text])[0].tolist() for text in ("Draw a 7", "draw a 7"))
    assert upper == lower
    tokens, mask = tokenize(["", "x" * (LENGTH - 1)])
    assert mask.sum(1).tolist() == [1, LENGTH]
    assert len(set(tokens[:, 0].tolist())) == 1


def test_every_digit_has_phrasings_of_both_kinds_and_no_text_is_in_both():
    seen, unseen = set(), set()
    for digit in range(10):
        for style in Style:
            some, others = phrasings(digit, style)
            assert some
            assert others
            seen |= set(some)
            unseen |= set(others)
    assert not seen & unseen


def test_what_was_kept_back_is_made_of_parts_that_were_not():
    """Each form and each name of an unseen phrasing occurs in others that were trained on."""
    for style in Style:
        several = [phrasings(digit, style) for digit in range(10)]
        words = {word for seen, _ in several for text in seen for word in split(text)}
        for _, unseen in several:
            for text in unseen:
                assert set(split(text)) <= words


def split(text):
    return text.replace(",", " ,").replace(".", " .").split()
