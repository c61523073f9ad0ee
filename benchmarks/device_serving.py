"""The serving loop on a device: overlap scheduling with graphs, over neither; from a checkout only.

The engine of ``examples/serving``, on a model of SmolLM2-135M's shape whose weights are drawn: what
a step takes does not depend on their values, so nothing need be downloaded. Drawn weights accept
next to no draft; what trained ones bring is told by ``speculation``. The host gap is the engine's
own: host time between the submissions of two steps, without its wait for tokens. How long the
device stands idle between two steps is measured beside it, by events around each.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from hwcore.cli.device_clock import accelerator
from hwcore.cli.measurement import NotMeasuredError, Row, Target

if TYPE_CHECKING:
    from collections.abc import Callable

    from examples.eagle_head.head import EagleHead
    from examples.serving.drafting import Drafting
    from examples.serving.engine import Engine
    from examples.serving.kv_pool import KVPool
    from examples.serving.llama import Llama
    from hwcore.backend import Backend
    from hwcore.types import Event

ON_DEVICE = True
KINDS = ("plain", "EAGLE tree")
WAYS: dict[str, dict[str, bool]] = {
    "neither": {"overlap": False},
    "overlap + graphs": {"overlap": True, "graphs": True},
}
GAP = {kind: Target(f"{kind}: host gap of a step, overlap + graphs", 10.0, "%") for kind in KINDS}
SAME = {
    kind: Target(f"{kind}: answers with the tokens of neither", 100.0, "%", at_most=False)
    for kind in KINDS
}
IDLE = {
    kind: Target(f"{kind}: device idle between steps, overlap + graphs", None, "%")
    for kind in KINDS
}
SPEED = {
    kind: Target(f"{kind}: tokens a second, overlap + graphs / neither", None, at_most=False)
    for kind in KINDS
}
TARGETS = [table[kind] for kind in KINDS for table in (GAP, SAME, IDLE, SPEED)]

# What is read of a transformers LlamaConfig; SmolLM2-135M's numbers.
SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49152,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e5,
    "tie_word_embeddings": True,
}
QUICK = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 97}
QUICK |= {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8}


@dataclasses.dataclass
class Run:
    """One run: its answers, and what it took."""

    answers: list[list[int]]
    tokens_per_s: float
    gap: float  # share of the time
    idle: float  # likewise


def run(quick: bool = False) -> list[Row]:
    """Return the rows of this subject."""
    hw = accelerator()
    try:
        import examples.serving.engine  # noqa: F401
    except ImportError as error:
        message = f"needs a checkout with the demo's packages: {error}"
        raise NotMeasuredError(message) from error
    count, requests, bucket, rounds = (6, 3, 2, 1) if quick else (64, 16, 8, 5)
    config = SimpleNamespace(**SHAPE | (QUICK if quick else {}))
    context = 48 + count + 16
    with torch.no_grad():
        llama = _llama(config, hw, context)
        drafting = _drafting(config, llama)
    found: dict[tuple[str, str], list[Run]] = {}
    order = [(kind, way) for kind in KINDS for way in WAYS]
    for turn in range(1 + rounds):  # the first warms up, and does not count
        for kind, way in order if turn % 2 == 0 else reversed(order):
            options = {"drafting": drafting[kind], **WAYS[way]}
            done = _serve(hw, llama, context, (count, requests, bucket), options)
            if turn:
                found.setdefault((kind, way), []).append(done)
    return [row for kind in KINDS for row in _rows(kind, *(found[kind, way] for way in WAYS))]


def _rows(kind: str, neither: list[Run], both: list[Run]) -> list[Row]:
    def medians(of: Callable[[Run], float]) -> tuple[float, float]:
        first, second = (statistics.median(map(of, runs)) for runs in (neither, both))
        return first, second

    def percent(target: Target, of: Callable[[Run], float]) -> Row:
        before, after = medians(of)
        return target.row(100 * after, f"{100 * before:.1f} % with neither")

    # Every answer of every run, those of the rounds with neither among themselves included.
    right = neither[0].answers
    same = [
        answer == wanted
        for done in (*neither, *both)
        for answer, wanted in zip(done.answers, right, strict=True)
    ]
    before, after = medians(lambda done: done.tokens_per_s)
    return [
        percent(GAP[kind], lambda done: done.gap),
        SAME[kind].row(100 * sum(same) / len(same), f"{sum(same)} of {len(same)} answers"),
        percent(IDLE[kind], lambda done: done.idle),
        SPEED[kind].row(after / before, f"{before:.1f} → {after:.1f} tokens/s"),
    ]


def _serve(
    hw: Backend,
    llama: Llama,
    context: int,
    sizes: tuple[int, int, int],
    options: dict[str, Any],
) -> Run:
    """Answer requests that come in over time, all of which the pool has room for."""
    from examples.serving.engine import Engine
    from examples.serving.request import Request

    count, num_requests, bucket = sizes
    generator = torch.Generator().manual_seed(0)
    requests = []
    for number in range(num_requests):
        length = int(torch.randint(16, 48, (), generator=generator))
        prompt = torch.randint(0, llama.vocab, (length,), generator=generator).tolist()
        requests.append(Request(str(number), prompt, count, arrival=2 * number))
    engine = Engine(llama, 1 + context * bucket, context, buckets=[bucket], chunk=32, **options)
    marks = _watch(hw, engine)
    engine.run(requests)
    hw.synchronize()
    engine.close()
    idle = sum(end.elapsed_time(begin) for (_, end), (begin, _) in itertools.pairwise(marks))
    whole = marks[0][0].elapsed_time(marks[-1][1])
    timing = engine.timing
    return Run(
        [request.tokens for request in requests],
        timing.tokens / timing.total_s,
        timing.gap_s / timing.total_s,
        idle / whole,
    )


def _watch(hw: Backend, engine: Engine) -> list[tuple[Event, Event]]:
    """Have an event recorded on each side of each step; they come into the list."""
    marks: list[tuple[Event, Event]] = []
    plain = engine.worker.submit

    def submit(*arguments: Any) -> Any:
        begin, end = (hw.create_event(enable_timing=True) for _ in range(2))
        hw.record_event(begin)
        step = plain(*arguments)
        hw.record_event(end)
        marks.append((begin, end))
        return step

    engine.worker.submit = submit  # type: ignore[method-assign, assignment]
    return marks


# --- A model of drawn weights -----------------------------------------------------------------


def _llama(config: Any, hw: Backend, context: int) -> Llama:
    from examples.serving.llama import Llama

    torch.manual_seed(0)
    hidden, inner, width = config.hidden_size, config.intermediate_size, config.head_dim
    heads, kv = config.num_attention_heads * width, config.num_key_value_heads * width
    weights = {"model.embed_tokens.weight": _matrix(config.vocab_size, hidden)}
    weights["model.norm.weight"] = torch.ones(hidden)
    matrices = {
        "self_attn.q_proj": (heads, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, heads),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}"
        for name, shape in matrices.items():
            weights[f"{at}.{name}.weight"] = _matrix(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{at}.{name}.weight"] = torch.ones(hidden)
    return Llama(config, weights, hw.device(), context)


def _matrix(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns).mul_(columns**-0.5)


def _drafting(config: Any, llama: Llama) -> dict[str, Callable[[KVPool], Drafting]]:
    from examples.serving.drafting import NO_DRAFTS
    from examples.serving.eagle import HeadDrafting

    head = _head(config, llama)
    tree = partial(HeadDrafting, head=head, spec_steps=3, topk=3, width=8)
    return dict(zip(KINDS, (NO_DRAFTS, tree), strict=True))


def _head(config: Any, llama: Llama) -> EagleHead:
    from examples.eagle_head import layout
    from examples.eagle_head.head import EagleHead

    draft_vocab = min(10_240, config.vocab_size)
    shape = layout.Shape.of(config, draft_vocab)
    if config.num_hidden_layers <= max(shape.taps):
        shape = dataclasses.replace(shape, taps=(0, 1))
    weights = {name: _matrix(*size) for name, size in shape.matrices().items()}
    weights |= {name: torch.ones(shape.hidden) for name in shape.norms()}
    weights["lm_head.weight"] = _matrix(draft_vocab, shape.hidden)
    return EagleHead(shape, weights, torch.arange(draft_vocab), llama.embedding, llama.max_context)
