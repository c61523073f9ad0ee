import dataclasses
import math

import pytest
import torch

from hwcore.errors import ArgumentTypeError, ArgumentValueError
from hwcore.speculative import (
    SamplingParams,
    TreeMaskMode,
    build_tree,
    verify_greedy,
    verify_sampling,
)

TOKENS = torch.tensor([[5, 6, 7], [5, 6, 7]])
PARENTS = torch.tensor([[-1, 0, 1], [-1, 0, 0]])
COINS, FINAL, SEEDS = torch.full((2, 3), 0.5), torch.full((2,), 0.5), torch.tensor([1, 2])
KIND, VALUE = ArgumentTypeError, ArgumentValueError


def tree():
    lens = torch.tensor([4, 0])
    return build_tree(TOKENS.clone(), PARENTS.clone(), lens, tree_mask_mode=TreeMaskMode.QLEN_ONLY)


def verify(**changed):
    arguments = {
        "tree": tree(),
        "logits": torch.zeros(2, 3, 9),
        "params": SamplingParams.of([1.0, 0.0]),
        "coins": COINS,
        "final_coins": FINAL,
    }
    return verify_sampling(**(arguments | changed))


def with_coin(value):
    coins = COINS.clone()
    coins[1, 2] = value
    return {"coins": coins}


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"tree": None}, KIND, r"tree got None .*DraftTree\. Pass what build_tree"),
        ({"logits": [1]}, KIND, r"logits got \[1\] \(list\); expected a tensor \[bs, N, vocab\]"),
        ({"logits": torch.zeros(2, 3)}, KIND, r"logits\.dim\(\) got 2 "),
        ({"logits": torch.zeros(2, 3, 9).long()}, KIND, r"logits\.dtype got torch\.int64"),
        ({"logits": torch.zeros(2, 4, 9)}, VALUE, r"logits\.shape got \[2, 4, 9\]"),
        ({"logits": torch.zeros(2, 3, 0)}, VALUE, r"logits\.shape got \[2, 3, 0\] .*vocab >= 1"),
        ({"logits": torch.zeros(2, 3, 9, device="meta")}, KIND, r"logits\.device got .*meta"),
        (
            {"logits": torch.zeros(2, 3, 7)},
            VALUE,
            r"tree\.draft_tokens\[0, 2\] got 7 .*a token below 7, the vocabulary of logits\. Draft",
        ),
        ({"params": {}}, KIND, r"params got {} .*Pass what SamplingParams\.of returned"),
        ({"params": SamplingParams.of([1.0])}, VALUE, r"params\.temperatures\.shape got \[1\]"),
        ({"seeds": SEEDS}, VALUE, r"source of coins got \['seeds', 'coins', 'final_coins'\]"),
        (
            {"final_coins": None},
            VALUE,
            r"source of coins got \['coins'\] .*either seeds, or coins and final_coins\. Pass seed",
        ),
        ({"coins": None, "final_coins": None}, VALUE, r"source of coins got \[\]"),
        ({"coins": COINS.double()}, KIND, r"coins\.dtype got torch\.float64"),
        ({"coins": COINS[:, :2]}, VALUE, r"coins\.shape got \[2, 2\]"),
        ({"final_coins": FINAL.unsqueeze(1)}, KIND, r"final_coins\.dim\(\) got 2"),
        (with_coin(1.0), VALUE, r"coins\[1, 2\] got 1\.0 .*a number in \[0, 1\)\. Draw them"),
        (with_coin(-0.1), VALUE, r"coins\[1, 2\] got -0\.1"),
        (with_coin(math.nan), VALUE, r"coins\[1, 2\] got nan"),
        ({"final_coins": FINAL * 2}, VALUE, r"final_coins\[0\] got 1\.0"),
        (
            {"coins": None, "final_coins": None, "seeds": SEEDS.int()},
            KIND,
            r"seeds\.dtype got torch\.int32",
        ),
        (
            {"coins": None, "final_coins": None, "seeds": SEEDS[:1]},
            VALUE,
            r"seeds\.shape got \[1\] .*\[bs=2\]",
        ),
        ({"threshold_single": "1"}, KIND, r"threshold_single got '1' \(str\); expected a number"),
        ({"threshold_acc": True}, KIND, r"threshold_acc got True \(bool\)"),
        ({"threshold_acc": 1.5}, VALUE, r"threshold_acc got 1\.5 .*a number in \[0, 1\]\. Pass 1"),
        ({"threshold_single": math.nan}, VALUE, r"threshold_single got nan"),
    ],
)
def test_verify_sampling_names_what_is_wrong(changed, error, message):
    with pytest.raises(error, match=r"^verify_sampling: (the )?" + message):
        verify(**changed)


def params(**changed):
    return SamplingParams(**({"temperatures": torch.tensor([1.0, 0.5])} | changed))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (params(temperatures=[1.0, 1.0]), KIND, r"temperatures got \[1\.0, 1\.0\] \(list\)"),
        (params(temperatures=torch.ones(2).double()), KIND, r"temperatures\.dtype got"),
        (params(temperatures=torch.tensor([1.0, -1.0])), VALUE, r"temperatures\[1\] got -1\.0"),
        (params(temperatures=torch.tensor([1.0, math.nan])), VALUE, r"temperatures\[1\] got nan"),
        (params(temperatures=torch.tensor([math.inf, 1.0])), VALUE, r"temperatures\[0\] got inf"),
        (params(top_ks=torch.tensor([1, 0])), VALUE, r"top_ks\[1\] got 0 .*>= 1, or -1 for all"),
        (params(top_ks=torch.tensor([-2, 1])), VALUE, r"top_ks\[0\] got -2"),
        (params(top_ks=torch.tensor([1, 1]).int()), KIND, r"top_ks\.dtype got torch\.int32"),
        (params(top_ps=torch.tensor([0.0, 1.0])), VALUE, r"top_ps\[0\] got 0\.0 .*in \(0, 1\]"),
        (params(top_ps=torch.tensor([1.0, 1.1])), VALUE, r"top_ps\[1\] got 1\.1"),
        (params(min_ps=torch.tensor([1.0, 1.1])), VALUE, r"min_ps\[1\] got 1\.1"),
        (params(min_ps=torch.tensor([-0.1, 1.0])), VALUE, r"min_ps\[0\] got -0\.1"),
        (
            params(any_greedy=False, temperatures=torch.tensor([1.0, 0.0])),
            VALUE,
            r"temperatures\[1\] got 0",
        ),
        (params(all_greedy=True), VALUE, r"temperatures\[0\] got 1\.0 .*Let SamplingParams\.of"),
    ],
)
def test_parameters_given_as_tensors_are_checked(given, error, message):
    with pytest.raises(error, match=r"^verify_sampling: params\." + message):
        verify(params=given)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (([1.0, -0.1],), VALUE, r"temperatures\[1\] got -0\.1.* a finite number >= 0\. Pass 0 for"),
        (([1.0, math.nan],), VALUE, r"temperatures\[1\] got nan"),
        (([1e39, 1.0],), VALUE, r"temperatures\[0\] got inf"),
        (([1.0, None],), KIND, r"temperatures\[1\] got None"),
        (([1.0, "1"],), KIND, r"temperatures\[1\] got '1' \(str\)"),
        (([1.0, True],), KIND, r"temperatures\[1\] got True \(bool\)"),
        (
            (torch.ones(2),),
            KIND,
            r"temperatures got tensor.*expected a list of numbers\. Pass a li",
        ),
        ((1.0,), KIND, r"temperatures got 1\.0"),
        (([1.0, 1.0], [1]), VALUE, r"len\(top_ks\) got 1 .*expected 2\. Pass one for each request"),
        (([1.0, 1.0], [1, 0]), VALUE, r"top_ks\[1\] got 0 .*an integer >= 1, or -1 for all\. Pass"),
        (([1.0, 1.0], [1, -3]), VALUE, r"top_ks\[1\] got -3"),
        (([1.0, 1.0], [1, 2.0]), KIND, r"top_ks\[1\] got 2\.0 \(float\)"),
        (([1.0, 1.0], None, [0.5, 0.0]), VALUE, r"top_ps\[1\] got 0\.0 .*a number in \(0, 1\]"),
        (([1.0, 1.0], None, [0.5, 1.01]), VALUE, r"top_ps\[1\] got 1\.0"),
        (([1.0, 1.0], None, None, [2, 0]), VALUE, r"min_ps\[0\] got 2\.0 .*a number in \[0, 1\]"),
    ],
)
def test_parameters_given_as_numbers_are_named_with_their_request(given, error, message):
    with pytest.raises(error, match=r"^SamplingParams\.of: " + message):
        SamplingParams.of(*given)


def test_what_nobody_uses_is_dropped():
    all_ = SamplingParams.of([1.0, 0.0], [-1, 5], [None, 0.5], [0.0, 0.5])
    assert (all_.top_ks, all_.top_ps, all_.min_ps) == (None, None, None)  # the greedy one's
    assert (all_.any_greedy, all_.all_greedy) == (True, False)
    some = SamplingParams.of([1.0, 0.7], [None, 10**30], [1, 0.5], [0, 0.5])
    assert some.top_ks.tolist() == [-1, 2**62]
    assert some.top_ps.tolist() == [1.0, 0.5]
    assert some.min_ps.tolist() == [0.0, 0.5]
    assert (some.any_greedy, some.all_greedy) == (False, False)
    assert SamplingParams.of([0.0, 0]).all_greedy
    assert SamplingParams.of([]).temperatures.shape == (0,)


@pytest.mark.parametrize(
    ("field", "place", "value", "message"),
    [
        ("parents", (0, 1), 2, r"parents\[0, 1\] got 2 .*-1 or a node before it, of 3"),  # cycle
        ("parents", (0, 0), 1, r"parents\[0, 0\] got 1"),
        ("parents", (1, 2), 3, r"parents\[1, 2\] got 3"),  # the next request's
        ("parents", (1, 2), -2, r"parents\[1, 2\] got -2"),
        ("retrieve_next_token", (0, 1), 0, r"retrieve_next_token\[0, 1\] got 0 .*a node after it"),
        ("retrieve_next_token", (0, 1), 1, r"retrieve_next_token\[0, 1\] got 1"),
        ("retrieve_next_token", (1, 0), 3, r"retrieve_next_token\[1, 0\] got 3"),
        (
            "retrieve_next_token",
            (0, 0),
            2,
            r"retrieve_next_token\[0, 0\] got 2 .*a child of its node",
        ),
        ("retrieve_next_sibling", (0, 1), 2, r"retrieve_next_sibling\[0, 1\] got 2 .*same parent"),
        ("retrieve_next_sibling", (1, 2), 1, r"retrieve_next_sibling\[1, 2\] got 1"),
        ("retrieve_next_sibling", (1, 1), -7, r"retrieve_next_sibling\[1, 1\] got -7"),
    ],
)
def test_links_that_are_no_trees_are_named(field, place, value, message):
    links = getattr(tree(), field).clone()
    links[place] = value
    broken = dataclasses.replace(tree(), **{field: links})
    with pytest.raises(VALUE, match=r"^verify_sampling: tree\." + message):
        verify(tree=broken)
    with pytest.raises(VALUE, match=r"^verify_greedy: tree\." + message):
        verify_greedy(broken, torch.zeros(2, 3, 9))


def test_debug_extends_the_checks_to_devices(unread, monkeypatch):
    def moved(tensor):
        return tensor.to(unread)

    names = [field.name for field in dataclasses.fields(tree())]
    fields = {name: getattr(tree(), name) for name in names}
    there = {k: moved(v) if isinstance(v, torch.Tensor) else v for k, v in fields.items()}
    arguments = {
        "tree": dataclasses.replace(tree(), **there),
        "logits": moved(torch.zeros(2, 3, 9)),
        "params": SamplingParams.of([1.0, 0.5], device=unread),
        "coins": moved(COINS),
        "final_coins": moved(FINAL),
    }
    verify_sampling(**arguments)
    monkeypatch.setenv("HWCORE_DEBUG", "1")
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        verify_sampling(**arguments)


def test_a_token_beyond_the_vocabulary_is_never_accepted_unchecked(device, monkeypatch):
    """Where nobody looks, on a device, it is passed over like a node that is not there."""
    monkeypatch.setattr("hwcore._checks.may_read", lambda _: False)
    for module in ("verify", "sampling", "sampling_params"):
        monkeypatch.setattr(f"hwcore.speculative.{module}.may_read", lambda _: False)
    monkeypatch.setattr("hwcore.kernels.sampler.reads_are_free", lambda _: False)
    monkeypatch.setattr("hwcore.kernels.verify.reads_are_free", lambda _: False)
    odd = dataclasses.replace(tree(), draft_tokens=torch.tensor([[5, 900, 7], [5, -3, 7]]))
    there = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in ((f.name, getattr(odd, f.name)) for f in dataclasses.fields(odd))
    }
    logits = torch.full((2, 3, 9), -20.0)
    logits[:, :, 8] = 20.0  # where clamping would lead
    got = verify_sampling(
        dataclasses.replace(odd, **there),
        logits.to(device),
        SamplingParams.of([1.0, 1.0], device=device),
        coins=COINS.to(device),
        final_coins=FINAL.to(device),
    )
    assert got.accept_lens.tolist() == [1, 1]
    assert got.bonus_tokens.tolist() == [8, 8]
