import importlib.util
import itertools
import sys

import pytest
import torch

from examples import serving
from examples.serving import sizing
from examples.serving.compare import PLAIN, Outcome, compare, top_two
from examples.serving.decode import Answer, decode
from examples.serving.drafters import Eagle, PromptLookup
from examples.serving.eagle import HeadRunner
from examples.serving.model import Model
from examples.serving.report import write
from examples.serving.step import Sampling, plain_step, tree_step
from hwcore.speculative import TreeSizer

VOCAB = 19
DRAWN = importlib.util.find_spec("matplotlib") is not None  # not where a device is tested


@pytest.fixture(scope="module")
def tiny(llama, head) -> Model:
    return Model(llama, capacity=400, taps=head.shape.taps)


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
        plain, drafted = (
            decode(tiny, prompt, 90),
            decode(tiny, prompt, 90, PromptLookup(costs, tiny.device)),
        )
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
        assert plain_step(tiny, prompt).tokens == right[:1]
        #            root    wrong     right     padding   wrong     right
        tokens = [right[0], wrong[1], right[1], right[0], wrong[2], right[2]]
        parents = [-1, 0, 0, -1, 2, 2]
        nodes, links = torch.tensor([[tokens], [parents]], device=tiny.device)
        emitted = tree_step(tiny, nodes, links, 2)
        assert emitted.tokens == right[1:4]
        assert emitted.path == [0, 2, 5]
        assert tiny.length == len(prompt) + 3
        # What follows reads the moved entries.
        assert plain_step(tiny, right[3:4]).tokens == right[4:5]


def test_measured_costs_and_the_cache_they_leave(tiny):
    ticks = itertools.count()
    costs = sizing.measure(tiny, 20, sizes=(1, 4), rounds=2, tick=lambda: next(ticks))
    assert list(costs) == [1, 4]
    assert all(seconds > 0 for seconds in costs.values())
    assert next(ticks) == 3


def eagle(head, model, topk, sizes, spec_steps=4) -> Eagle:
    return Eagle(HeadRunner(head, model.num_slots, topk, spec_steps), model, sizes)


@pytest.mark.parametrize(("topk", "size"), [(1, 2), (1, 5), (3, 4), (4, 16)])
def test_tokens_drafted_by_a_head_are_the_plain_ones(topk, size, head, tiny):
    drafter, steps = eagle(head, tiny, topk, (1, size)), []
    for prompt in prompts(6):
        plain, drafted = decode(tiny, prompt, 60), decode(tiny, prompt, 60, drafter)
        assert drafted.tokens == plain.tokens
        assert set(drafted.sizes) == {size}
        steps += drafted.accepted
    assert max(steps) > 1, "nothing was ever accepted: the test shows nothing"


def test_the_longest_path_is_kept_of_trees_that_branch(head, tiny):
    prompt = next(prompts(1))
    assert decode(tiny, prompt, 60, eagle(head, tiny, 1, (1, 4))).longest is None
    steps, drafter = [], eagle(head, tiny, 4, (1, 4))
    learn, propose = drafter.learn, drafter.propose

    def proposing(size):
        steps.append([propose(size)])
        return steps[-1][0]

    def learning(emitted):
        if steps:
            steps[-1].append(len(emitted.path))
        learn(emitted)

    drafter.propose, drafter.learn = proposing, learning
    proposal, emitted = decode(tiny, prompt, 60, drafter).longest
    assert proposal.branches
    assert len(emitted.path) == max(path for tree, path in steps if tree.branches)
    assert any(not tree.branches for tree, _ in steps), "nothing was left out"


def test_an_answer_ends_with_the_token_that_ends_it(head, tiny):
    prompt = next(prompts(1))
    whole = decode(tiny, prompt, 60).tokens
    end = whole[20]
    expected = whole[: whole.index(end) + 1]
    plain = decode(tiny, prompt, 60, end=end)
    assert plain.tokens == expected
    assert len(plain.accepted) == len(expected) - 1  # and no step more
    answer = decode(tiny, prompt, 60, eagle(head, tiny, 4, (1, 16)), end=end)
    assert answer.tokens == expected
    assert 0 < answer.draft_s < answer.decode_s


def test_a_head_catches_up_after_plain_steps(head, tiny):
    """Whatever the sizer does in between, the head drafts as if it had drafted all along."""
    prompt = next(prompts(1))
    always, sometimes = eagle(head, tiny, 1, (1, 4)), eagle(head, tiny, 1, (1, 4))
    proposals = []
    for drafter in (always, sometimes):
        tiny.length = 0
        with torch.inference_mode():
            emitted = plain_step(tiny, prompt)
            drafter.begin(prompt, emitted)
            for _ in range(5):
                if drafter is always:
                    drafter.propose(4)
                emitted = plain_step(tiny, emitted.tokens)
                drafter.learn(emitted)
            proposals.append(drafter.propose(4).nodes.tolist())
    assert proposals[0] == proposals[1]


def test_what_a_head_brings_decides_the_size(head, tiny):
    drafter = eagle(head, tiny, 4, (1, 4, 16))
    costs = drafter.calibrate(20, rounds=2)
    assert list(costs) == [1, 4, 16]
    prompt = next(prompts(1))
    plain = decode(tiny, prompt, 60).tokens
    for by_size, expected in (({1: 1.0, 4: 1.0, 16: 1.0}, 16), ({1: 1.0, 4: 9.0, 16: 9.0}, 1)):
        drafter.sizer = TreeSizer(by_size)
        answer = decode(tiny, prompt, 60, drafter)
        assert answer.tokens == plain
        assert set(answer.sizes[-8:]) == {expected}


def test_sampled_tokens_depend_on_the_seed_alone(head, tiny):
    prompt = next(prompts(1))
    hot = [Sampling(1.0, seed) for seed in (1, 1, 2)]
    first, again, other = (decode(tiny, prompt, 40, None, sampling).tokens for sampling in hot)
    assert first == again != other
    assert first != decode(tiny, prompt, 40).tokens
    drafted = [decode(tiny, prompt, 40, eagle(head, tiny, 4, (1, 8)), it) for it in hot]
    assert drafted[0].tokens == drafted[1].tokens != drafted[2].tokens
    assert max(drafted[0].accepted) > 1


def outcomes_of(tiny, count, rounds, drafters, temperature=0.0, **more):
    named = dict(zip(("first", "second"), prompts(2), strict=True))
    return compare(tiny, named, count, drafters, rounds, temperature, **more)


class Letters:
    """A tokenizer whose tokens are letters."""

    eos_token_id = VOCAB

    def decode(self, tokens):
        return "".join(chr(97 + token) for token in tokens)


def test_comparison_and_report(hw, head, tiny, tmp_path):
    costs, ticks = {1: 1.0, 4: 0.5}, itertools.count()
    drafters = {
        "lookup": PromptLookup(costs, tiny.device),
        "EAGLE chain": eagle(head, tiny, 1, (1, 4)),
        "EAGLE tree": eagle(head, tiny, 4, (1, 8)),
    }
    outcomes = outcomes_of(tiny, 20, 2, drafters, tick=lambda: next(ticks))
    sampled = outcomes_of(tiny, 20, 1, drafters, 0.8)
    assert next(ticks) == 4
    assert [o.first_difference() for o in (*outcomes, *sampled)] == [None] * 4
    assert list(outcomes[0].runs) == [PLAIN, *drafters]
    assert all(len(runs) == 2 for o in outcomes for runs in o.runs.values())
    by_way = {"lookup": costs, "EAGLE tree": {1: 1.0, 8: 1.5}}

    def written():
        return write(tmp_path, outcomes, sampled, by_way, Letters()).read_text(encoding="utf-8")

    text = written()
    assert "identical to plain decoding: on all prompts" in text
    assert "| first | 12 | 20 | plain | 1.00 |" in text
    assert "| EAGLE tree | 8 | 1500.0 | 1.50 |" in text
    assert f"backend `{hw.info.name}`" in text
    for picture in ("speculation.png", "accepted.png", "tree.png") if DRAWN else ():
        assert f"({picture})" in text
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")

    outcomes[1].runs["lookup"][1].tokens[7] += 1
    assert outcomes[1].first_difference() == 7
    assert "NO, they differ on second" in written()
    best = top_two(tiny, outcomes[1].prompt, outcomes[1].runs[PLAIN][0].tokens[:7])
    assert best[0][0] == outcomes[1].runs[PLAIN][0].tokens[7]
    assert best[0][1] >= best[1][1]


def test_the_report_says_where_speculation_does_not_pay(hw, tmp_path):
    def answer(decode_s, sizes):
        return Answer([3] * 5, 1.0, decode_s, sizes, [1] * len(sizes))

    plain = answer(4.0, [1] * 4)
    copied = Outcome("copied", [1, 2], 0.0, {PLAIN: [plain], "lookup": [answer(2.0, [4, 4])]})
    other = answer(5.0, [1, 1, 1, 4])
    invented = Outcome("invented", [1, 2], 0.0, {PLAIN: [plain], "lookup": [other]})
    assert (copied.ratio("lookup"), invented.ratio("lookup")) == (2.0, 0.8)
    assert copied.ratio_with_prefill("lookup") == pytest.approx(5 / 3)
    both = [copied, invented]
    costs = {"lookup": {1: 1.0, 4: 1.5}}
    text = write(tmp_path, both, both, costs, Letters()).read_text(encoding="utf-8")
    assert "**lookup** pays (ratio at least 1.05): copied (2.00x)." in text
    assert "Does **not** pay: invented (0.80x, 75% of its steps plain)." in text
    assert "| | | | lookup | 1.00 | 0.8 | **0.80** | 0.80 to 0.80 | 0.83 | 1x3, 4x1 |" in text
    assert ("no tree with branches was verified" in text) == DRAWN


def test_without_the_library_of_pictures_the_report_says_so(hw, tmp_path, monkeypatch):
    monkeypatch.delattr(serving, "pictures", raising=False)
    monkeypatch.setitem(sys.modules, "examples.serving.pictures", None)
    plain = Outcome("text", [1, 2], 0.0, {PLAIN: [Answer([3] * 5, 1.0, 4.0, [1] * 4, [1] * 4)]})
    text = write(tmp_path, [plain], [plain], {}, Letters()).read_text(encoding="utf-8")
    assert "*(no pictures: " in text
    assert ".png" not in text
    assert "| text | 2 | 5 | plain |" in text
