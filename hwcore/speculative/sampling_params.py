"""What each request wants of sampling, as tensors."""

from __future__ import annotations

import collections.abc
import dataclasses
import math
from typing import TYPE_CHECKING

import torch

from hwcore._checks import check_range, check_tensor, check_values, may_read
from hwcore.errors import ArgumentTypeError, ArgumentValueError, describe

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["SamplingParams"]


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class SamplingParams:
    """Sampling parameters of a batch, one a request; made by :meth:`of` from numbers.

    What nobody in the batch uses is None, and costs nothing.

    Attributes
    ----------
    temperatures : Tensor, float32, [bs]
        At least 0 and finite; 0 is greedy: the highest logit, the lowest token of equal ones.
    top_ks : Tensor, int64, [bs], or None
        Tokens to choose from; at least 1, or -1 for all.
    top_ps : Tensor, float32, [bs], or None
        Probability, of what top-k left, to choose from; in (0, 1], 1 for all.
    min_ps : Tensor, float32, [bs], or None
        Least probability, relative to the likeliest token's; in [0, 1], 0 for all.
    any_greedy : bool
        False: no temperature is 0, which saves looking.
    all_greedy : bool
        True: every temperature is 0, and the rest does not matter.
    """

    temperatures: Tensor
    top_ks: Tensor | None = None
    top_ps: Tensor | None = None
    min_ps: Tensor | None = None
    any_greedy: bool = True
    all_greedy: bool = False

    @classmethod
    def of(
        cls,
        temperatures: Sequence[float],
        top_ks: Sequence[int | None] | None = None,
        top_ps: Sequence[float | None] | None = None,
        min_ps: Sequence[float | None] | None = None,
        *,
        device: torch.device | str = "cpu",
    ) -> SamplingParams:
        """Make parameters from numbers on the host, one a request.

        Called when the batch changes, not at each step.

        Parameters
        ----------
        temperatures : sequence of float
            At least 0 and finite.
        top_ks : sequence of int or None, optional
            At least 1; -1 or None for all tokens.
        top_ps : sequence of float or None, optional
            In (0, 1]; 1 or None for all tokens.
        min_ps : sequence of float or None, optional
            In [0, 1]; 0 or None for all tokens.
        device : torch.device or str
            Where the tensors go; the copies do not wait.

        Raises
        ------
        ArgumentTypeError
            If a value is no number.
        ArgumentValueError
            If a value is out of range, named with its request; or there are not as many as
            temperatures.
        """
        heat = _tensor("temperatures", temperatures, None)
        samples = heat > 0

        def used(name: str, values: Sequence[float | None] | None) -> Tensor | None:
            if values is None:
                return None
            column = _tensor(name, values, len(heat))
            # What a greedy request asks for beside changes nothing.
            wanted = (column != _KINDS[name].everything) & samples
            return column.to(device, non_blocking=True) if bool(wanted.any()) else None

        return cls(
            heat.to(device, non_blocking=True),
            used("top_ks", top_ks),
            used("top_ps", top_ps),
            used("min_ps", min_ps),
            any_greedy=not bool(samples.all()),
            all_greedy=not bool(samples.any()),
        )

    def check(self, where: str, bs: int, device: torch.device) -> None:
        """Raise unless the tensors are of that batch and device, and their content is in range."""
        for name, kind in _KINDS.items():
            values = getattr(self, name)
            if values is None and name != "temperatures":
                continue
            title = f"params.{name}"
            check_tensor(where, title, values, (kind.dtype,), [("bs", bs)], device)
            if may_read(values):
                kind.check(where, title, values)
        heat = self.temperatures
        if may_read(heat) and (self.all_greedy or not self.any_greedy):
            bad, what = (heat > 0, "0") if self.all_greedy else (heat <= 0, "more than 0")
            what += f" with any_greedy={self.any_greedy} and all_greedy={self.all_greedy}"
            fix = "Let SamplingParams.of find out"
            check_values(where, "params.temperatures", heat, bad, what, fix)


@dataclasses.dataclass(frozen=True)
class _Kind:
    """What values of one parameter are like."""

    dtype: torch.dtype
    everything: int  # the value that changes nothing
    lowest: float
    end: float  # the first beyond
    expected: str
    fix: str

    def check(self, where: str, name: str, values: Tensor) -> None:
        check_range(where, name, values, self.lowest, self.end, self.expected, self.fix)
        if self.dtype is torch.int64:  # -1 is all, 0 nothing
            check_values(where, name, values, values == 0, self.expected, self.fix)


_LEAST, _ABOVE_1 = 2.0**-149, 1 + 2.0**-23  # of float32: the least above 0, and above 1

_KINDS = {
    "temperatures": _Kind(
        torch.float32,
        1,
        0,
        math.inf,
        "a finite number >= 0",
        "Pass 0 for greedy, 1 for the target's own distribution",
    ),
    "top_ks": _Kind(
        torch.int64,
        -1,
        -1,
        math.inf,
        "an integer >= 1, or -1 for all",
        "Pass -1 to choose from all tokens",
    ),
    "top_ps": _Kind(
        torch.float32,
        1,
        _LEAST,
        _ABOVE_1,
        "a number in (0, 1]",
        "Pass 1 to choose from all tokens",
    ),
    "min_ps": _Kind(
        torch.float32,
        0,
        0,
        _ABOVE_1,
        "a number in [0, 1]",
        "Pass 0 to choose from all tokens",
    ),
}

_OF = "SamplingParams.of"


def _tensor(name: str, values: Sequence[float | None], bs: int | None) -> Tensor:
    """Return values from the host as a tensor there; what is wrong is named with its request."""
    kind = _KINDS[name]
    kinds: tuple[type, ...] = (int,) if kind.dtype is torch.int64 else (int, float)
    if isinstance(values, (str, torch.Tensor)) or not isinstance(values, collections.abc.Sequence):
        fix = "Pass a list; tensors go to SamplingParams(...) itself"
        raise ArgumentTypeError(describe(_OF, name, values, "a list of numbers", fix))
    if bs is not None and len(values) != bs:
        fix = "Pass one for each request"
        raise ArgumentValueError(describe(_OF, f"len({name})", len(values), f"{bs}", fix))
    numbers = []
    for request, value in enumerate(values):
        number = kind.everything if value is None and name != "temperatures" else value
        if number is None or isinstance(number, bool) or not isinstance(number, kinds):
            what = f"{name}[{request}]"
            raise ArgumentTypeError(describe(_OF, what, value, kind.expected, kind.fix))
        numbers.append(max(min(number, _FAR), -_FAR) if type(number) is int else number)
    column = torch.tensor(numbers, dtype=kind.dtype)
    kind.check(_OF, name, column)
    return column


_FAR = 2**62  # further than any vocabulary, and what int64 holds
