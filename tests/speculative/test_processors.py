import pytest
import torch

from hwcore.errors import ArgumentTypeError, ArgumentValueError, CaptureError
from hwcore.graphs.tape import Tape
from hwcore.speculative import (
    HostLogitProcessor,
    SamplingParams,
    TreeMaskMode,
    build_tree,
    verify_sampling,
)

from ._sampling import seeded

VOCAB, STEPS = 12, 4
PROMPTS = [[3, 3, 5], [1], [7, 2]]
PENALTY = 1.7
ALLOWED = (torch.arange(VOCAB).unsqueeze(0) - torch.arange(VOCAB).unsqueeze(1)).remainder(3) != 1


def language_model():
    """Logits of the next token, from the last token alone."""
    return torch.randn(VOCAB, VOCAB, generator=seeded(3)) * 2


def penalised(logits, seen):
    """The repetition penalty, from counts of tokens ``[k, VOCAB]``."""
    weaker = torch.where(logits > 0, logits / PENALTY, logits * PENALTY)
    return torch.where(seen > 0, weaker, logits)


def on_device(device):
    """A penalty and a grammar that forbids some successors, on the device."""
    prompt = torch.stack([torch.bincount(torch.tensor(p), minlength=VOCAB) for p in PROMPTS])
    prompt, allowed = prompt.to(device), ALLOWED.to(device)

    def process(rows):
        path = rows.path_tokens
        there = (path >= 0).to(torch.int64)
        seen = prompt.index_select(0, rows.requests)
        seen = seen.scatter_add(1, path.clamp(min=0), there)
        last = path.gather(1, there.sum(1, keepdim=True) - 1).squeeze(1)
        logits = penalised(rows.logits, seen)
        return torch.where(allowed.index_select(0, last), logits, float("-inf"))

    return process


def on_host():
    def process(logits, requests, paths):
        for row, request, path in zip(logits, requests, paths, strict=True):
            seen = torch.bincount(torch.tensor(PROMPTS[request] + path), minlength=VOCAB)
            row[:] = penalised(row, seen)
            row[~ALLOWED[path[-1]]] = float("-inf")
        return logits

    return HostLogitProcessor(process, "grammar")


def drafted(device):
    """Every request's tree: chains and siblings of any tokens."""
    generator = seeded(4)
    parents = torch.tensor([[-1, 0, 0, 1, 1, 3, 5]]).repeat(len(PROMPTS), 1)
    tokens = torch.randint(0, VOCAB, parents.shape, generator=generator)
    lens = torch.tensor([len(p) for p in PROMPTS])
    return tokens.to(device), parents.to(device), lens.to(device)


def decode_plainly(device, seeds, heat, count):
    """Token by token: trees of one node, with what has been said so far as a longer prompt."""
    model = language_model()
    said = [[0] for _ in PROMPTS]  # the root, which the step before has said
    for done in range(count):
        process = on_host_after(said)
        tokens = torch.tensor([[row[-1]] for row in said]).to(device)
        lens = torch.tensor([len(p) for p in PROMPTS]) + done
        tree = build_tree(
            tokens,
            torch.full_like(tokens, -1),
            lens.to(device),
            tree_mask_mode=TreeMaskMode.QLEN_ONLY,
        )
        logits = model[tokens.cpu()].to(device)
        params = SamplingParams.of(heat, device=device)
        got = verify_sampling(tree, logits, params, seeds=seeds.to(device), processor=process)
        for row, token in zip(said, got.bonus_tokens.tolist(), strict=True):
            row.append(token)
    return said


def on_host_after(said):
    inner = on_host()

    def process(logits, requests, paths):
        longer = [said[request][:-1] + path for request, path in zip(requests, paths, strict=True)]
        return inner._function(logits, requests, longer)

    return HostLogitProcessor(process)


def decode_greedily(request, count):
    """Argmax, with nothing of the library."""
    model, said = language_model(), [0]
    for _ in range(count):
        logits = model[said[-1]]
        seen = torch.bincount(torch.tensor(PROMPTS[request] + said), minlength=VOCAB)
        logits = penalised(logits, seen)
        said.append(int(torch.where(ALLOWED[said[-1]], logits, float("-inf")).argmax()))
    return said


def tree_of_good_drafts(device, said):
    """The continuation as a chain, and wrong tokens beside it."""
    chain = torch.tensor([row[: STEPS + 1] for row in said])
    beside = (chain[:, 1:] + 1) % VOCAB
    tokens = torch.stack([beside, chain[:, 1:]], dim=2).flatten(1)  # the wrong ones first
    parents = [-1] + [p for step in range(STEPS) for p in [max(0, 2 * step)] * 2]
    tokens = torch.cat([chain[:, :1], tokens], dim=1).to(device)
    parents = torch.tensor([parents]).repeat(len(said), 1).to(device)
    lens = torch.tensor([len(p) for p in PROMPTS]).to(device)
    tree = build_tree(tokens, parents, lens, tree_mask_mode=TreeMaskMode.QLEN_ONLY)
    return tree, language_model()[tokens.cpu()].to(device)


@pytest.mark.parametrize("kind", [on_device, lambda _: on_host()])
def test_greedy_with_a_penalty_and_a_grammar_is_plain_decoding(kind, device):
    said = [decode_greedily(request, STEPS + 1) for request in range(len(PROMPTS))]
    tree, logits = tree_of_good_drafts(device, said)
    params = SamplingParams.of([0.0] * len(PROMPTS), device=device)
    seeds = torch.zeros(len(PROMPTS), dtype=torch.int64, device=device)
    got = verify_sampling(tree, logits, params, seeds=seeds, processor=kind(device))
    assert got.accept_lens.tolist() == [STEPS + 1] * len(PROMPTS)
    predict = got.predict.view(len(PROMPTS), -1)
    for request, row in enumerate(said):
        path = got.accept_index[request] - request * predict.shape[1]
        assert predict[request][path[: STEPS + 1].long()].tolist() == row[1:]


def test_sampling_with_a_penalty_and_a_grammar_has_the_processed_distribution(device):
    """The first token's frequencies in speculation and in plain decoding, over many seeds."""
    runs, counts = 4000, {}
    model, request = language_model(), 0
    seen = torch.bincount(torch.tensor([*PROMPTS[request], 0]), minlength=VOCAB)
    logits = torch.where(ALLOWED[0], penalised(model[0], seen), float("-inf"))
    want = logits.softmax(-1)
    best = want.topk(2).indices.tolist()
    tokens = torch.tensor([[0, *best]]).repeat(runs, 1).to(device)
    parents = torch.tensor([[-1, 0, 0]]).repeat(runs, 1).to(device)
    lens = torch.full((runs,), len(PROMPTS[0])).to(device)
    tree = build_tree(tokens, parents, lens, tree_mask_mode=TreeMaskMode.QLEN_ONLY)
    process = on_device(device)

    def as_request_0(rows):
        rows = type(rows)(rows.logits, torch.zeros_like(rows.requests), rows.path_tokens)
        return process(rows)

    got = verify_sampling(
        tree,
        model[tokens.cpu()].to(device),
        SamplingParams.of([1.0] * runs, device=device),
        seeds=torch.arange(runs).to(device),
        processor=as_request_0,
    )
    first = got.predict.view(runs, 3)[:, 0].cpu()
    counts = torch.bincount(first.long(), minlength=VOCAB)
    assert not counts[want == 0].any()
    expected = want[want > 0] * runs
    chi2 = ((counts[want > 0] - expected) ** 2 / expected).sum().item()
    assert chi2 < 40  # 11 degrees of freedom at most: false alarm 4e-5


def test_the_way_to_each_row_is_told(device):
    tokens, parents, lens = drafted(device)
    tree = build_tree(tokens, parents, lens, tree_mask_mode=TreeMaskMode.QLEN_ONLY)
    logits = torch.zeros(*tokens.shape, VOCAB, device=device)
    logits.scatter_(2, tokens[:, [1, 3, 0, 5, 0, 6, 0]].unsqueeze(2), 99.0)
    seen = []

    def look(rows):
        assert rows.logits.dtype == torch.float32
        assert rows.logits.shape == (len(rows.requests), VOCAB)
        for request, path in zip(rows.requests.tolist(), rows.path_tokens.tolist(), strict=True):
            seen.append((request, [token for token in path if token >= 0]))
        return rows.logits.fill_(0).index_fill_(1, tokens[0, :1], 1)  # its own copy

    before = logits.clone()
    params = SamplingParams.of([0.0] * 3, device=device)
    seeds = torch.zeros(3, dtype=torch.int64, device=device)
    verify_sampling(tree, logits, params, seeds=seeds, processor=look)
    assert torch.equal(before, logits)
    roots = [(request, [token]) for request, token in enumerate(tokens[:, 0].tolist())]
    assert seen[:3] == roots

    seen.clear()
    verify_sampling(
        tree,
        logits,
        params,
        seeds=seeds,
        processor=lambda rows: (look(rows), rows.logits)[1] * 0 + 1,
    )
    assert seen[:3] == roots


def test_a_device_processor_can_be_captured(device):
    said = decode_plainly(device, torch.arange(3), [1.0, 0.0, 0.7], STEPS + 1)
    tree, logits = tree_of_good_drafts(device, said)
    params = SamplingParams.of([1.0, 0.0, 0.7], device=device)
    seeds = torch.arange(3).to(device)

    processor = on_device(device)

    def step():
        return verify_sampling(tree, logits, params, seeds=seeds, processor=processor)

    tape = Tape()
    static = tape.capture(step)
    for seed in range(3):
        seeds.fill_(seed)
        tape.replay()
        want = step()
        for field in ("predict", "accept_index", "accept_lens", "bonus_tokens", "status"):
            assert torch.equal(getattr(static, field), getattr(want, field)), field


def test_a_host_processor_cannot_be_captured_and_says_why(device):
    tokens, parents, lens = drafted(device)
    tree = build_tree(tokens, parents, lens, tree_mask_mode=TreeMaskMode.QLEN_ONLY)
    params = SamplingParams.of([1.0] * 3, device=device)
    seeds = torch.zeros(3, dtype=torch.int64, device=device)
    processor, logits = on_host(), torch.zeros(*tokens.shape, VOCAB, device=device)
    with pytest.raises(CaptureError, match=r"logit processor `grammar` runs on the host, .*graph"):
        Tape().capture(
            lambda: verify_sampling(tree, logits, params, seeds=seeds, processor=processor)
        )
    assert "`grammar` runs on the host" in processor.why_not_captured
    verify_sampling(tree, logits, params, seeds=seeds, processor=processor)
    levels = tree.spec_steps + 1
    assert processor.host_syncs == (0 if device.type == "cpu" else levels)


@pytest.mark.parametrize(
    ("processor", "error", "message"),
    [
        (5, ArgumentTypeError, r"processor got 5 \(int\); expected a callable\. Pass a function"),
        (lambda rows: None, ArgumentTypeError, r"processor\(\.\.\.\) got None"),
        (
            lambda rows: rows.logits[:, 1:],
            ArgumentValueError,
            r"processor\(\.\.\.\)\.shape got \[3, 11\]",
        ),
        (
            lambda rows: rows.logits.double(),
            ArgumentTypeError,
            r"processor\(\.\.\.\)\.dtype got torch\.float",
        ),
    ],
)
def test_what_is_no_processor_is_named(processor, error, message, device):
    tokens, parents, lens = drafted(device)
    tree = build_tree(tokens, parents, lens, tree_mask_mode=TreeMaskMode.QLEN_ONLY)
    params = SamplingParams.of([1.0] * 3, device=device)
    seeds = torch.zeros(3, dtype=torch.int64, device=device)
    logits = torch.zeros(*tokens.shape, VOCAB, device=device)
    with pytest.raises(error, match=r"^verify_sampling: " + message):
        verify_sampling(tree, logits, params, seeds=seeds, processor=processor)


def test_a_host_processor_needs_a_function():
    with pytest.raises(ArgumentTypeError, match=r"HostLogitProcessor: function got 3 \(int\)"):
        HostLogitProcessor(3)
