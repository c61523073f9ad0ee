"""What SGLang's relay gathered, a map resolves: bit for bit."""

import json
import pathlib

import numpy as np
import pytest
import torch

from hwcore.overlap import FutureMap, RelayPayload, RelaySpec

FOLDER = pathlib.Path(__file__).parent / "golden"
CASES = sorted(path.stem for path in FOLDER.glob("relay_*.npz"))
KEYS = (
    *("indices", "bonus_buf", "topk_p_buf", "topk_index_buf", "hidden_buf_bits"),
    *("bonus", "topk_p", "topk_index", "hidden_bits"),
)


def test_there_are_cases():
    assert len(CASES) == 8


@pytest.mark.parametrize("debug", [False, True], ids=["plain", "debug"])
@pytest.mark.parametrize("name", CASES)
def test_a_relay_gathers_what_it_gathered_there(hw, name, debug):
    with np.load(FOLDER / f"{name}.npz") as arrays:
        meta = json.loads(bytes(arrays["__meta__"]))
        case = {key: torch.from_numpy(arrays[key]).to(hw.device()) for key in arrays if key in KEYS}
    spec = RelaySpec(
        pool_size=meta["pool"],
        topk=meta["topk"],
        hidden_size=meta["hidden"] if meta["has_hidden"] else 0,
    )
    whole = torch.arange(1, meta["pool"], device=hw.device())
    hidden = case["hidden_buf_bits"].view(torch.bfloat16) if meta["has_hidden"] else None
    with FutureMap(spec, backend=hw, debug=debug) as relay:
        relay.stash(
            whole,
            RelayPayload(
                next_token=case["bonus_buf"][1:],
                topk_p=case["topk_p_buf"][1:],
                topk_index=case["topk_index_buf"][1:],
                hidden_states=None if hidden is None else hidden[1:],
            ),
        )
        got = relay.resolve(case["indices"])
        real = (case["indices"] != 0).cpu()  # there a row like any other, here the padding
        for field, wanted in (("next_token", "bonus"), ("topk_p",) * 2, ("topk_index",) * 2):
            assert torch.equal(getattr(got, field).cpu()[real], case[wanted].cpu()[real])
        if meta["has_hidden"]:
            bits = got.hidden_states.cpu().view(torch.int16)
            assert torch.equal(bits[real], case["hidden_bits"].cpu()[real])
        assert real.any()
