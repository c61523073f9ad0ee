"""A kernel for ``verify_tree_sampling`` written apart from the reference, to be spoilt in tests.

It takes the softmax of every row and then goes from sibling to sibling, as kernels do.
"""

from __future__ import annotations

import functools

import torch

from hwcore.kernels.distribution import draw, probabilities


def sampling_kernel(**fault):
    """Return a kernel with one thing changed in it; see ``_verify`` for what can be."""
    return functools.partial(_verify, fault=fault)


def _verify(
    draft_tokens,
    parents,
    next_token,
    next_sibling,
    logits,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    coins,
    final_coins,
    threshold_single,
    threshold_acc,
    spec_steps,
    any_greedy=True,
    *,
    fault,
):
    (bs, n), vocab = draft_tokens.shape, logits.shape[2]
    device = logits.device
    request = torch.arange(bs, device=device)
    columns = [None if c is None else c.repeat_interleave(n) for c in (top_ks, top_ps, min_ps)]
    heat = temperatures.repeat_interleave(n)
    probs, valid = probabilities(logits.reshape(bs * n, vocab), heat, *columns)
    probs = torch.where(valid.unsqueeze(1), probs, 0.0).view(bs, n, vocab)
    valid = valid.view(bs, n)
    if fault.get("argmax"):
        token = torch.arange(vocab, device=device)
        probs = (token == probs.argmax(2, keepdim=True)).to(torch.float32)

    below = fault.get("accepts", torch.lt)
    node = torch.zeros(bs, dtype=torch.int64, device=device)
    walks = torch.ones(bs, dtype=torch.bool, device=device)
    path, predict = [node], torch.zeros(bs, n, dtype=torch.int32, device=device)
    rejected = torch.zeros(bs, vocab, device=device)
    order = range(n - 1, 0, -1) if fault.get("siblings_reversed") else range(1, n)
    for _ in range(spec_steps):
        rejected = torch.where(walks.unsqueeze(1), 0.0, rejected)
        offered = torch.zeros(bs, vocab, dtype=torch.int32, device=device)
        acc, chosen = torch.zeros(bs, device=device), torch.full_like(node, -1)
        coin = _at(coins, node)
        for child in order:
            token = draft_tokens[:, child]
            is_child = walks & (chosen < 0) & (parents[:, child] == node)
            if not fault.get("duplicates_count"):
                is_child &= _at(offered, token) == 0
            mass = _at(probs.view(bs, n * vocab), node * vocab + token)
            acc = torch.where(is_child, acc + mass, acc)
            accepts = below(coin, acc / max(threshold_acc, 1e-9)) | (mass >= threshold_single)
            if not fault.get("massless_too"):
                accepts &= mass > 0
            chosen = torch.where(is_child & accepts, child, chosen)
            offered.scatter_add_(1, token.unsqueeze(1), is_child.int().unsqueeze(1))
            gone = torch.where(is_child & ~accepts, mass, 0.0)
            rejected.scatter_add_(1, token.unsqueeze(1), gone.unsqueeze(1))
        goes_on = chosen >= 0
        taken = torch.where(goes_on, _at(draft_tokens, chosen.clamp(min=0)), 0)
        predict.scatter_add_(1, node.unsqueeze(1), taken.int().unsqueeze(1))
        node = torch.where(goes_on, chosen, node)
        path.append(torch.where(goes_on, node, -1))
        walks = goes_on

    row = probs[request, node]
    left = torch.where(walks.unsqueeze(1), row, (row - rejected).clamp(min=0))
    if fault.get("residual_kept"):
        left = row
    final = _at(coins if fault.get("coin_reused") else final_coins, node)
    drawn = _falls_through(left, final) if fault.get("falls_through") else draw(left, final)
    # Rounding has rejected all there is: the last child that has some.
    child = (parents == node.unsqueeze(1)) & (row.gather(1, draft_tokens) > 0)
    last = torch.where(child, torch.arange(n, device=device), 0).amax(1)
    if not fault.get("falls_through"):
        drawn = torch.where(left.sum(1) > 0, drawn, _at(draft_tokens, last))
    good = _at(valid.int(), node) > 0
    drawn = torch.where(good, drawn, vocab - 1)
    predict.scatter_add_(1, node.unsqueeze(1), drawn.int().unsqueeze(1))
    index = torch.stack(path, 1)
    index = torch.where(index >= 0, index + n * request.unsqueeze(1), -1).int()
    bonus = drawn
    if fault.get("bonus_stride"):  # of accept_index, where predict has another
        wrong = request * (spec_steps + 1) + node
        bonus = predict.view(-1)[wrong.clamp(max=bs * n - 1)].to(torch.int64)
    lens = (index >= 0).sum(1, dtype=torch.int32)
    return predict.view(-1), index, lens, bonus, (~good).int()


def _at(values, column):
    return values.gather(1, column.unsqueeze(1)).squeeze(1)


def _falls_through(weights, coins):
    """Draw by running sums, and take the last token of all where none is beyond the aim."""
    beyond = weights.cumsum(1) > (coins * weights.sum(1)).unsqueeze(1)
    token = torch.arange(weights.shape[1], device=weights.device)
    return torch.where(beyond, token, weights.shape[1] - 1).amin(1)
