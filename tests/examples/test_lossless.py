"""Speculation at temperature 1 on the real model: what comes out is what plain sampling gives."""

from collections import Counter

import pytest
import torch

from examples.serving.llama import Llama
from examples.serving.model import Model
from examples.serving.prompts import as_chat
from examples.serving.step import Sampling, tree_step
from hwcore.testing.distributions import judge, power

# Distances that a sample finds with a chance of 99 %; a simulated device allows a small one.
SAMPLES = {"cpu": (500, 0.2), "sim": (120, 0.4)}
FIRSTS, SECONDS = 5, 3  # tokens that are told apart
FALSE_ALARM = 1e-6


@pytest.fixture(scope="module")
def real(hw):
    from examples.serving.weights import load

    config, weights, tokenizer = load(lambda stage: None)
    model = Model(Llama(config, weights, hw.device(), 128), 128)
    return model, tokenizer


def next_probs(model, text):
    model.length = 0
    with torch.inference_mode():
        logits, _ = model.forward(torch.tensor([text], device=model.device), last=True)
    return logits[0, -1].softmax(-1).cpu()


def guesses(model, text):
    """A tree of what is likely, and of what is not: probable drafts flatter a wrong sampler."""
    first = next_probs(model, text).topk(4).indices.tolist()
    tokens, parents = [text[-1]], [-1]
    for token in (first[1], first[3], first[0]):  # not in the order of their chances
        tokens.append(token)
        parents.append(0)
    for parent in (1, 3):
        for second in next_probs(model, [*text, tokens[parent]]).topk(2).indices.tolist():
            tokens.append(second)
            parents.append(parent)
    both = torch.tensor([[tokens], [parents]], device=model.device)
    return both[0], both[1]


@pytest.mark.model
@pytest.mark.slow
def test_two_tokens_are_distributed_as_the_model_says(hw, real):
    model, tokenizer = real
    text = tokenizer(as_chat("Name a colour.")).input_ids
    samples, distance = SAMPLES.get(hw.info.name, SAMPLES["cpu"])

    # The joint distribution of two tokens: the likely ones, and each time "another".
    first = next_probs(model, text)
    cells, seconds = {}, {}
    for token in first.topk(FIRSTS).indices.tolist():
        second = next_probs(model, [*text, token])
        seconds[token] = second.topk(SECONDS).indices.tolist()
        for follower in seconds[token]:
            cells[token, follower] = float(first[token] * second[follower])
        known = sum(cells[token, follower] for follower in seconds[token])
        cells[token, None] = float(first[token]) - known
    cells[None, None] = 1.0 - sum(cells.values())

    nodes, parents = guesses(model, text)
    again = torch.tensor([[0, 0, 0, 0]], device=model.device)
    chain = torch.tensor([[-1, 0, 0, 1]], device=model.device)
    counts, longest = Counter(), 0
    model.length = 0
    with torch.inference_mode():
        model.forward(torch.tensor([text], device=model.device), last=True)
        for seed in range(samples):
            model.length = len(text) - 1
            sampling = Sampling(1.0, seed)
            tokens = tree_step(model, nodes, parents, 2, sampling).tokens
            longest = max(longest, len(tokens))
            if len(tokens) < 2:  # the second from a tree of its own, of other drafts
                drafts = seconds.get(tokens[0], [1, 2, 3])
                again[0] = torch.tensor([tokens[0], *drafts], device=model.device)
                tokens += tree_step(model, again, chain, 2, sampling).tokens
            one, two = tokens[:2]
            if one not in seconds:
                one = two = None
            counts[one, two if one is not None and two in seconds[one] else None] += 1
    assert longest == 3, "no path was ever accepted whole: the test shows little"
    verdict = judge([counts[cell] for cell in cells], list(cells.values()), false_alarm=FALSE_ALARM)
    assert verdict.samples == samples
    assert power(samples, verdict.cells, distance, false_alarm=FALSE_ALARM) > 0.99
    assert verdict, str(verdict)
