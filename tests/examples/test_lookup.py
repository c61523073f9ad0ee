import random

from examples.serving.lookup import Lookup


def edges(draft):
    """The tree as the set of its paths from the root, each a tuple of tokens."""
    paths = {}
    for node, parent in enumerate(draft.parents):
        paths[node] = () if parent < 0 else (*paths[parent], draft.tokens[node])
    return set(paths.values()), paths


def test_nothing_to_draft_from():
    draft = Lookup([1, 2, 3]).draft(8)
    assert (draft.tokens, draft.parents, draft.agreement) == ([3], [-1], 0)


def test_a_repetition_becomes_a_chain():
    draft = Lookup([5, 6, 7, 8, 9, 5, 6]).draft(4)
    assert draft.tokens == [6, 7, 8, 9]
    assert draft.parents == [-1, 0, 1, 2]
    assert draft.depths == [0, 1, 2, 3]
    assert draft.agreement == 2


def test_matches_that_differ_become_branches_and_share_their_beginning():
    #  1 2 followed by 3 4, by 3 5 and by 6
    draft = Lookup([1, 2, 3, 4, 0, 1, 2, 3, 5, 0, 1, 2, 6, 7, 1, 2]).draft(32)
    found, _ = edges(draft)
    assert {(3,), (3, 4), (3, 5), (6,)} <= found
    assert len(draft) == len(set(found))


def test_the_longest_match_comes_first_and_the_latest_of_equals():
    # 9 was followed by 4 after "8 9" (long ago) and by 5 after "7 9" (lately): 8 9 now.
    draft = Lookup([8, 9, 4, 7, 9, 5, 8, 9]).draft(3)
    assert draft.tokens[1] == 4
    draft = Lookup([9, 4, 9, 5, 3, 9]).draft(3)
    assert draft.tokens[1] == 5
    assert draft.agreement == 1


def test_the_end_of_the_text_drafts_nothing_beyond_itself():
    draft = Lookup([4, 4]).draft(8)
    assert (draft.tokens, draft.parents) == ([4, 4], [-1, 0])


def test_every_budget_gives_the_beginning_of_the_larger_tree():
    rng = random.Random(3)
    for _ in range(40):
        lookup = Lookup([rng.randrange(5) for _ in range(60)])
        whole = lookup.draft(24)
        assert len(whole) == 24
        for size in range(1, 24):
            part = lookup.draft(size)
            assert part.tokens == whole.tokens[:size]
            assert part.parents == whole.parents[:size]
        assert all(parent < node for node, parent in enumerate(whole.parents))
        assert len(edges(whole)[0]) == len(whole), "a path occurs twice"
        for node, chance in enumerate(whole.chances):
            family = [whole.chances[n] for n, parent in enumerate(whole.parents) if parent == node]
            assert sum(family) < chance, "siblings share what their parent has"
        likelier = zip(whole.chances, whole.chances[1:], strict=False)
        assert all(before >= after for before, after in likelier)


def test_every_path_did_follow_the_end_of_the_text_somewhere():
    rng = random.Random(4)
    for _ in range(40):
        text = [rng.randrange(4) for _ in range(50)]
        found, _ = edges(Lookup(text).draft(20))
        joined = [tuple(text[i : i + 20]) for i in range(len(text))]
        for path in found:
            sought = (text[-1], *path)
            assert any(window[: len(sought)] == sought for window in joined)


def test_extending_is_the_same_as_starting_over():
    rng = random.Random(5)
    text = [rng.randrange(6) for _ in range(80)]
    grown = Lookup(text[:30])
    grown.extend(text[30:31])
    grown.extend(text[31:])
    assert grown.draft(16) == Lookup(text).draft(16)


def test_path_of_what_followed():
    draft = Lookup([1, 2, 3, 4, 0, 1, 2, 3, 5, 0, 1, 2]).draft(16)
    _, paths = edges(draft)
    nodes, ended = draft.path([3, 4, 9])
    assert [paths[node] for node in nodes] == [(3,), (3, 4)]
    assert ended
    assert draft.path([3]) == (nodes[:1], False)
    assert draft.path([]) == ([], False)
    assert draft.path([9]) == ([], True)
    assert Lookup([1]).draft(4).path([]) == ([], True)
