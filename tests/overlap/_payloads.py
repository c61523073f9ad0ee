"""Payloads whose every number tells request and field, and what a map should give back."""

import torch

from hwcore.overlap import RelayPayload


def payload(spec, numbers, device):
    """Return a payload that holds for each request its number, spread over the fields."""
    base = torch.tensor(numbers, dtype=torch.int64)
    fields = {"next_token": base}
    if spec.topk:
        fields["topk_index"] = base.unsqueeze(1) * 100 + torch.arange(spec.topk)
        fields["topk_p"] = fields["topk_index"].to(spec.probs_dtype) / 8
    if spec.hidden_size:
        hidden = base.unsqueeze(1) + torch.arange(spec.hidden_size) / 4
        fields["hidden_states"] = hidden.to(spec.hidden_dtype)
    if spec.draft_probs:
        steps, vocabulary = spec.draft_probs
        places = torch.arange(steps * vocabulary).view(steps, vocabulary)
        fields["draft_probs"] = (base.view(-1, 1, 1) + places / 8).to(spec.probs_dtype)
    return RelayPayload(**{name: value.to(device) for name, value in fields.items()})


def values(payload):
    """Return a payload's contents as plain lists, by field."""
    found = {name: getattr(payload, name) for name in RelayPayload.__slots__}
    return {k: v.cpu().float().tolist() for k, v in found.items() if v is not None}


def expected(spec, numbers):
    """Return what `values` gives for requests that hold these numbers; 0 at padding."""
    whole = values(payload(spec, [number or 0 for number in numbers], "cpu"))
    for place, number in enumerate(numbers):
        if number is None:
            for name, value in whole.items():
                value[place] = torch.zeros(torch.tensor(whole[name][place]).shape).tolist()
    return whole
