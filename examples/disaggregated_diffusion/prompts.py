"""What a digit may be called, and a prompt as the encoder reads it: characters."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

import torch

from hwcore.errors import ArgumentTypeError, ArgumentValueError, describe

if TYPE_CHECKING:
    from collections.abc import Sequence

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LENGTH = 24
"""Tokens of a prompt: its beginning, its characters, padding."""

_CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789 ,.-"
_PAD, _BEGIN = 0, 1
VOCABULARY = 2 + len(_CHARACTERS)
_TOKENS = {character: 2 + place for place, character in enumerate(_CHARACTERS)}


class Style(enum.Enum):
    """How much ink a digit has, among those of its kind."""

    THIN = "thin"
    PLAIN = ""
    BOLD = "bold"


_PLAIN = ("{}", "a {}", "digit {}", "the digit {}", "number {}", "draw a {}", "please, a {}.")
_STYLED = (
    "{style} {}",
    "a {style} {}",
    "digit {}, {style}",
    "the {}, {style}",
    "draw a {style} {}",
)


def phrasings(digit: int, style: Style = Style.PLAIN) -> tuple[list[str], list[str]]:
    """Return the prompts for a digit: those it was trained on, and those it never saw.

    Every form is kept from two digits, in words from one and as a figure from the other: a prompt
    that was never seen is made of parts that were.
    """
    seen: list[str] = []
    unseen: list[str] = []
    for place, form in enumerate(_STYLED if style.value else _PLAIN):
        for shift, name in enumerate((NAMES[digit], str(digit))):
            kept_back = (digit - 2 * place - 5 * shift) % 10 == 0
            (unseen if kept_back else seen).append(form.format(name, style=style.value))
    return seen, unseen


def tokenize(prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens of prompts, and which of them are no padding.

    Case does not matter. The empty prompt is the one without a condition.

    Returns
    -------
    tokens : Tensor, int64, [prompts, LENGTH], CPU
    mask : Tensor, bool, [prompts, LENGTH], CPU

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        If a prompt is no str, too long, or has a character that the encoder does not know.
    """
    tokens = torch.full((len(prompts), LENGTH), _PAD)
    for row, prompt in enumerate(prompts):
        what = f"prompts[{row}]"
        if not isinstance(prompt, str):
            raise ArgumentTypeError(describe("tokenize", what, prompt, "a str", "Pass text"))
        text = prompt.lower()
        unknown = sorted(set(text) - set(_CHARACTERS))
        if len(text) >= LENGTH or unknown:
            expected = f"at most {LENGTH - 1} characters of {_CHARACTERS!r}"
            fix = f"Leave out {unknown}" if unknown else "Shorten it"
            raise ArgumentValueError(describe("tokenize", what, prompt, expected, fix))
        tokens[row, : len(text) + 1] = torch.tensor([_BEGIN, *(_TOKENS[c] for c in text)])
    return tokens, tokens != _PAD
