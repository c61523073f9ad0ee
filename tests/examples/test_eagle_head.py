"""The head in its pool against the head as it is trained, and what is written of it."""

import json

import pytest
import torch
from safetensors.torch import load_file

from examples.eagle_head import layout, network, rows
from examples.eagle_head.head import EagleHead
from examples.eagle_head.layout import Shape
from examples.serving.eagle import HeadRunner

SHAPE = Shape(
    hidden=24,
    heads=6,
    kv_heads=2,
    width=4,
    inner=32,
    vocab=90,
    draft_vocab=40,
    theta=1e4,
    epsilon=1e-5,
)
STEPS = 4


@pytest.fixture(name="weights")
def _weights():
    torch.manual_seed(1)
    found = {name: torch.randn(size) / size[1] ** 0.5 for name, size in SHAPE.matrices().items()}
    found |= {name: 1 + 0.2 * torch.randn(SHAPE.hidden) for name in SHAPE.norms()}
    return found | {"lm_head.weight": torch.randn(SHAPE.draft_vocab, SHAPE.hidden)}


@pytest.fixture(name="draft_ids")
def _draft_ids():
    return torch.randperm(SHAPE.vocab)[: SHAPE.draft_vocab].sort().values


@pytest.fixture(name="embedding")
def _embedding():
    return torch.randn(SHAPE.vocab, SHAPE.hidden)


@pytest.fixture(name="head")
def _head(weights, draft_ids, embedding):
    return EagleHead(SHAPE, weights, draft_ids, embedding, max_context=64)


def unrolled(weights, embedding, tokens, features, steps=STEPS):
    """Logits of each step at each position of one text; ``tokens`` are the text's, from 0 on."""
    length = features.shape[1]
    cos, sin = rows.angles(SHAPE, torch.arange(length).unsqueeze(0), steps)
    mask = torch.zeros(length, length).masked_fill(~torch.ones(length, length).tril().bool(), -1e30)
    text = network.Text(
        embedding[tokens[:, 1 : 1 + length + steps]],
        features,
        mask.view(1, 1, 1, length, length),
        cos,
        sin,
    )
    found = network.unroll(SHAPE, weights, text, steps)
    return [network.normed(SHAPE, weights, one) @ weights["lm_head.weight"].T for one in found]


def test_drafting_in_the_pool_is_what_was_trained(head, weights, embedding):
    length = 9
    tokens = torch.randint(SHAPE.vocab, (1, length + STEPS + 1))
    features = torch.randn(1, length, 3 * SHAPE.hidden)
    expected = unrolled(weights, embedding, tokens, features)

    for end in (3, length):  # drafts from the middle of the text, and from its end
        kv, slots = head.new_kv(30), (torch.randperm(29) + 1).unsqueeze(0)
        fused = head.fuse(features[:, :end])
        lens = torch.tensor([0])
        logits, feature = head.forward(kv, tokens[:, 1 : end + 1], fused, lens, slots, last=True)
        torch.testing.assert_close(logits[:, 0], expected[0][:, end - 1])
        for step in range(1, STEPS):
            token = tokens[:, end + step : end + step + 1]
            lens = torch.tensor([end + step - 1])
            logits, feature = head.forward(kv, token, feature, lens, slots)
            torch.testing.assert_close(logits[:, 0], expected[step][:, end - 1])


def test_a_tree_in_the_pool_is_each_of_its_paths(head):
    #       0         1     entries of the first draft step
    #     2   3       4     of the second
    ancestors = [[], [], [0], [0], [1]]
    text = torch.randint(SHAPE.vocab, (1, 5))
    nodes = torch.randint(SHAPE.vocab, (1, 5))
    features = torch.randn(1, 5, SHAPE.hidden)
    of_nodes = torch.randn(1, 5, SHAPE.hidden)
    slots = torch.arange(1, 20).unsqueeze(0)
    kv = head.new_kv(20)
    head.forward(kv, text, features, torch.tensor([0]), slots)
    mask = torch.zeros(1, 5, 5, dtype=torch.bool)
    for node, above in enumerate(ancestors):
        mask[0, node, [*above, node]] = True
    first, _ = head.forward(
        kv,
        nodes[:, :2],
        of_nodes[:, :2],
        torch.tensor([5]),
        slots,
        positions=torch.tensor([[5, 5]]),
        tree_mask=mask[:, :2, :2],
    )
    second, _ = head.forward(
        kv,
        nodes[:, 2:],
        of_nodes[:, 2:],
        torch.tensor([7]),
        slots,
        positions=torch.tensor([[6, 6, 6]]),
        tree_mask=mask[:, 2:],
    )
    found = torch.cat((first, second), dim=1)

    for node, above in enumerate(ancestors):
        path = [*above, node]
        dense, _ = head.forward(
            head.new_kv(20),
            torch.cat((text, nodes[:, path]), dim=1),
            torch.cat((features, of_nodes[:, path]), dim=1),
            torch.tensor([0]),
            slots,
        )
        torch.testing.assert_close(found[:, node], dense[:, -1])


def test_ragged_requests_do_not_see_each_other(head):
    tokens = torch.randint(SHAPE.vocab, (2, 6))
    features = torch.randn(2, 6, SHAPE.hidden)
    counts = torch.tensor([6, 3])
    slots = torch.zeros(2, 6, dtype=torch.int64)
    slots[0], slots[1, :3] = torch.arange(1, 7), torch.arange(7, 10)
    both, _ = head.forward(
        head.new_kv(10), tokens, features, torch.zeros(2).long(), slots, counts=counts, last=True
    )

    alone, _ = head.forward(
        head.new_kv(10), tokens[1:, :3], features[1:, :3], torch.tensor([0]), slots[1:], last=True
    )
    torch.testing.assert_close(both[1], alone[0])


def test_what_is_exported_has_the_names_and_sizes_that_sglang_loads(tmp_path, weights, draft_ids):
    layout.save(tmp_path, SHAPE, weights, draft_ids)
    stored = load_file(tmp_path / "head.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())

    sizes = {name: tuple(weight.shape) for name, weight in stored.items()}
    assert sizes == {
        "fc.weight": (24, 72),
        "midlayer.self_attn.q_proj.weight": (24, 48),
        "midlayer.self_attn.k_proj.weight": (8, 48),
        "midlayer.self_attn.v_proj.weight": (8, 48),
        "midlayer.self_attn.o_proj.weight": (24, 24),
        "midlayer.mlp.gate_proj.weight": (32, 24),
        "midlayer.mlp.up_proj.weight": (32, 24),
        "midlayer.mlp.down_proj.weight": (24, 32),
        "midlayer.input_layernorm.weight": (24,),
        "midlayer.hidden_norm.weight": (24,),
        "midlayer.post_attention_layernorm.weight": (24,),
        "norm.weight": (24,),
        "lm_head.weight": (40, 24),
        "d2t": (40,),
        "t2d": (90,),
    }
    assert stored["d2t"].dtype == torch.int64
    assert (stored["d2t"] + torch.arange(40)).equal(draft_ids)
    assert stored["t2d"].nonzero().flatten().equal(draft_ids)
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert config["draft_vocab_size"] == 40
    assert config["tie_word_embeddings"] is False
    assert config["eagle_config"] == {
        "eagle_aux_hidden_state_layer_ids": [1, 14, 26],
        "use_aux_hidden_state": True,
    }


def test_what_is_exported_loads_as_the_same_head(tmp_path, weights, draft_ids, embedding, head):
    layout.save(tmp_path, SHAPE, weights, draft_ids)
    loaded = EagleHead.load(tmp_path, embedding, max_context=64)
    asked = (
        torch.randint(SHAPE.vocab, (1, 4)),
        torch.randn(1, 4, SHAPE.hidden),
        torch.tensor([0]),
        torch.arange(1, 5).unsqueeze(0),
    )

    assert loaded.shape == head.shape
    assert loaded.draft_ids.equal(head.draft_ids)
    torch.testing.assert_close(
        loaded.forward(loaded.new_kv(5), *asked),
        head.forward(head.new_kv(5), *asked),
        atol=0.05,
        rtol=0.05,
    )


@pytest.fixture(name="text")
def _text():
    return torch.randint(SHAPE.vocab, (1, 5)), torch.randn(1, 5, 3 * SHAPE.hidden)


def drafted(head, text, topk, size):
    """Tokens and parents that are drafted after a text whose root is token 7, on the library."""
    tokens, features = text
    drafter = HeadRunner(head, 60, topk, spec_steps=4)
    slots = torch.arange(1, 60).unsqueeze(0)
    seed = drafter.extend(tokens, features, torch.tensor([0]), slots, torch.tensor([5]))
    nodes, parents, _ = drafter.draft(seed, torch.tensor([7]), torch.tensor([5]), slots, size)
    return nodes[0].tolist(), parents[0].tolist()


def follow(head, text, path):
    """Log probabilities of what follows a path of drafts, each run after the one before."""
    tokens, features = text
    kv, slots = head.new_kv(20), torch.arange(1, 20).unsqueeze(0)
    logits, feature = head.forward(
        kv, tokens, head.fuse(features), torch.tensor([0]), slots, last=True
    )
    for step, token in enumerate(path):
        lens = torch.tensor([5 + step])
        logits, feature = head.forward(kv, torch.tensor([[token]]), feature, lens, slots)
    return logits[0, -1].log_softmax(-1)


def test_a_tree_is_the_likeliest_paths_of_a_beam(hw, weights, draft_ids, embedding, text):
    # Flat enough that paths of several parents stay in the beam, and change their order there; and
    # nearly all candidates are kept, so that the last steps' are too.
    flat = weights | {"lm_head.weight": weights["lm_head.weight"] * 0.1}
    flat["midlayer.self_attn.o_proj.weight"] = weights["midlayer.self_attn.o_proj.weight"] * 8
    head = EagleHead(SHAPE, flat, draft_ids, embedding, max_context=64)
    scored, beam, origins = {}, {(): 0.0}, []
    for _ in range(4):
        grown = {}
        for path, score in beam.items():
            scores, chosen = follow(head, text, path).topk(3)
            tokens = head.draft_ids[chosen].tolist()
            for token, more in zip(tokens, scores.tolist(), strict=True):
                grown[(*path, token)] = score + more
        scored |= grown
        before = list(beam)
        beam = dict(sorted(grown.items(), key=lambda one: -one[1])[:3])
        origins.append([before.index(path[:-1]) for path in beam])
    # What the head is run on once more: neither the first beam, nor the last.
    assert any(origin != sorted(origin) for origin in origins[1:-1])
    expected = sorted(scored, key=lambda path: -scored[path])[:26]

    tokens, parents = drafted(head, text, topk=3, size=27)
    paths = [()]
    for token, parent in zip(tokens[1:], parents[1:], strict=True):
        paths.append((*paths[parent], token))

    assert tokens[0] == 7
    assert sorted(paths[1:]) == sorted(expected)


def test_a_chain_is_the_likeliest_token_after_the_likeliest(hw, head, text):
    expected = []
    for _ in range(4):
        expected.append(int(head.draft_ids[follow(head, text, expected).argmax()]))

    assert drafted(head, text, topk=1, size=5) == ([7, *expected], [-1, 0, 1, 2, 3])


def test_drafting_leaves_no_trace_in_the_text(hw, head, text):
    tokens, features = text
    drafter, slots = HeadRunner(head, 60, 4, spec_steps=4), torch.arange(1, 60).unsqueeze(0)
    lens, root = torch.tensor([5]), torch.tensor([7])
    seed = drafter.extend(tokens, features, torch.tensor([0]), slots, lens)
    before = drafter.draft(seed, root, lens, slots, 5)
    drafter.draft(seed, root, lens, slots, 16)
    again = drafter.draft(seed, root, lens, slots, 5)

    assert all(torch.equal(one, other) for one, other in zip(before, again, strict=True))
