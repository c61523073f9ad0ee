"""Reading the golden cases, and deriving parent pointers from what they hold instead."""

import json
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).parent / "golden"


def names(kind):
    found = sorted(path.stem for path in FOLDER.glob(f"{kind}_*.npz"))
    assert found, f"no golden case of kind {kind} in {FOLDER}"
    return found


def load(name, device):
    with np.load(FOLDER / f"{name}.npz") as arrays:
        meta = json.loads(bytes(arrays["__meta__"]))
        case = {
            key: torch.from_numpy(arrays[key]).to(device) for key in arrays if key != "__meta__"
        }
    return meta, case


def parents_of_selection(parent_list, selected_index, topk):
    """Parents from the draft steps' bookkeeping.

    Candidate ``c`` was proposed by entry ``c // topk`` of ``parent_list``: entry 0 is the root, any
    other names the candidate that proposed it.
    """
    rows = []
    for listed, chosen in zip(parent_list.tolist(), selected_index.tolist(), strict=True):
        row = [-1]
        for candidate in chosen:
            block = candidate // topk
            row.append(0 if block == 0 else chosen.index(listed[block]) + 1)
        rows.append(row)
    width = selected_index.shape[1] + 1
    return torch.tensor(rows, dtype=torch.int64).view(-1, width).to(selected_index.device)


def parents_of_links(next_token, next_sibling):
    rows = []
    for children, siblings in zip(next_token.tolist(), next_sibling.tolist(), strict=True):
        row = [-1] * len(children)
        for node, child in enumerate(children):
            while child != -1:
                row[child] = node
                child = siblings[child]
        rows.append(row)
    return torch.tensor(rows, dtype=torch.int64).view(next_token.shape).to(next_token.device)
