"""Training: what counts where, the loss and its gradient, and going on from a checkpoint."""

import json

import pytest
import torch

from examples.eagle_head import labels, plot, rows
from examples.eagle_head.layout import Shape
from examples.eagle_head.loss import HARD, block_loss, soft_cross_entropy
from examples.eagle_head.store import Document, save
from examples.eagle_head.training import (
    STEPS,
    Data,
    Settings,
    Training,
    draft_vocabulary,
    feature_scale,
)

SHAPE = Shape(
    hidden=16,
    heads=4,
    kv_heads=2,
    width=4,
    inner=24,
    vocab=60,
    draft_vocab=30,
    theta=1e4,
    epsilon=1e-5,
)


def document(index, length, prompt):
    chance = torch.Generator().manual_seed(index)
    tokens = torch.randint(3, SHAPE.vocab, (length,), generator=chance)
    answer = torch.arange(length) >= prompt
    states = torch.randn(length - 1, 4 * SHAPE.hidden, generator=chance).bfloat16()
    return Document(index, tokens, answer, True, "", states)


def data_of(documents):
    return Data(documents, [one.tokens[1:] for one in documents])


@pytest.fixture(name="data")
def _data():
    return data_of([document(index, 40 + 17 * index, 10) for index in range(16)])


@pytest.fixture(name="embedding")
def _embedding():
    return torch.randn(SHAPE.vocab, SHAPE.hidden, generator=torch.Generator().manual_seed(3))


def new_training(data, embedding, tokens=9000):
    settings = Settings(
        tokens=tokens, shards=1, draft_vocab=30, rows=2, warm_up=3, deeper=(1000, 2000)
    )
    draft_ids = draft_vocabulary(data, SHAPE.vocab, SHAPE.draft_vocab)
    return Training(settings, SHAPE, embedding, draft_ids, feature_scale(data, SHAPE))


def test_a_resumed_run_goes_on_as_if_never_stopped(tmp_path, data, embedding):
    through = new_training(data, embedding)
    losses = [through.step(data) for _ in range(12)]

    first = new_training(data, embedding)
    begun = [first.step(data) for _ in range(5)]
    save(first.state(), tmp_path / "checkpoint.pt")
    second = new_training(data, embedding)
    second.restore(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    rest = [second.step(data) for _ in range(7)]

    assert begun + rest == losses
    assert {len(one) for one in losses} == {2, 3, 4}
    assert second.seen == through.seen
    for name, weight in through.weights.items():
        assert second.weights[name].equal(weight), name


def test_the_loss_falls(data, embedding):
    training = new_training(data, embedding, tokens=40_000)
    losses = [training.step(data)[0] for _ in range(60)]

    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_agreement_is_found_where_the_head_is_right(data, embedding):
    training = new_training(data, embedding)
    token = int(training.draft_ids[3])
    constant = Data(data.documents, [torch.full_like(one, token) for one in data.best])
    with torch.no_grad():
        training.weights["lm_head.weight"].zero_()
        training.weights["lm_head.weight"][3] = 0.1
        training.weights["norm.weight"].zero_()
    # All logits are equal: the first of the draft vocabulary is named, and that is another.
    assert training.agreement(constant)["joint"] == [0.0] * STEPS
    first = Data(
        data.documents, [torch.full_like(one, int(training.draft_ids[0])) for one in data.best]
    )
    assert training.agreement(first) == {"marginal": [1.0] * STEPS, "joint": [1.0] * STEPS}


def test_the_draft_vocabulary_is_what_answers_have_most_often():
    one = document(0, 50, 10)
    tokens = torch.cat((torch.full((10,), 50), torch.full((30,), 7), torch.full((10,), 9)))
    asked = Document(0, tokens, one.answer, True, "", one.states)

    assert draft_vocabulary(data_of([asked]), SHAPE.vocab, 2).tolist() == [7, 9]


@pytest.mark.parametrize("length", [20, rows.ROW + 1, rows.ROW + 2, 700])
def test_every_position_of_an_answer_counts_in_one_piece(length):
    one = document(1, length, 10)
    pieces = rows.cut([one], [one.tokens[1:]], STEPS)
    embedding = torch.zeros(SHAPE.vocab, SHAPE.hidden)

    counted = torch.zeros(length, dtype=torch.int64)
    for piece in pieces:
        batch = rows.batch(SHAPE, embedding, [[piece]], STEPS)
        at = batch.counts[0, 0].nonzero().flatten() + piece.begin
        counted[at] += 1

    # Drafts are made after the answer's first token, and up to the one before the last.
    expected = (torch.arange(length) >= 9) & (torch.arange(length) < length - 2)
    assert (counted > 0).equal(expected)
    assert counted.sum() - expected.sum() <= STEPS * (len(pieces) - 1)


def test_a_piece_is_packed_with_its_own_tokens_and_states(data):
    embedding = torch.arange(SHAPE.vocab).float().unsqueeze(1).expand(-1, SHAPE.hidden)
    row = next(row for row in data.rows if len(row) > 1)
    batch = rows.batch(SHAPE, embedding, [row], STEPS)
    at = 0
    for piece in row:
        length = piece.end - piece.begin
        tokens = piece.document.tokens[piece.begin + 1 : piece.end + 1]
        assert batch.text.embedded[0, at : at + length, 0].equal(tokens.bfloat16())
        states = piece.document.states[piece.begin : piece.end]
        assert batch.text.features[0, at : at + length].equal(states[:, : 3 * SHAPE.hidden])
        assert batch.last[0, at : at + length].equal(states[:, 3 * SHAPE.hidden :])
        at += length
    sees = batch.text.mask[0, 0, 0] == 0
    split = row[0].end - row[0].begin
    assert not sees[split:, :split].any()
    assert sees[split - 1, :split].all()


def test_draft_steps_do_not_count_across_the_end_of_an_answer():
    one = document(2, 60, 10)
    answer = one.answer.clone()
    answer[30:35] = False  # a second message
    asked = Document(0, one.tokens, answer, True, "", one.states)
    piece = rows.cut([asked], [one.tokens[1:]], STEPS)[0]
    batch = rows.batch(SHAPE, torch.zeros(SHAPE.vocab, SHAPE.hidden), [[piece]], STEPS)

    for step in range(STEPS):
        for position in batch.counts[step, 0].nonzero().flatten().tolist():
            assert answer[position + 1 : position + step + 3].all()
    assert batch.counts[3, 0, 24]
    assert not batch.counts[3, 0, 25]


def test_draft_steps_do_not_count_across_pieces():
    pieces = [rows.Piece(document(index, 21, 0), torch.zeros(20), 0, 20, 0) for index in (1, 2)]
    batch = rows.batch(SHAPE, torch.zeros(SHAPE.vocab, SHAPE.hidden), [pieces], STEPS)

    for step in range(STEPS):
        counted = batch.counts[step, 0].nonzero().flatten().tolist()
        last = 20 - step - 1
        assert counted == [*range(last), *range(20, 20 + last)]


def test_the_losss_gradient_is_autograds():
    torch.manual_seed(1)
    x, head = torch.randn(700, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    target, label = torch.randn(700, 20).softmax(-1), torch.randint(20, (700,))
    weight = torch.rand(700)
    logs = (x @ head.T).log_softmax(-1)
    aim = (1 - HARD) * target + HARD * torch.nn.functional.one_hot(label, 20)
    expected = -((aim * logs).sum(-1) * weight).sum()
    gradients = torch.autograd.grad(expected, (x, head))

    found = soft_cross_entropy(x, head, target, label, weight, block_loss)

    torch.testing.assert_close(found, expected)
    for own, true in zip(torch.autograd.grad(found, (x, head)), gradients, strict=True):
        torch.testing.assert_close(own, true, atol=1e-3, rtol=1e-3)


def test_labels_of_drawn_answers_are_the_most_probable_tokens():
    one = document(4, 30, 10)
    drawn = Document(0, one.tokens, one.answer, False, "", one.states)
    output = torch.randn(256, SHAPE.hidden).bfloat16()

    found = labels.most_probable(drawn, output)

    last = one.states[:, -SHAPE.hidden :]
    assert found[9:].equal((last @ output.T)[9:].float().argmax(-1))
    assert found[:9].equal(one.tokens[1:10])


def test_labels_of_greedy_answers_are_their_tokens():
    one = document(4, 30, 10)

    assert labels.most_probable(one, torch.randn(256, SHAPE.hidden).bfloat16()).equal(
        one.tokens[1:]
    )


def test_the_course_of_accept_lengths_is_of_what_was_evaluated_alike(tmp_path, monkeypatch):
    # Left out where a device is tested: it is 25 MB to carry there.
    Axes = pytest.importorskip("matplotlib.axes").Axes
    drawn, draw = [], Axes.plot

    def drawing(axes, xs, ys, **options):
        drawn.append((xs, ys))
        return draw(axes, xs, ys, **options)

    monkeypatch.setattr(Axes, "plot", drawing)

    def line(head, length, every=1, ways=("chain", "tree"), prompts="all"):
        facts = {"accept_length": length, "interval": [length, length]}
        asked = {"head": head, "tokens": 128, "every": every, "prompts": prompts}
        return json.dumps(asked | dict.fromkeys(ways, facts)) + "\n"

    evaluation = tmp_path / "evaluation.jsonl"
    evaluation.write_text(
        line("export-2000000", 1.0)
        + line("export-1000000", 2.0)
        + line("export-2000000", 3.0)  # once more: it counts
        + line("export-3000000", 4.0, every=3)
        + line("export-3000000", 5.0, ways=("EAGLE tree",))  # for speed
        + line("export-3000000", 6.0, prompts="task edit")
        + line("trained", 7.0)
    )
    plot.accept_lengths(evaluation, tmp_path / "picture.png", tokens=128, every=1)
    assert drawn == [([1.0, 2.0], [2.0, 3.0])] * 2
    assert (tmp_path / "picture.png").is_file()
