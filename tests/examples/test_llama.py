"""Our own forward against transformers': prefill, decode and tree steps, ragged and padded."""

import copy

import pytest
import torch
import transformers

from examples.serving.llama import Llama
from hwcore.speculative import TreeMaskMode, build_tree

#            0
#        1       2       5 is padding
#      3   4
PARENTS = [-1, 0, 0, 1, 1, -1]
PATHS = [[0, 2], [0, 1, 3], [0, 1, 4]]


TOLERANCE = 1e-4


def reference(network, text):
    """transformers' logits on the same device: what its kernels round is no difference of ours."""
    with torch.inference_mode():
        return network(torch.tensor([text], device=network.device)).logits[0].cpu()


def slots_for(llama, lengths, context):
    """Scattered slots for requests of these lengths, and slot 0 beyond each request's end."""
    order = torch.randperm(sum(lengths), generator=torch.Generator().manual_seed(5)) + 1
    table = torch.zeros(len(lengths), context, dtype=torch.int64)
    for row, part in enumerate(order.split(lengths)):
        table[row, : len(part)] = part
    return table.to(llama.device), llama.new_kv(1 + sum(lengths))


def check_all_kinds_of_step(llama, network, texts):
    """Prefill ragged texts in two chunks, decode a token, verify a tree; compare all logits."""
    device = llama.device

    def ints(values):
        return torch.tensor(values, device=device)

    def close(ours, theirs):
        torch.testing.assert_close(ours.cpu(), theirs, atol=TOLERANCE, rtol=0)

    expected = [reference(network, text) for text in texts]
    room = [len(text) + 1 + len(PARENTS) for text in texts]
    slots, kv = slots_for(llama, room, context=max(room) + 3)
    cuts = [len(text) // 3 for text in texts]
    chunks = [[text[:cut], text[cut:-1]] for text, cut in zip(texts, cuts, strict=True)]
    lens = [0] * len(texts)
    with torch.inference_mode():
        for part in range(2):
            rows = [chunk[part] for chunk in chunks]
            width = max(map(len, rows)) + 2  # all of them padded
            padded = ints([row + [1] * (width - len(row)) for row in rows])
            counts = ints([len(row) for row in rows])
            logits = llama.forward(kv, padded, ints(lens), slots, counts)
            for i, row in enumerate(rows):
                close(logits[i, : len(row)], expected[i][lens[i] : lens[i] + len(row)])
            lens = [length + len(row) for length, row in zip(lens, rows, strict=True)]
        last = ints([text[-1:] for text in texts])
        logits = llama.forward(kv, last, ints(lens), slots)
        for i, theirs in enumerate(expected):
            close(logits[i, 0], theirs[-1])

        seq_lens = ints([length + 1 for length in lens])
        nodes = [[(text[0] + 3 * node) % 17 for node in range(len(PARENTS))] for text in texts]
        tree = build_tree(
            ints(nodes),
            ints([PARENTS] * len(texts)),
            seq_lens,
            spec_steps=2,
            tree_mask_mode=TreeMaskMode.QLEN_ONLY,
        )
        positions = tree.positions.view_as(tree.draft_tokens)
        logits = llama.forward(
            kv, tree.draft_tokens, seq_lens, slots, positions=positions, tree_mask=tree.tree_mask
        )
        for i, text in enumerate(texts):
            for path in PATHS:
                theirs = reference(network, text + [nodes[i][node] for node in path])
                close(logits[i, path], theirs[len(text) :])


def test_small_weights_give_transformers_logits(llama, network):
    texts = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8], [2, 7, 1, 8], list(range(18))]
    check_all_kinds_of_step(llama, network, texts)


def test_the_last_real_token_is_the_one_asked_for(llama, network):
    text, padding = [3, 1, 4, 1, 5], [0, 0, 0]
    slots, kv = slots_for(llama, [5], context=8)
    count = torch.tensor([5], device=llama.device)
    with torch.inference_mode():
        tokens = torch.tensor([text + padding], device=llama.device)
        logits = llama.forward(kv, tokens, count - 5, slots, count, last=True)
    assert logits.shape[1] == 1
    torch.testing.assert_close(
        logits[0].cpu(), reference(network, text)[-1:], atol=TOLERANCE, rtol=0
    )


def test_padding_tokens_write_to_slot_0_only(llama):
    slots, kv = slots_for(llama, [8], context=8)
    with torch.inference_mode():
        tokens = torch.tensor([[3, 1, 4, 1]], device=llama.device)
        lens, count = (torch.tensor([n], device=llama.device) for n in (6, 1))
        llama.forward(kv, tokens, lens, slots, count)
    written = kv.abs().sum((0, 2, 3, 4)).nonzero().flatten().tolist()
    assert written == sorted([0, int(slots[0, 6])])


def test_positions_that_are_scaled_are_refused(hw, network):
    config = copy.deepcopy(network.config)
    config.rope_parameters["rope_type"] = "llama3"
    with pytest.raises(ValueError, match=r"rope_type is `llama3`; expected `default`"):
        Llama(config, network.state_dict(), hw.device(), 64)


@pytest.mark.model
@pytest.mark.slow
def test_the_real_model_gives_transformers_logits(hw):
    from examples.serving.prompts import PROMPTS, as_chat
    from examples.serving.weights import load

    config, weights, tokenizer = load(lambda _: None)
    network = transformers.LlamaForCausalLM(config).eval()
    network.load_state_dict(weights)
    network.to(hw.device())
    llama = Llama(config, weights, hw.device(), max_context=512)
    texts = [tokenizer(as_chat(prompt.text)).input_ids for prompt in PROMPTS]
    check_all_kinds_of_step(llama, network, texts[1::2])
