"""A toy engine on the worker: paged, overlapped, captured, retracted, and the same tokens."""

import pytest

from ._toy import ToyEngine, greedy_answer, requests

WAYS = [
    (topk, page_size, plan_stream, graphs)
    for topk in (1, 3)
    for page_size in (1, 4)
    for plan_stream in (False, True)
    for graphs in (False, True)
]


@pytest.mark.usefixtures("in_any_order", "watched")
@pytest.mark.parametrize(("topk", "page_size", "plan_stream", "graphs"), WAYS)
def test_greedy_tokens_are_those_of_plain_decoding(hw, topk, page_size, plan_stream, graphs):
    asked = requests()
    engine = ToyEngine(hw, topk=topk, page_size=page_size, plan_stream=plan_stream, graphs=graphs)
    got = engine.run(asked)
    assert got == [greedy_answer(r.prompt, r.count) for r in asked]
    print(engine.seen)
