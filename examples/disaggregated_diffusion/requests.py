"""What is asked for: requests of 1 to 4096 samples, with prompts, guidance and a schedule."""

from __future__ import annotations

import enum
import math
import random
from dataclasses import dataclass
from typing import Any

from examples.disaggregated_diffusion.prompts import Style, phrasings, tokenize
from hwcore.errors import ArgumentTypeError, ArgumentValueError, describe

MAX_SAMPLES = 4096
MAX_PROMPTS = 32
GUIDANCES = (1.0, 2.0, 4.0)
"""1.0: the prompt alone. More: away from what the denoiser does without a prompt."""


class Scheduler(enum.Enum):
    """How the way from noise to data is cut into steps."""

    EULER = "euler"
    HEUN = "heun"  # of second order: it looks at each step's end, the last one's excepted


STEPS = {Scheduler.EULER: 12, Scheduler.HEUN: 7}
"""Steps of about the same number of passes through the denoiser: 12 and 13."""


@dataclass(frozen=True)
class Request:
    """Samples of one or more prompts, which take turns.

    Attributes
    ----------
    request_id : str
    prompts : tuple of str
        1 to MAX_PROMPTS, and no more than samples.
    num_samples : int
        In [1, MAX_SAMPLES].
    guidance : float
        At least 1.0.
    scheduler : Scheduler
    num_inference_steps : int
        In [1, 1000].
    seed : int
        Of all noise; in [0, 2**63).

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        If one of them is anything else, or a prompt is none for :func:`.prompts.tokenize`.
    """

    request_id: str
    prompts: tuple[str, ...]
    num_samples: int
    guidance: float
    scheduler: Scheduler
    num_inference_steps: int
    seed: int

    def __post_init__(self) -> None:
        _check("request_id", self.request_id, str, True, "a str")
        right = isinstance(self.prompts, tuple) and 1 <= len(self.prompts) <= MAX_PROMPTS
        _check("prompts", self.prompts, tuple, right, f"a tuple of 1 to {MAX_PROMPTS} str")
        tokenize(self.prompts)
        lowest, samples = len(self.prompts), self.num_samples
        right = _is_int(samples) and lowest <= samples <= MAX_SAMPLES
        expected = f"an int in [{lowest}, {MAX_SAMPLES}], one sample for each prompt at least"
        _check("num_samples", samples, int, right, expected)
        right = isinstance(self.guidance, float) and 1.0 <= self.guidance < math.inf
        _check("guidance", self.guidance, float, right, "a finite float, 1.0 or more")
        _check("scheduler", self.scheduler, Scheduler, True, "a Scheduler")
        right = _is_int(self.num_inference_steps) and 1 <= self.num_inference_steps <= 1000
        _check("num_inference_steps", self.num_inference_steps, int, right, "an int in [1, 1000]")
        right = _is_int(self.seed) and 0 <= self.seed < 2**63
        _check("seed", self.seed, int, right, "an int in [0, 2**63)")

    def to_tree(self) -> dict[str, Any]:
        """Return what the encoder is sent."""
        return {name: getattr(self, name) for name in _FIELDS}

    @classmethod
    def from_tree(cls, tree: object) -> Request:
        """Return the request that :meth:`to_tree` made."""
        if not isinstance(tree, dict) or tree.keys() != set(_FIELDS):
            fix, expected = "Send what Request.to_tree() returns", f"a dict of {', '.join(_FIELDS)}"
            raise ArgumentTypeError(describe("Request", "the tree", tree, expected, fix))
        return cls(**tree)


_FIELDS = tuple(Request.__dataclass_fields__)


@dataclass(frozen=True)
class Asked:
    """A request, and which digits it ought to show: sample ``i`` is ``digits[i % len(digits)]``."""

    request: Request
    digits: tuple[int, ...]

    def labels(self) -> list[int]:
        """Return the digit of each sample."""
        count = self.request.num_samples
        return [self.digits[place % len(self.digits)] for place in range(count)]


def workload(short: bool = False, seed: int = 11) -> list[Asked]:
    """Return 64 requests of 1 to 4096 samples, or 16 of 1 to 256, in an order by chance.

    Sizes are spread evenly by their logarithm, both ends included.
    """
    chance, count, most = random.Random(seed), 16 if short else 64, 256 if short else MAX_SAMPLES
    sizes = [round(most ** (place / (count - 1))) for place in range(count)]
    chance.shuffle(sizes)
    asked = []
    for place, size in enumerate(sizes):
        digits = chance.sample(range(10), min(size, chance.randint(1, 4)))
        styles = [chance.choice(list(Style)) for _ in digits]
        forms = [[*seen, *unseen] for seen, unseen in map(phrasings, digits, styles)]
        scheduler = chance.choice(list(Scheduler))
        request = Request(
            request_id=f"request-{place:03d}",
            prompts=tuple(chance.choice(form) for form in forms),
            num_samples=size,
            guidance=GUIDANCES[place % len(GUIDANCES)],
            scheduler=scheduler,
            num_inference_steps=STEPS[scheduler],
            seed=chance.getrandbits(63),
        )
        asked.append(Asked(request, tuple(digits)))
    return asked


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check(name: str, value: object, kind: type, right: bool, expected: str) -> None:
    message = describe("Request", f"`{name}`", value, expected, "Correct the request")
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ArgumentTypeError(message)
    if not right:
        raise ArgumentValueError(message)
