"""Sampling written from the definitions on Python numbers, with wrong variants to tell apart."""

import math

import torch

from ._reference import children

MUTANTS = (
    "accepts at the bound",  # <= for <
    "keeps what was rejected",  # residual not subtracted
    "argmax",  # temperature ignored
    "reuses the coin",  # the accept coin draws the last token as well
    "counts repeats twice",  # duplicate siblings
    "falls through to the last token",  # of the vocabulary, at rounding
    "siblings backwards",
    "bonus from the next row",  # stride
)


def distribution(logits, temperature, top_k=-1, top_p=1.0, min_p=0.0):
    """Probabilities of one row; thresholds keep ties. None where the row has no distribution."""
    logits = [float(x) for x in logits]
    if any(math.isnan(x) or x == math.inf for x in logits) or max(logits) == -math.inf:
        return None
    highest = max(logits)
    if temperature == 0:
        return [float(token == logits.index(highest)) for token in range(len(logits))]
    scaled = [(x - highest) / temperature for x in logits]
    masses = [math.exp(x) for x in scaled]
    order = sorted(range(len(logits)), key=lambda token: -scaled[token])
    least = -math.inf
    if 1 <= top_k < len(logits):
        least = scaled[order[top_k - 1]]
    if top_p < 1:
        kept = [mass if x >= least else 0.0 for x, mass in zip(scaled, masses, strict=True)]
        reached = 0.0
        for token in order:
            reached += kept[token]
            if reached >= top_p * sum(kept):
                least = max(least, scaled[token])
                break
    if min_p > 0:
        least = max(least, math.log(min_p))
    masses = [mass if x >= least else 0.0 for x, mass in zip(scaled, masses, strict=True)]
    return [mass / sum(masses) for mass in masses]


def draw(weights, coin, last=-1):
    """The first token beyond the coin, and how close the coin came to another."""
    aim, reached, found, margin = coin * sum(weights), 0.0, None, math.inf
    for token, weight in enumerate(weights):
        reached += weight
        margin = min(margin, abs(reached - aim)) if weight > 0 else margin
        if found is None and weight > 0 and reached > aim:
            found = token
    if found is None:
        positive = [token for token, weight in enumerate(weights) if weight > 0]
        found = positive[-1] if positive and last < 0 else len(weights) - 1
    return found, margin


def walk(
    tokens, parents, rows, steps, coins, final, single=1.0, acc=1.0, mutant=None, next_rows=None
):
    """Path, tokens after each of its nodes, status, and the least distance from a decision.

    ``rows(node)`` gives the distribution at a node, ``final(node)`` the coin that draws there.
    """
    path, said, margin = [0], [], math.inf
    while True:
        node = path[-1]
        probs = rows(node)
        if probs is None:
            return path, said, 1, margin
        weights, reached, offered, accepted = list(probs), 0.0, set(), None
        family = children(parents, node) if len(path) <= steps else []
        if mutant == "siblings backwards":
            family = family[::-1]
        for child in family:
            token = tokens[child]
            if token in offered and mutant != "counts repeats twice":
                continue
            offered.add(token)
            reached += probs[token]
            bound, coin = reached / max(acc, 1e-9), coins[node]
            if probs[token] > 0:
                margin = min(margin, abs(bound - coin))
                if single < 1:
                    margin = min(margin, abs(probs[token] - single))
            below = coin <= bound if mutant == "accepts at the bound" else coin < bound
            positive = probs[token] > 0 or mutant == "accepts at the bound"
            if positive and (below or probs[token] >= single):
                accepted = child
                break
            if mutant != "keeps what was rejected":
                weights[token] = 0.0
        if mutant == "argmax":
            best = probs.index(max(probs))
            accepted = next((child for child in family if tokens[child] == best), None)
            weights = [float(token == best) for token in range(len(probs))]
        if accepted is not None:
            said.append(tokens[accepted])
            path.append(accepted)
            continue
        if mutant == "bonus from the next row" and next_rows is not None:
            weights = next_rows(node)
        coin = coins[node] if mutant == "reuses the coin" else final(node)
        if mutant == "falls through to the last token":
            coin = 1.0 if coin > 0.98 else coin
            token, close = draw(weights, coin, last=len(weights) - 1)
        elif sum(weights) <= 0:
            token, close = [tokens[c] for c in family if probs[tokens[c]] > 0][-1], math.inf
        else:
            token, close = draw(weights, coin)
        return path, [*said, token], 0, min(margin, close)


def seeded(seed):
    return torch.Generator().manual_seed(seed)
