"""Chain verification on Python's numbers, one request at a time, written from the definitions."""

import math


def probability(q):
    """What a draft's number counts as: no probability is no mass."""
    return q if 0 < q <= 1 else 0.0


def draw(weights, coin):
    """First index whose cumulated weight exceeds ``coin`` of the total, among those with any."""
    total = math.fsum(weights)
    reached, last = 0.0, None
    for index, weight in enumerate(weights):
        if weight > 0:
            reached, last = reached + weight, index
            if reached > coin * total:
                break
    return last


def residual(p, q, scale=1.0):
    """What the target has beyond the draft; all of it where rounding alone made it stop."""
    left = [max(scale * ours - probability(theirs), 0.0) for ours, theirs in zip(p, q, strict=True)]
    return left if any(left) else p


def walk(tokens, p, q, coins):
    """How many of ``tokens`` token verification accepts: Leviathan et al. 2023."""
    for step, token in enumerate(tokens):
        theirs = probability(q[step][token])
        if not (theirs > 0 and coins[step] * theirs < p[step][token]):
            return step, 1.0
    return len(tokens), 1.0


def block_walk(tokens, p, q, coins):
    """How many block verification accepts, and the joint ratio there: Sun et al. 2024."""
    ratio, accepted, ratio_there = 1.0, 0, 1.0
    for step, token in enumerate(tokens):
        theirs = probability(q[step][token])
        ratio = min(ratio * p[step][token] / theirs, 1.0) if theirs else 0.0
        chance = ratio
        if step + 1 < len(tokens):
            after = zip(p[step + 1], q[step + 1], strict=True)
            left = math.fsum(max(ratio * a - probability(b), 0.0) for a, b in after)
            chance = left / (left + 1 - ratio) if left + 1 - ratio > 0 else 1.0
        if coins[step] < chance:
            accepted, ratio_there = step + 1, ratio
    return accepted, ratio_there


def verify(candidates, p, q, coins, final_coin, block=False):
    """Accepted drafts and the target's own token.

    ``candidates`` [S] root first; ``p`` [S][V] after each of them; ``q`` [S-1][V] of each draft.
    """
    drafts = candidates[1:]
    accepted, scale = (block_walk if block else walk)(drafts, p, q, coins)
    weights = p[accepted]
    if accepted < len(drafts):
        weights = residual(weights, q[accepted], scale)
    return accepted, draw(weights, final_coin)
