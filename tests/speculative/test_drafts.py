import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hwcore.errors import ArgumentTypeError, ArgumentValueError
from hwcore.graphs.tape import Tape
from hwcore.speculative import DraftSteps, organize_draft_results, top_k

each = settings(
    deadline=None, max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
# Few values, so that they repeat; and what a head in trouble says.
VALUES = st.sampled_from([0.0, 0.25, 0.5, 1.0, float("nan"), float("-inf")])


def drafted(topk, spec_steps, probs, device, bs=2):
    """Steps of a head that says ``probs(step) [bs, beam, topk]`` of tokens numbered through."""
    steps, token = DraftSteps(topk), 0
    for step in range(spec_steps):
        beam = 1 if step == 0 else topk
        tokens = torch.arange(token, token + beam * topk).view(beam, topk).repeat(bs, 1, 1)
        token += beam * topk
        if step == 0:
            beam = steps.first(probs(step)[:, 0].to(device), tokens[:, 0].to(device))
        else:
            beam = steps.next(probs(step).to(device), tokens.to(device))
    return steps, beam


def random_probs(topk, seed=0, bs=2):
    generator = torch.Generator().manual_seed(seed)

    def probs(step):
        beam = 1 if step == 0 else topk
        shape = bs, beam, topk
        return torch.rand(shape, generator=generator).sort(dim=-1, descending=True).values

    return probs


def chosen_slowly(steps, num_draft_tokens, row):
    """The rule in Python: a candidate counts for no more than its proposer; the best, in order."""
    topk, worth, proposer = steps.topk, [], []
    beams = [parents[row].tolist() for parents in steps.parents]
    beams[0] = beams[0][1:]
    for step, scores in enumerate(steps.scores):
        for number, score in enumerate(scores[row].flatten().tolist()):
            above = -1 if step == 0 else beams[step - 1][number // topk]
            score = -math.inf if math.isnan(score) else score
            worth.append(score if above < 0 else min(score, worth[above]))
            proposer.append(above)
    order = sorted(range(len(worth)), key=lambda number: -worth[number])
    chosen = sorted(order[: num_draft_tokens - 1])
    place = {candidate: node for node, candidate in enumerate(chosen, start=1)} | {-1: 0}
    return chosen, [-1, *(place[proposer[candidate]] for candidate in chosen)]


@pytest.mark.parametrize("topk", [1, 2, 3])
@pytest.mark.parametrize("spec_steps", [1, 2, 4])
@pytest.mark.parametrize("seed", range(3))
def test_the_likeliest_candidates_are_chosen_with_their_proposers(topk, spec_steps, seed, device):
    steps, _ = drafted(topk, spec_steps, random_probs(topk, seed), device)
    candidates = topk + (spec_steps - 1) * topk**2
    for nodes in {1, 2, candidates // 2 + 1, candidates + 1}:
        results = steps.organize(nodes)
        roots = torch.tensor([900, 901], device=device)
        tokens, parents = results.with_root(roots)
        for row in range(2):
            chosen, expected = chosen_slowly(steps, nodes, row)
            assert results.selected_index[row].tolist() == chosen
            assert parents[row].tolist() == expected
            assert tokens[row].tolist() == [900 + row, *chosen]  # tokens are numbered likewise


@pytest.mark.parametrize("topk", [1, 3])
def test_the_first_ranks_of_a_tree_are_the_smaller_trees(topk, device):
    steps, _ = drafted(topk, 4, random_probs(topk), device)
    most = 1 + topk + 3 * topk**2
    whole = steps.organize(most)
    assert whole.ranks.sort(dim=1).values.tolist() == [list(range(most))] * 2
    for nodes in range(1, most + 1):
        part = steps.organize(nodes)
        for row in range(2):
            first = [
                candidate
                for candidate, rank in zip(
                    whole.selected_index[row].tolist(), whole.ranks[row, 1:].tolist(), strict=True
                )
                if rank < nodes
            ]
            assert part.selected_index[row].tolist() == first


@each
@given(data=st.data())
def test_a_child_never_comes_without_its_parent_whatever_the_scores(data, device):
    topk, spec_steps = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    scores, tokens, parents = [], [], []
    for step in range(spec_steps):
        beam = 1 if step == 0 else topk
        values = data.draw(st.lists(VALUES, min_size=beam * topk, max_size=beam * topk))
        scores.append(torch.tensor(values, device=device).view(1, beam, topk))
        tokens.append(torch.zeros(1, beam * topk, dtype=torch.int64, device=device))
        offset = 0 if step == 0 else topk + (step - 1) * topk**2
        number = st.integers(offset, offset + beam * topk - 1)
        beam = data.draw(st.lists(number, min_size=topk, max_size=topk, unique=True))
        front = [-1] if step == 0 else []
        parents.append(torch.tensor([front + beam], device=device))
    nodes = data.draw(st.integers(1, sum(step.shape[1] for step in tokens) + 1))
    results = organize_draft_results(scores, tokens, parents, nodes)
    _, links = results.with_root(torch.zeros(1, dtype=torch.int64, device=device))
    chosen = results.selected_index[0].tolist()
    listed = [-1] + [c for step in parents for c in step[0].tolist() if c >= 0]
    for candidate, parent in zip(chosen, links[0, 1:].tolist(), strict=True):
        if topk == 1:
            assert parent == candidate
            continue
        proposer = listed[candidate // topk]
        assert parent == (0 if proposer < 0 else chosen.index(proposer) + 1)


@pytest.mark.parametrize(("topk", "spec_steps"), [(2, 3), (4, 4), (8, 6)])
def test_equal_scores_choose_the_first_candidates(topk, spec_steps, device):
    steps, beam = drafted(
        topk, spec_steps, lambda step: torch.ones(2, 1 if step == 0 else topk, topk), device
    )
    assert beam.origin.tolist() == [[0] * topk] * 2
    for nodes in range(1, topk + (spec_steps - 1) * topk**2 + 2):
        assert steps.organize(nodes).selected_index[0].tolist() == list(range(nodes - 1))


def test_a_beam_goes_on_with_the_likeliest_paths(device):
    steps = DraftSteps(2)
    beam = steps.first(
        torch.tensor([[0.6, 0.4]], device=device), torch.tensor([[7, 8]], device=device)
    )
    assert beam.tokens.tolist() == [[7, 8]]
    assert beam.origin.tolist() == [[0, 0]]
    probs = torch.tensor([[[0.5, 0.4], [0.9, 0.1]]], device=device)
    beam = steps.next(probs, torch.tensor([[[1, 2], [3, 4]]], device=device))
    assert beam.tokens.tolist() == [[3, 1]]  # 0.36 and 0.30
    assert beam.origin.tolist() == [[1, 0]]
    assert beam.scores.tolist() == [[pytest.approx(0.36), pytest.approx(0.30)]]
    assert steps.parents[1].tolist() == [[2 + 2, 2 + 0]]


def test_a_chain_is_the_tree_of_one_branch(device):
    """What topk 1 takes short cuts for is what the general rule gives."""
    steps, _ = drafted(1, 5, random_probs(1), device)
    for nodes in range(1, 7):
        results = steps.organize(nodes)
        assert results.selected_index.tolist() == [list(range(nodes - 1))] * 2
        _, parents = results.with_root(torch.zeros(2, dtype=torch.int64, device=device))
        assert parents.tolist() == [list(range(-1, nodes - 1))] * 2
        assert results.parent_list.tolist() == [list(range(-1, 4))] * 2


def test_nan_of_one_request_leaves_the_others_as_they_were(device):
    clean = random_probs(3)
    probs = [clean(step) for step in range(3)]
    before = drafted(3, 3, lambda step: probs[step], device)[0].organize(9)
    probs[1][0] = float("nan")
    after = drafted(3, 3, lambda step: probs[step], device)[0].organize(9)
    assert torch.equal(before.selected_index[1], after.selected_index[1])
    assert torch.equal(before.draft_tokens[1], after.draft_tokens[1])
    assert not torch.equal(before.selected_index[0], after.selected_index[0])


@each
@given(data=st.data())
def test_top_k_prefers_the_front_among_equals(data, device):
    width = data.draw(st.integers(1, 9))
    rows = data.draw(st.lists(st.lists(VALUES, min_size=width, max_size=width), max_size=3))
    topk = data.draw(st.integers(1, width))
    given_values = torch.tensor(rows, device=device).view(len(rows), width)
    values, places = top_k(given_values, topk)
    for row, got, found in zip(rows, places.tolist(), values.tolist(), strict=True):
        known = [-math.inf if math.isnan(value) else value for value in row]
        expected = sorted(range(width), key=lambda place: -known[place])[:topk]
        assert got == expected
        assert all(
            math.isnan(value) if math.isnan(row[place]) else value == row[place]
            for value, place in zip(found, expected, strict=True)
        )


@each
@given(data=st.data())
def test_what_the_host_sees_on_a_cpu_changes_no_bit_of_top_k(data, hw):
    """There rows without equals take a short cut; nowhere while a graph is captured."""
    width = data.draw(st.integers(2, 7))
    rows = data.draw(st.lists(st.lists(VALUES, min_size=width, max_size=width), min_size=1))
    few = data.draw(st.lists(st.floats(width=32), min_size=width, max_size=width))
    values, topk = torch.tensor([few, *rows]), data.draw(st.integers(1, width))
    tape = Tape()
    general = tape.capture(lambda: top_k(values, topk))
    tape.replay()
    for got, want in zip(top_k(values, topk), general, strict=True):
        assert got.is_contiguous()
        assert torch.equal(got.nan_to_num(nan=7.5), want.nan_to_num(nan=7.5))
    tape.close()


def test_places_of_a_reduced_vocabulary_become_the_targets_tokens(device):
    values = torch.tensor([[[0.1, 0.4, 0.4], [0.3, 0.1, 0.6]]], device=device)
    draft_ids = torch.tensor([70, 20, 40_000], device=device)
    for topk in (1, 2, 3):
        found, places = top_k(values, topk)
        same, tokens = top_k(values, topk, draft_ids=draft_ids)
        assert torch.equal(found, same)
        assert torch.equal(tokens, draft_ids[places])
    assert tokens.tolist() == [[[20, 40_000, 70], [40_000, 70, 20]]]


def test_drafting_waits_for_nothing_and_can_be_captured(hw, device):
    if hw.info.name != "sim":
        pytest.skip("the device does not tell what the host waits for")
    from hwcore_sim import device as sim

    logits = torch.rand(2, 3, 50, device=device)

    def draft():
        steps = DraftSteps(3)
        probs, tokens = top_k(logits.softmax(-1), 3)
        steps.first(probs[:, 0], tokens[:, 0])
        steps.next(probs, tokens)
        return steps.organize(8).with_root(tokens[:, 0, 0])

    eager = [tensor.tolist() for tensor in draft()]
    tape = Tape()
    with sim.host_waits() as waits:
        captured = tape.capture(draft)
        tape.replay()
    assert waits == []
    assert [tensor.tolist() for tensor in captured] == eager
    tape.close()


def floats(*shape):
    return torch.rand(*shape)


def ints(*shape):
    return torch.zeros(*shape, dtype=torch.int64)


BAD = [
    (lambda: DraftSteps(0), ArgumentValueError, "`?topk`? got 0"),
    (lambda: DraftSteps(True), ArgumentTypeError, "topk"),
    (
        lambda: DraftSteps(2).first(floats(1, 3), ints(1, 3)),
        ArgumentValueError,
        r"probs\.shape got \[1, 3\] .*topk=2",
    ),
    (
        lambda: DraftSteps(2).first(floats(1, 2), floats(1, 2)),
        ArgumentTypeError,
        r"tokens\.dtype got torch\.float32",
    ),
    (
        lambda: DraftSteps(2).next(floats(1, 2, 2), ints(1, 2, 2)),
        ArgumentValueError,
        r"no beam yet; expected first\(\)",
    ),
    (
        lambda: organize_draft_results([], [], [], 1),
        ArgumentValueError,
        "lists of one length",
    ),
    (
        lambda: organize_draft_results([floats(1, 1, 2)], [ints(1, 2)], [ints(1, 3)], 4),
        ArgumentValueError,
        "num_draft_tokens got 4 .*expected at most 3",
    ),
    (
        lambda: organize_draft_results([floats(1, 1, 2)], [ints(1, 2)], [ints(1, 2)], 2),
        ArgumentValueError,
        r"parents\[0\]\.shape",
    ),
    (
        lambda: organize_draft_results(None, [ints(1, 2)], [ints(1, 3)], 2),
        ArgumentTypeError,
        "scores got None .*a list of tensors",
    ),
    (
        lambda: organize_draft_results([floats(1, 1, 2)], [ints(1, 2)], [ints(1, 3) + 77], 2),
        ArgumentValueError,
        r"the beam in parents\[0\]\[0, 0\] got 7\d .*in \[0, 2\)",
    ),
    (lambda: top_k(ints(2, 2), 1), ArgumentTypeError, "a tensor of floats"),
    (lambda: top_k(floats(2, 3), 4), ArgumentValueError, "topk got 4 .*at most 3"),
    (
        lambda: top_k(floats(2, 3), 1, draft_ids=ints(4)),
        ArgumentValueError,
        r"draft_ids\.shape got \[4\] .*\[vocab=3\]",
    ),
    (lambda: top_k(floats(3), 1, draft_ids=floats(3)), ArgumentTypeError, r"draft_ids\.dtype"),
    (
        lambda: top_k(floats(3), 1, draft_ids=ints(3) - 2),
        ArgumentValueError,
        r"draft_ids\[0\] got -2 .*at least 0\. Pass the target's tokens",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input_is_named(call, error, message, hw):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("topk", [1, 3])
def test_a_batch_may_be_empty(topk, device):
    steps = DraftSteps(topk)
    tokens = torch.zeros(0, topk, topk, dtype=torch.int64, device=device)
    steps.first(torch.zeros(0, topk, device=device), tokens[:, 0])
    beam = steps.next(torch.zeros(0, topk, topk, device=device), tokens)
    assert beam.tokens.shape == (0, topk)
    assert steps.organize(2).draft_tokens.shape == (0, 1)


def test_candidates_may_lie_in_any_order_in_memory(device):
    probs = torch.rand(3, 2, 2, generator=torch.Generator().manual_seed(0)).to(device)
    tokens = torch.arange(12, device=device).view(3, 2, 2)
    found = []
    for strided in (False, True):
        steps = DraftSteps(2)
        steps.first(probs[:, 0], tokens[:, 0])
        given = probs.transpose(1, 2).contiguous().transpose(1, 2) if strided else probs
        found.append(steps.next(given, tokens))
    assert torch.equal(found[0].scores, found[1].scores)
    assert torch.equal(found[0].tokens, found[1].tokens)


def test_no_steps_at_all(device):
    with pytest.raises(ArgumentValueError, match="an entry a step"):
        DraftSteps(2).organize(1)
