"""Requests that come in over time, served in every way there is, and compared with each alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, TypeAlias

from examples.serving.compare import top_two
from examples.serving.drafting import NO_DRAFTS, BatchLookup
from examples.serving.eagle import HeadDrafting
from examples.serving.engine import Engine
from examples.serving.request import Request

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from examples.eagle_head.head import EagleHead
    from examples.serving.drafting import Drafting
    from examples.serving.engine import Timing
    from examples.serving.kv_pool import KVPool
    from examples.serving.model import Model

    Kinds: TypeAlias = dict[str, Callable[[KVPool], Drafting]]
    Run: TypeAlias = tuple[list[Request], Timing]

WAYS: dict[str, dict[str, bool]] = {
    "off": {"overlap": False},
    "overlap": {"overlap": True},
    "overlap + graphs": {"overlap": True, "graphs": True},
}
# Two forwards of other shapes were seen to differ by less than half of it in any logit.
TOLERANCE = 5e-4
EVERY = 2  # steps between two arrivals

_CHUNK = 32
_OVERSHOOT = 12  # entries beyond prompt and answer that the steps of any kind may want


def kinds_of(head: EagleHead | None) -> Kinds:
    """Return every kind of decoding there is, by its name."""
    kinds: Kinds = {"plain": NO_DRAFTS, "lookup": partial(BatchLookup, width=4)}
    if head is not None:
        drafting = partial(HeadDrafting, head=head, spec_steps=3)
        kinds["EAGLE chain"] = partial(drafting, topk=1, width=4)
        kinds["EAGLE tree"] = partial(drafting, topk=3, width=8)
    return kinds


@dataclass
class Difference:
    """Where an answer parts from that of the request run alone.

    Attributes
    ----------
    run, name : str
    place : int
        Number of the first other token.
    gap : float
        Between the two largest logits there.
    other_bucket : bool
        The run had other batch sizes, or the request was retracted and prefilled its own tokens:
        what rounds otherwise, and may decide a tie otherwise.
    """

    run: str
    name: str
    place: int
    gap: float
    other_bucket: bool

    @property
    def allowed(self) -> bool:
        """Whether rounding explains it."""
        return self.other_bucket and self.gap <= TOLERANCE


@dataclass
class Served:
    """All that was run.

    Attributes
    ----------
    bucket, num_slots : int
        The batch size that every step was padded to, and the size of the KV pool.
    alone : dict of str to dict of str to list of int
        By kind of decoding and by request: the answer to it alone.
    timings : dict of (str, str) to list of Timing
        By kind of decoding and the keys of ``WAYS``; one a round.
    retractions, compared : int
        How often requests lost their memory, and how many answers were compared.
    differences : list of Difference
    """

    bucket: int
    num_slots: int
    alone: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    timings: dict[tuple[str, str], list[Timing]] = field(default_factory=dict)
    retractions: int = 0
    compared: int = 0
    differences: list[Difference] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Whether every answer is the right one, or parts from it where two logits nearly tie."""
        return all(difference.allowed for difference in self.differences)


def serve(
    model: Model,
    prompts: Mapping[str, Sequence[int]],
    count: int,
    *,
    head: EagleHead | None = None,
    end: int | None = None,
    bucket: int = 8,
    rounds: int = 1,
    tick: Callable[[], object] = lambda: None,
) -> Served:
    """Serve the prompts with each kind of decoding, in each way, ``rounds`` times.

    Before that each request is served alone, on the same bucket; and all together on buckets that
    fit. The pool holds about half of what a full batch may need: some lose their memory.

    Parameters
    ----------
    model : Model
        Its Llama serves; itself it tells how near a tie was.
    prompts : mapping of str to sequence of int
    count : int
        Tokens to decode for each, at most.
    head : EagleHead, optional
        Without one there are plain decoding and prompt lookup.
    end : int, optional
        The token that ends an answer.
    bucket : int
        Largest batch size.
    tick : callable
        Called after each of the :func:`num_runs`.
    """
    longest = max(map(len, prompts.values()))
    max_context = longest + count + _OVERSHOOT
    served = Served(bucket, num_slots=1 + max_context * ((bucket + 1) // 2))

    def run(names: Iterable[str], buckets: Sequence[int], **options: Any) -> Run:
        requests = [
            Request(name, list(prompts[name]), count, EVERY * number, end)
            for number, name in enumerate(names)
        ]
        options = {"chunk": _CHUNK, **options}
        engine = Engine(model.llama, served.num_slots, max_context, buckets=buckets, **options)
        engine.run(requests)
        engine.close()
        served.retractions += sum(request.retractions for request in requests)
        tick()
        return requests, engine.timing

    def compare(what: str, right: str, requests: Iterable[Request], other_bucket: bool) -> None:
        for request in requests:
            served.compared += 1
            expected = served.alone[right][request.name]
            pairs = enumerate(zip_longest(expected, request.tokens))
            place = next((i for i, (a, b) in pairs if a != b), None)
            if place is not None:
                (_, first), (_, second) = top_two(model, request.prompt, expected[:place])
                other = other_bucket or request.retractions > 0
                found = Difference(what, request.name, place, first - second, other)
                served.differences.append(found)

    kinds = kinds_of(head)
    for kind, drafting in kinds.items():
        options = {"drafting": drafting}
        alone = [run([name], [bucket], overlap=False, **options)[0][0] for name in prompts]
        served.alone[kind] = {request.name: request.tokens for request in alone}
        if kind != "plain":
            compare(f"{kind}, alone", "plain", alone, other_bucket=True)
        sizes = fitting_buckets(bucket)
        compare(f"{kind}, buckets {sizes}", kind, run(prompts, sizes, **options)[0], True)
    order = [(kind, way) for kind in kinds for way in WAYS]
    for turn in range(rounds):
        # Back and forth, so that none always finds the caches warm.
        for kind, way in order if turn % 2 == 0 else reversed(order):
            requests, timing = run(prompts, [bucket], drafting=kinds[kind], **WAYS[way])
            served.timings.setdefault((kind, way), []).append(timing)
            compare(f"{kind}, {way}", kind, requests, other_bucket=False)
    return served


def num_runs(num_prompts: int, rounds: int, head: EagleHead | None = None) -> int:
    """Return how many runs :func:`serve` makes."""
    return len(kinds_of(head)) * (num_prompts + 1 + rounds * len(WAYS))


def fitting_buckets(bucket: int) -> list[int]:
    """Return batch sizes up to ``bucket``, each twice the one before."""
    return [*(2**n for n in range(bucket.bit_length()) if 2**n < bucket), bucket]
