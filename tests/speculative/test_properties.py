import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hwcore.speculative import TreeMaskMode, build_tree, commit, verify_greedy

from ._reference import ancestors, cases, children, depth, walk

# The device fixture is the same for every example of one test.
each = settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def matrix(rows, case, device):
    return torch.tensor(rows, dtype=torch.int64).view(case.batch, case.nodes).to(device)


def built(case, device, mode=TreeMaskMode.FULL, lens_dtype=torch.int64):
    return build_tree(
        matrix(case.tokens, case, device),
        matrix(case.parents, case, device),
        torch.tensor(case.lens, dtype=lens_dtype).to(device),
        spec_steps=case.steps,
        tree_mask_mode=mode,
        seq_lens_sum=sum(case.lens),
    )


@each
@given(case=cases())
def test_tree_against_the_definitions(case, device):
    tree = built(case, device)
    positions, full, first, sibling, square = [], [], [], [], []
    for parents, length in zip(case.parents, case.lens, strict=True):
        for node in range(case.nodes):
            positions.append(length + depth(parents, node))
            seen = ancestors(parents, node)
            row = [other in seen for other in range(case.nodes)]
            square.append(row)
            full += [True] * length + row
            first.append(next(iter(children(parents, node)), -1))
            family = children(parents, parents[node]) if parents[node] >= 0 else []
            sibling.append(next((other for other in family if other > node), -1))
    assert tree.positions.tolist() == positions
    assert tree.tree_mask.tolist() == full
    assert tree.retrieve_index.flatten().tolist() == list(range(case.batch * case.nodes))
    assert tree.retrieve_next_token.flatten().tolist() == first
    assert tree.retrieve_next_sibling.flatten().tolist() == sibling

    qlen = built(case, device, TreeMaskMode.QLEN_ONLY, torch.int32)
    assert qlen.positions.dtype == torch.int64
    assert qlen.positions.tolist() == positions
    assert qlen.tree_mask.reshape(-1, case.nodes).tolist() == square
    packed = built(case, device, TreeMaskMode.BITPACKED).tree_mask.cpu().numpy()
    bits = np.unpackbits(packed, axis=-1, count=case.nodes, bitorder="little")
    assert bits.reshape(-1, case.nodes).astype(bool).tolist() == square


@each
@given(case=cases())
def test_verify_and_commit_against_the_walk(case, device):
    tree = built(case, device)
    target = matrix(case.target, case, device)
    locs = 1000 + 7 * torch.arange(case.batch * case.nodes, device=device).flip(0)
    locs = locs.view(case.batch, case.nodes)
    lens = torch.tensor(case.lens, dtype=torch.int64).to(device)
    before = [t.clone() for t in (tree.draft_tokens, tree.parents, target, locs, lens)]
    result = verify_greedy(tree, target)
    done = commit(tree, result, lens, locs)

    width = case.steps + 1
    predict = [0] * (case.batch * case.nodes)
    slots = locs.tolist()
    for b in range(case.batch):
        path = walk(case.tokens[b], case.parents[b], case.target[b], case.steps)
        pad = [-1] * (width - len(path))
        said = [case.target[b][node] for node in path]
        for node, token in zip(path, said, strict=True):
            predict[b * case.nodes + node] = token
        assert result.accept_index[b].tolist() == [b * case.nodes + n for n in path] + pad
        assert done.accept_lens[b].item() == len(path)
        assert result.num_correct_drafts[b].item() == len(path) - 1
        assert done.bonus_tokens[b].item() == said[-1]
        assert done.accept_tokens[b].tolist() == said + pad
        assert done.new_seq_lens[b].item() == case.lens[b] + len(path)
        own = [slots[b][0]] * len(pad)
        assert done.kv_src[b].tolist() == [slots[b][n] for n in path] + own
        assert done.kv_dst[b].tolist() == slots[b][: len(path)] + own
    assert result.predict.tolist() == predict
    after = (tree.draft_tokens, tree.parents, target, locs, lens)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@each
@given(case=cases(min_batch=1))
def test_logits_and_tokens_agree(case, device):
    tree = built(case, device)
    target = matrix(case.target, case, device)
    logits = torch.rand(case.batch, case.nodes, 41, device=device)
    logits.scatter_(2, target.unsqueeze(2), 2.0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        lazy, full = verify_greedy(tree, logits.to(dtype)), verify_greedy(tree, target)
        for field in ("predict", "accept_index", "accept_lens", "bonus_tokens"):
            got, want = getattr(lazy, field), getattr(full, field)
            assert got.dtype == want.dtype
            assert torch.equal(got, want), field


@each
@given(case=cases(min_batch=2))
def test_nan_stays_in_its_request(case, device):
    tree = built(case, device)
    logits = torch.rand(case.batch, case.nodes, 41, device=device)
    logits.scatter_(2, matrix(case.target, case, device).unsqueeze(2), 2.0)
    clean = verify_greedy(tree, logits)
    for poison in (float("nan"), float("-inf")):
        logits[0] = poison
        dirty = verify_greedy(tree, logits)
        assert 0 <= dirty.bonus_tokens[0].item() < 41
        for field in ("accept_index", "accept_lens", "bonus_tokens"):
            assert torch.equal(getattr(dirty, field)[1:], getattr(clean, field)[1:]), field
        assert torch.equal(dirty.predict[case.nodes :], clean.predict[case.nodes :])


@each
@given(case=cases())
def test_moves_bring_the_path_to_the_front(case, device):
    tree = built(case, device)
    result = verify_greedy(tree, matrix(case.target, case, device))
    size = case.batch * case.nodes
    locs = torch.randperm(size).view(case.batch, case.nodes).to(device)
    lens = torch.tensor(case.lens, dtype=torch.int64).to(device)
    done = commit(tree, result, lens, locs)

    cache = torch.arange(size, device=device) * 10
    at_once, in_turn = cache.clone(), cache.clone()
    at_once[done.kv_dst.flatten()] = cache[done.kv_src.flatten()]
    for column in range(case.steps + 1):
        in_turn[done.kv_dst[:, column]] = in_turn[done.kv_src[:, column]]
    assert torch.equal(at_once, in_turn)
    for b in range(case.batch):
        path = walk(case.tokens[b], case.parents[b], case.target[b], case.steps)
        assert at_once[locs[b, : len(path)]].tolist() == cache[locs[b, path]].tolist()


@each
@given(case=cases(), page_size=st.sampled_from([1, 2, 3, 8]))
def test_freed_slots_are_whole_pages_that_nobody_uses(case, page_size, device):
    """Slots of a tree from its request's length on, in pages that are each request's own."""
    tree = built(case, device)
    result = verify_greedy(tree, matrix(case.target, case, device))
    lens = torch.tensor(case.lens, dtype=torch.int64)
    entry = lens.unsqueeze(1) + torch.arange(case.nodes)
    request = torch.arange(case.batch).unsqueeze(1)
    pages = 100 * request + 60 - entry // page_size  # in no order of the entries
    locs = pages * page_size + entry % page_size
    done = commit(tree, result, lens.to(device), locs.to(device), page_size=page_size)
    for b, keep in enumerate(done.keep_lens.tolist()):
        path = walk(case.tokens[b], case.parents[b], case.target[b], case.steps)
        assert len(path) <= keep <= case.nodes
        used = {int(page) for page in pages[b, :keep]}
        freed = {int(page) for page in pages[b, keep:]}
        assert not used & freed
        # As few as that allows: the last that stays shares its page with the path's end.
        assert keep == len(path) or pages[b, keep - 1] == pages[b, len(path) - 1]
