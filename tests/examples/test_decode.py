import itertools

import pytest
import torch

from examples.serving import sizing
from examples.serving.compare import Outcome, compare, top_two
from examples.serving.decode import Answer, decode
from examples.serving.model import Model
from examples.serving.report import write
from examples.serving.step import plain_step, tree_step

VOCAB = 19


@pytest.fixture(scope="module")
def tiny(llama) -> Model:
    return Model(llama, capacity=400)


def prompts(count):
    generator = torch.Generator().manual_seed(7)
    for index in range(count):
        phrase = torch.randint(0, VOCAB, (12,), generator=generator).tolist()
        yield phrase * 3 if index % 2 else phrase


def test_plain_decoding_is_the_networks_own(tiny, network):
    prompt = next(prompts(1))
    answer = decode(tiny, prompt, 12)
    text = list(prompt)
    with torch.inference_mode():
        for _ in range(12):
            text.append(
                int(network(torch.tensor([text], device=network.device)).logits[0, -1].argmax())
            )
    assert answer.tokens == text[len(prompt) :]
    assert answer.sizes == [1] * 11
    assert answer.accept_length == 1


# Costs that make the sizer run small trees, large ones, and a mixture.
@pytest.mark.parametrize(
    "costs",
    [{1: 1.0, 4: 0.1}, {1: 1.0, 32: 0.1}, {1: 1.0, 2: 1.1, 8: 1.3, 24: 1.6}, {1: 1.0, 8: 99.0}],
)
def test_speculative_tokens_are_the_plain_ones(tiny, costs):
    steps, sizes = [], set()
    for prompt in prompts(12):
        plain, drafted = decode(tiny, prompt, 90), decode(tiny, prompt, 90, costs)
        assert drafted.tokens == plain.tokens
        assert sum(drafted.accepted) >= 89
        steps += drafted.accepted
        sizes |= set(drafted.sizes)
    assert sizes <= set(costs)
    if 8 not in costs or costs[8] < 99:
        assert max(steps) > 2, "no tree was ever accepted: the test shows nothing"
        assert max(sizes) > 1


def test_a_branch_is_taken_and_its_entries_move_to_the_front(tiny):
    """The right path is interleaved with wrong siblings and padding, so its slots must move."""
    prompt = next(prompts(1))
    with torch.inference_mode():
        right = decode(tiny, prompt, 8).tokens
        wrong = [(token + 1) % VOCAB for token in right]
        tiny.length = 0
        assert plain_step(tiny, prompt) == right[0]
        #            root    wrong     right     padding   wrong     right
        tokens = [right[0], wrong[1], right[1], right[0], wrong[2], right[2]]
        parents = [-1, 0, 0, -1, 2, 2]
        assert tree_step(tiny, tokens, parents, 2) == right[1:4]
        assert tiny.length == len(prompt) + 3
        # What follows reads the moved entries.
        assert plain_step(tiny, right[3:4]) == right[4]


def test_measured_costs_and_the_cache_they_leave(tiny):
    ticks = itertools.count()
    costs = sizing.measure(tiny, 20, sizes=(1, 4), rounds=2, tick=lambda: next(ticks))
    assert list(costs) == [1, 4]
    assert all(seconds > 0 for seconds in costs.values())
    assert next(ticks) == 3


def test_comparison_and_report(hw, tiny, tmp_path):
    costs = {1: 1.0, 4: 0.5}
    named = dict(zip(("first", "second"), prompts(2), strict=True))
    ticks = itertools.count()
    outcomes = compare(tiny, named, 20, 2, costs, tick=lambda: next(ticks))
    assert next(ticks) == 4
    assert [o.first_difference() for o in outcomes] == [None, None]
    assert all(len(o.plain) == len(o.speculative) == 2 for o in outcomes)
    text = write(tmp_path, outcomes, costs, end_of_text=VOCAB).read_text(encoding="utf-8")
    assert "identical to plain decoding: on all prompts" in text
    assert "| first | 12 | 20 |" in text
    assert f"backend `{hw.info.name}`" in text
    assert (tmp_path / "speculation.png").read_bytes().startswith(b"\x89PNG")

    outcomes[1].speculative[1].tokens[7] += 1
    assert outcomes[1].first_difference() == 7
    text = write(tmp_path, outcomes, costs, end_of_text=VOCAB).read_text(encoding="utf-8")
    assert "NO, they differ on second" in text
    best = top_two(tiny, outcomes[1].prompt, outcomes[1].plain[0].tokens[:7])
    assert best[0][0] == outcomes[1].plain[0].tokens[7]
    assert best[0][1] >= best[1][1]


def test_the_report_says_where_speculation_does_not_pay(hw, tmp_path):
    def answer(decode_s, sizes):
        return Answer([3] * 5, 1.0, decode_s, sizes, [1] * len(sizes))

    plain = answer(4.0, [1] * 4)
    copied = Outcome("copied", [1, 2], [plain], [answer(2.0, [4, 4])])
    invented = Outcome("invented", [1, 2], [plain], [answer(5.0, [1, 1, 1, 4])])
    assert (copied.ratio, invented.ratio) == (2.0, 0.8)
    assert copied.ratio_with_prefill == pytest.approx(5 / 3)
    costs = {1: 1.0, 4: 1.5}
    text = write(tmp_path, [copied, invented], costs, end_of_text=0).read_text(encoding="utf-8")
    assert "Pays (ratio at least 1.05): copied." in text
    assert "Does **not** pay: invented (0.80x, 75% of its steps plain)." in text
    assert "| invented | 2 | 5 | 1.00 | 1.0 | 0.8 | **0.80** | 0.80 to 0.80 | 0.83 |" in text
    assert "| 4 | 1500.0 | 1.50 |" in text
