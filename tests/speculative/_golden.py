"""Reading the golden cases, and deriving parent pointers from what they hold instead."""

import json
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent / "golden"
# The relay's cases hold what follows a relay as well.
FOLDERS = {"relay": HERE.parents[1] / "overlap" / "golden"}


def folder(kind):
    return FOLDERS.get(kind, HERE)


def names(kind):
    found = sorted(path.stem for path in folder(kind).glob(f"{kind}_*.npz"))
    assert found, f"no golden case of kind {kind} in {folder(kind)}"
    return found


def load(name, device):
    with np.load(folder(name.split("_")[0]) / f"{name}.npz") as arrays:
        meta = json.loads(bytes(arrays["__meta__"]))
        case = {
            key: torch.from_numpy(arrays[key]).to(device) for key in arrays if key != "__meta__"
        }
    return meta, case


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
