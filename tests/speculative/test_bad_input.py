import dataclasses
import random

import pytest
import torch

import hwcore
from hwcore import discovery, kernels
from hwcore.errors import ArgumentTypeError, ArgumentValueError
from hwcore.speculative import TreeMaskMode, VerifyResult, build_tree, commit, verify_greedy

TOKENS = [[5, 6, 7], [5, 6, 7]]
PARENTS = [[-1, 0, 1], [-1, 0, 0]]


def ints(rows, dtype=torch.int64):
    return torch.tensor(rows, dtype=dtype)


def build(**changed):
    arguments = {"draft_tokens": ints(TOKENS), "parents": ints(PARENTS), "seq_lens": ints([4, 0])}
    return build_tree(**(arguments | changed))


KINDS = [
    (
        {"draft_tokens": TOKENS},
        r"draft_tokens got \[\[5, 6, 7\].*\(list\); expected a tensor \[bs, N\]. Pass a torch",
    ),
    (
        {"draft_tokens": ints(TOKENS, torch.int32)},
        r"draft_tokens\.dtype got torch\.int32 .*expected torch\.int64\. Convert it with draft_t",
    ),
    (
        {"draft_tokens": ints(TOKENS[0])},
        r"draft_tokens\.dim\(\) got 1 .*expected 2 dimensions, \[bs, N\]\. Reshape",
    ),
    (
        {"parents": ints(PARENTS, torch.int32)},
        r"parents\.dtype got torch\.int32 .*expected torch\.int64\.",
    ),
    (
        {"parents": ints(PARENTS).unsqueeze(0)},
        r"parents\.dim\(\) got 3 .*expected 2 dimensions, \[bs, N\]",
    ),
    (
        {"parents": ints(PARENTS).to("meta")},
        r"parents\.device got .*meta.*expected cpu, where .*Move it with parents\.to\('cpu'\)",
    ),
    (
        {"seq_lens": ints([4, 0], torch.float32)},
        r"seq_lens\.dtype got torch\.float32 .*expected torch\.int64 or torch\.int32\. Convert",
    ),
    ({"seq_lens": ints([[4], [0]])}, r"seq_lens\.dim\(\) got 2 .*expected 1 dimensions, \[bs\]"),
    ({"seq_lens": ints([4, 0]).to("meta")}, r"seq_lens\.device got .*meta.*expected cpu"),
    ({"spec_steps": 2.0}, r"spec_steps got 2\.0 \(float\); expected an int\. Pass the greatest"),
    ({"spec_steps": True}, r"spec_steps got True \(bool\); expected an int\."),
    ({"seq_lens_sum": "4"}, r"seq_lens_sum got '4' \(str\); expected an int\. Pass sum\(seq_l"),
    ({"max_mask_bytes": 1e9}, r"max_mask_bytes got 1000000000.0 \(float\); expected an int\."),
    (
        {"tree_mask_mode": 0},
        r"tree_mask_mode got 0 \(int\); expected TreeMaskMode\.FULL, .*Pass a member of TreeMaskM",
    ),
]

VALUES = [
    (
        {"draft_tokens": torch.zeros(2, 0, dtype=torch.int64)},
        r"draft_tokens\.shape got \[2, 0\] .*N at least 1\. Give each request its root",
    ),
    (
        {"parents": ints([[-1, 0], [-1, 0]])},
        r"parents\.shape got \[2, 2\] .*expected \[bs=2, N=3\]\. Make the sizes agree",
    ),
    ({"seq_lens": ints([4])}, r"seq_lens\.shape got \[1\] .*expected \[bs=2\]\."),
    ({"spec_steps": -1}, r"spec_steps got -1 \(int\); expected at least 0\."),
    ({"seq_lens_sum": -4}, r"seq_lens_sum got -4 \(int\); expected at least 0\."),
    ({"max_mask_bytes": -1}, r"max_mask_bytes got -1 .*at least 0\. Pass a number of bytes"),
    ({"seq_lens_sum": 5}, r"seq_lens_sum got 5 .*expected 4, the sum of seq_lens\. Recompute it"),
    (
        {"draft_tokens": ints([[5, 6, 7], [5, -6, 7]])},
        r"draft_tokens\[1, 1\] got -6 .*expected at least 0\. Pass token ids",
    ),
    ({"seq_lens": ints([4, -1])}, r"seq_lens\[1\] got -1 .*expected at least 0\. Pass the tokens"),
    (
        {"parents": ints([[-1, 0, 1], [0, 0, 0]])},
        r"parents\[1, 0\] got 0 .*expected -1 in column 0\. Put the root in column 0",
    ),
    (
        {"parents": ints([[-1, 0, 1], [-2, 0, 0]])},
        r"parents\[1, 0\] got -2 .*expected -1 or a node index below 3\. Use indices within",
    ),
    (
        {"parents": ints([[-1, 0, 3], [-1, 0, 0]])},
        r"parents\[0, 2\] got 3 .*expected -1 or a node index below 3\.",
    ),
    (
        {"parents": ints([[-1, 2, 0], [-1, 0, 0]])},
        r"parents\[0, 1\] got 2 .*expected a node before its child\. Order the nodes",
    ),
    (
        {"parents": ints([[-1, 0, 2], [-1, 0, 0]])},
        r"parents\[0, 2\] got 2 .*expected a node before its child\.",
    ),
    (
        {"parents": ints([[-1, 0, 1], [-1, -1, 1]])},
        r"parents\[1, 2\] got 1 .*expected no padding node as parent\. Attach the node",
    ),
    (
        {"spec_steps": 1},
        r"depth of node\[0, 2\] got 2 .*at most 1 deep \(spec_steps\)\. Raise spec_steps",
    ),
]


@pytest.mark.parametrize(("changed", "message"), KINDS)
def test_build_tree_names_a_wrong_kind(changed, message):
    with pytest.raises(ArgumentTypeError, match=r"^build_tree: " + message):
        build(**changed)


@pytest.mark.parametrize(("changed", "message"), VALUES)
def test_build_tree_names_a_wrong_value(changed, message):
    with pytest.raises(ArgumentValueError, match=r"^build_tree: " + message):
        build(**changed)


@pytest.mark.parametrize(
    ("steps", "chain"), [(steps, chain) for chain in range(2, 20) for steps in range(chain - 1)]
)
def test_every_excess_of_depth_is_seen(steps, chain):
    parents = torch.arange(-1, chain - 1).unsqueeze(0)
    with pytest.raises(ArgumentValueError, match=rf"got {steps + 1} .*at most {steps} deep"):
        build_tree(parents + 1, parents, ints([0]), spec_steps=steps)


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        ([[1]], ArgumentTypeError, r"target got .*expected a tensor\. Pass the target's logits"),
        (
            ints([[1, 2, 3]] * 2, torch.int32),
            ArgumentTypeError,
            r"target\.dtype got torch\.int32 .*expected torch\.int64\. Convert it",
        ),
        (
            torch.zeros(2, 3),
            ArgumentTypeError,
            r"target\.dim\(\) got 2 .*3 dimensions, \[bs, N, vocab\]",
        ),
        (
            torch.zeros(2, 3, 9, dtype=torch.int64),
            ArgumentTypeError,
            r"target\.dim\(\) got 3 .*2 dimensions, \[bs, N\]",
        ),
        (
            torch.zeros(2, 4, 9),
            ArgumentValueError,
            r"target\.shape got \[2, 4, 9\] .*expected \[bs=2, N=3, vocab\]",
        ),
        (torch.zeros(2, 3, 0), ArgumentValueError, r"target\.shape got \[2, 3, 0\] .*vocab >= 1"),
        (
            torch.zeros(2, 3, 9, device="meta"),
            ArgumentTypeError,
            r"target\.device got .*meta.*expected cpu",
        ),
        (
            torch.zeros(2, 3, 6),
            ArgumentValueError,
            r"tree\.draft_tokens\[0, 1\] got 6 .*a token below 6, the vocabulary",
        ),
        (
            ints([[1, 2, 3], [1, -2, 3]]),
            ArgumentValueError,
            r"target\[1, 1\] got -2 .*a token in \[0, 2\^31\)",
        ),
        (ints([[1, 2, 2**31]] * 2), ArgumentValueError, r"target\[0, 2\] got 2147483648"),
    ],
)
def test_verify_greedy_names_what_is_wrong(target, error, message):
    with pytest.raises(error, match=r"^verify_greedy: " + message):
        verify_greedy(build(), target)


def test_what_other_functions_return_is_asked_for():
    tree = build()
    with pytest.raises(
        ArgumentTypeError, match=r"tree got None .*DraftTree\. Pass what build_tree"
    ):
        verify_greedy(None, ints(TOKENS))
    with pytest.raises(ArgumentTypeError, match=r"^commit: tree got None .*expected a DraftTree"):
        commit(None, None, None)
    with pytest.raises(ArgumentTypeError, match=r"result got None .*Pass what verify_greedy ret"):
        commit(tree, None, ints([4, 0]))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"seq_lens": [4, 0]}, ArgumentTypeError, r"seq_lens got \[4, 0\] \(list\)"),
        ({"seq_lens": ints([4, 0], torch.int16)}, ArgumentTypeError, r"seq_lens\.dtype got"),
        ({"seq_lens": ints([4])}, ArgumentValueError, r"seq_lens\.shape got \[1\]"),
        ({"seq_lens": ints([4, -1])}, ArgumentValueError, r"seq_lens\[1\] got -1"),
        ({"seq_lens": ints([4, 0]).to("meta")}, ArgumentTypeError, r"seq_lens\.device got"),
        ({"cache_locs": ints(TOKENS, torch.int32)}, ArgumentTypeError, r"cache_locs\.dtype got"),
        ({"cache_locs": ints([[1, 2]] * 2)}, ArgumentValueError, r"cache_locs\.shape got \[2, 2\]"),
        ({"cache_locs": -ints(TOKENS)}, ArgumentValueError, r"cache_locs\[0, 0\] got -5"),
        ({"cache_locs": ints(TOKENS).to("meta")}, ArgumentTypeError, r"cache_locs\.device got"),
    ],
)
def test_commit_names_what_is_wrong(changed, error, message):
    tree = build()
    result = verify_greedy(tree, ints(TOKENS))
    arguments = {"seq_lens": ints([4, 0]), "cache_locs": ints(TOKENS)} | changed
    with pytest.raises(error, match=r"^commit: " + message):
        commit(tree, result, **arguments)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"predict": ints([0] * 5, torch.int32)}, ArgumentValueError, r"result\.predict\.shape"),
        ({"predict": ints([0] * 6)}, ArgumentTypeError, r"result\.predict\.dtype got torch\.int64"),
        (
            {"accept_index": ints([[0, -1]] * 2, torch.int32)},
            ArgumentValueError,
            r"result\.accept_index\.shape got \[2, 2\] .*\[bs=2, spec_steps \+ 1=3\]",
        ),
        (
            {"accept_index": ints([[0, 6, -1], [3, -1, -1]], torch.int32)},
            ArgumentValueError,
            r"result\.accept_index\[0, 1\] got 6 .*Pass the result of verifying this very tree",
        ),
        (
            {"accept_index": ints([[0, -2, -1], [3, -1, -1]], torch.int32)},
            ArgumentValueError,
            r"result\.accept_index\[0, 1\] got -2",
        ),
        (
            {"accept_index": ints([[0, -1, -1], [-1, -1, -1]], torch.int32)},
            ArgumentValueError,
            r"result\.accept_index\[1, 0\] got -1 .*from its root",
        ),
        (
            {"accept_index": ints([[0, -1, 2], [3, -1, -1]], torch.int32)},
            ArgumentValueError,
            r"result\.accept_index\[0, 2\] got 2 .*a path of the request's own nodes",
        ),
        (
            {"accept_lens": ints([1, 2], torch.int32)},
            ArgumentValueError,
            r"result\.accept_lens\[1\] got 2 .*number of nodes in its row",
        ),
        ({"bonus_tokens": ints([1])}, ArgumentValueError, r"result\.bonus_tokens\.shape got \[1\]"),
    ],
)
def test_commit_checks_a_foreign_result(changed, error, message):
    fields = {
        "predict": ints([0] * 6, torch.int32),
        "accept_index": ints([[0, -1, -1], [3, -1, -1]], torch.int32),
        "accept_lens": ints([1, 1], torch.int32),
        "bonus_tokens": ints([0, 0]),
        "status": ints([0, 0], torch.int32),
    }
    with pytest.raises(error, match=r"^commit: " + message):
        commit(build(), VerifyResult(**(fields | changed)), ints([4, 0]))


@pytest.mark.parametrize("backend", ["cpu", 3])
def test_a_backend_is_no_name(backend):
    with pytest.raises(ArgumentTypeError, match=r"backend got .*a Backend\. Pass load_backend"):
        build(backend=backend)


def test_a_length_that_grows_past_its_dtype_is_named():
    tree = build()
    lens = ints([2**31 - 1, 0], torch.int32)
    with pytest.raises(ArgumentValueError, match=r"seq_lens\[0\] got 2147483647 .*Pass int64"):
        commit(tree, verify_greedy(tree, ints(TOKENS)), lens)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("retrieve_next_token", ints([-1] * 6).view(2, 3), r"one link to each node"),
        ("retrieve_next_token", ints([-1, -1]), r"retrieve_next_token\.dim\(\) got 1"),
        ("parents", None, r"parents got None"),
        ("positions", ints([1, 2]), r"positions\.shape got \[2\]"),
        ("spec_steps", -1, r"spec_steps got -1"),
    ],
)
def test_a_tree_that_was_changed_is_named_by_all_that_take_one(name, value, message):
    tree = build()
    changed = dataclasses.replace(tree, **{name: value})
    with pytest.raises((ArgumentTypeError, ArgumentValueError), match=message):
        verify_greedy(changed, ints(TOKENS))
    if "link" not in message:  # of which commit makes no use
        with pytest.raises((ArgumentTypeError, ArgumentValueError), match=message):
            commit(changed, verify_greedy(tree, ints(TOKENS)), ints([4, 0]))


def links_of(parents):
    """First child and next sibling of each node; None where parents are no tree's."""
    first, sibling, last = [-1] * len(parents), [-1] * len(parents), {}
    for node, parent in enumerate(parents):
        if not -1 <= parent < node:
            return None
        if parent >= 0:
            links, at = (sibling, last[parent]) if parent in last else (first, parent)
            links[at] = last[parent] = node
    return first, sibling


def test_links_are_taken_only_if_they_are_those_of_the_parents():
    rng, taken, refused = random.Random(0), 0, 0
    for _ in range(1000):
        n = rng.randint(2, 7)
        parents = [-1] + [rng.randint(-1, node - 1) for node in range(1, n)]
        tree = [parents, *links_of(parents)]
        for _ in range(rng.randint(0, 3)):
            rng.choice(tree)[rng.randrange(n)] = rng.choice([*range(-2, n + 2), 2**62])
        names = ("parents", "retrieve_next_token", "retrieve_next_sibling")
        changed = {name: ints([values]) for name, values in zip(names, tree, strict=True)}
        root = build_tree(ints([[1] * n]), ints([[-1] * n]), ints([3]), spec_steps=n)
        changed = dataclasses.replace(root, **changed)
        if links_of(tree[0]) == tuple(tree[1:]):
            taken += 1
            verify_greedy(changed, ints([[1] * n]))
            continue
        refused += 1
        with pytest.raises(ArgumentValueError, match="Pass what build_tree returned, unchanged"):
            verify_greedy(changed, ints([[1] * n]))
    assert taken > 200
    assert refused > 500


@pytest.mark.parametrize("name", ["parents", "retrieve_next_token", "retrieve_next_sibling"])
@pytest.mark.parametrize("inference", [False, True])
def test_a_tree_that_was_written_to_is_looked_at(name, inference, monkeypatch):
    monkeypatch.setenv("HWCORE_DEBUG", "0")
    with torch.inference_mode(inference):
        tree = build()
        getattr(tree, name)[0, 1] = 1
        with pytest.raises(ArgumentValueError, match="Pass what build_tree returned, unchanged"):
            verify_greedy(tree, ints(TOKENS))


def test_the_links_of_a_plugins_kernel_are_looked_at(monkeypatch):
    cpu = hwcore.load_backend("cpu")
    monkeypatch.setenv("HWCORE_DEBUG", "0")

    def wrong(parents, seq_lens, *rest):
        positions, mask, first, sibling = kernels.build_tree(parents, seq_lens, *rest)
        return positions, mask, first, sibling + 1

    class Wrong:
        @hwcore.hookimpl(wrapper=True)
        def kernels(self):
            return {**(yield), "build_tree": wrong}

    backend = hwcore.Backend(discovery.load(cpu.origin), cpu.origin)
    backend.register(Wrong())
    tree = build(backend=backend)
    with pytest.raises(ArgumentValueError, match="Pass what build_tree returned, unchanged"):
        verify_greedy(tree, ints(TOKENS), backend=backend)


@pytest.mark.parametrize("debug", ["0", "1"])
def test_a_tree_known_to_be_one_is_looked_at_while_debugging_alone(debug, monkeypatch):
    monkeypatch.setenv("HWCORE_DEBUG", debug)
    tree, looked = build(backend=hwcore.load_backend("cpu")), []
    monkeypatch.setattr("hwcore.speculative.verify._are_links", lambda *_: looked.append(1) or True)
    verify_greedy(tree, ints(TOKENS))
    assert len(looked) == int(debug)


@pytest.mark.parametrize(
    ("first", "sibling"),
    [
        (1, [-1, 3, 3, -1]),
        (5, [-1, 3, 3, -1, 5, -1]),
        (2**63 - 1, [-1, 2**63 - 1, 7, 5, 5, 6, 7, -1]),
    ],
    ids=["as many", "fewer of the same sum", "as many of the same sum, wrapped around"],
)
def test_links_that_leave_a_child_out_are_found(first, sibling):
    n = len(sibling)
    tree = build_tree(ints([[1] * n]), ints([[-1] + [0] * (n - 1)]), ints([3]), spec_steps=1)
    links = {"retrieve_next_token": ints([[first] + [-1] * (n - 1)])}
    changed = dataclasses.replace(tree, retrieve_next_sibling=ints([sibling]), **links)
    with pytest.raises(ArgumentValueError, match="Pass what build_tree returned, unchanged"):
        verify_greedy(changed, ints([[1] * n]))


def test_debug_extends_the_checks_to_devices(unread, monkeypatch):
    parents = torch.empty(1, 3, dtype=torch.int64, device=unread)
    lens = torch.empty(1, dtype=torch.int64, device=unread)
    build_tree(parents, parents, lens, tree_mask_mode=TreeMaskMode.QLEN_ONLY)
    monkeypatch.setenv("HWCORE_DEBUG", "1")
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        build_tree(parents, parents, lens, tree_mask_mode=TreeMaskMode.QLEN_ONLY)
