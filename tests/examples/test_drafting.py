import random
from types import SimpleNamespace

import pytest
import torch

from examples.serving.drafting import BatchLookup

from ._drafts import continuation

CONTEXT = 40


@pytest.fixture
def lookup(hw):
    def make(texts, width):
        """Rows 1, 2, … hold the texts, and what an earlier request left behind them."""
        table = torch.zeros(len(texts) + 1, CONTEXT, device=hw.device())
        pool = SimpleNamespace(num_rows=len(table), max_context=CONTEXT, table=table)
        made = BatchLookup(pool, width)
        made._text.fill_(1)
        rows = torch.arange(1, len(texts) + 1, device=hw.device())
        longest = max(map(len, texts))
        padded = [text + [-1] * (longest - len(text)) for text in texts]
        made.append(rows, torch.zeros_like(rows), torch.tensor(padded, device=hw.device()))
        lens = torch.tensor([len(text) - 1 for text in texts], device=hw.device())
        roots = torch.tensor([text[-1] for text in texts], device=hw.device())
        return made, rows, lens, roots

    return make


@pytest.mark.parametrize("width", [2, 5, 8])
@pytest.mark.parametrize("vocabulary", [2, 4, 30])
def test_drafts_of_a_ragged_batch_are_those_of_the_definition(lookup, width, vocabulary):
    rng = random.Random(width + vocabulary)
    sizes = [1, 2, 3, CONTEXT - 8, *(rng.randrange(2, 30) for _ in range(30))]
    texts = [[rng.randrange(vocabulary) for _ in range(size)] for size in sizes]
    made, rows, lens, roots = lookup(texts, width)
    tokens, parents = (t.tolist() for t in made.continuations(rows, lens, roots))
    for text, nodes, links in zip(texts, tokens, parents, strict=True):
        expected = continuation(text, width)
        assert nodes[: len(expected)] == expected
        assert links == [*range(-1, len(expected) - 1)] + [-1] * (width - len(expected))
        assert set(nodes[len(expected) :]) <= {text[-1]}, "padding holds a token of the model's"


def test_without_drafts_there_is_the_root_alone(lookup):
    made, rows, lens, roots = lookup([[3, 4, 3, 4], [5]], 1)
    tokens, parents = made.continuations(rows, lens, roots)
    assert tokens.tolist() == [[4], [5]]
    assert parents.tolist() == [[-1], [-1]]


def test_appending_writes_from_each_place_on_and_leaves_negative_tokens_out(lookup, hw):
    made, rows, _, _ = lookup([[1, 2, 3], [4, 5, 6]], 2)
    new = torch.tensor([[7, 8, -1], [9, -1, -1]], device=hw.device())
    made.append(rows, torch.tensor([3, 1], device=hw.device()), new)
    assert made._text[1, :5].tolist() == [1, 2, 3, 7, 8]
    assert made._text[2, :3].tolist() == [4, 9, 6]


def test_appending_beyond_the_end_is_dropped(lookup, hw):
    made, rows, _, _ = lookup([[1, 2, 3]], 2)
    new = torch.tensor([[7, 8, 9]], device=hw.device())
    made.append(rows, torch.tensor([CONTEXT - 1], device=hw.device()), new)
    assert made._text[1, CONTEXT - 2 : CONTEXT].tolist() == [1, 7]
