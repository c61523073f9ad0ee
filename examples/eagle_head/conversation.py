"""One conversation while the model writes it: which tokens are given, which are drawn, and how."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from examples.eagle_head import prompts
from examples.serving.prompts import as_chat

if TYPE_CHECKING:
    from torch import Tensor

END = 2  # <|im_end|>
_SPECIAL = 17  # token ids below are marks of the chat format and of file formats
_USER_TEMPERATURE = 0.8
_STOPS = ".", "?", "!", "\n"
_ROOM_FOR_MORE = 320  # tokens before a second turn: what comes is as much again at most
_LONGEST_MESSAGE = 100


class Tokenizer(Protocol):
    """What is needed of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, marks of the chat format included."""

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids."""


@dataclass(frozen=True)
class Plan:
    """What conversation ``index`` of the endless list is to be.

    Every second one begins with a message that the model makes up itself, when it is given the
    opening of a user's turn (Magpie, arXiv 2406.08464) and the first words.
    """

    index: int
    own_message: bool
    temperature: float
    turns: int
    longest_answer: int
    message: int = 8
    """After how many tokens a message of the model's own ends with its sentence."""

    @classmethod
    def of(cls, index: int) -> Plan:
        """Return the plan of conversation ``index``."""
        pair = index // 2
        return cls(
            index,
            own_message=index % 2 == 1,
            temperature=0.0 if pair % 2 else 0.8,
            turns=2 if pair // 2 % 6 == 0 else 1,
            longest_answer=320 if pair % 7 == 0 else 192,
            message=(8, 8, 16, 32, 64)[pair % 5],
        )


@dataclass
class Conversation:
    """The tokens of a conversation so far, and what is to follow.

    ``answer[i]`` says that the model gave ``tokens[i]`` as (part of) an answer.
    """

    plan: Plan
    tokenizer: Tokenizer
    tokens: list[int] = field(default_factory=list)
    answer: list[bool] = field(default_factory=list)
    answering: bool = True
    dropped: bool = False
    done: bool = False
    message: str = ""
    states: Tensor | None = None
    """Of all tokens but the last, which the model never saw."""
    _turn: int = 1
    _began: int = 0

    def __post_init__(self) -> None:
        """Open with the user's message, or with the opening of one."""
        if not self.tokens:
            if self.plan.own_message:
                self._let_user_speak("", prompts.starter(self.plan.index))
            else:
                self.message = prompts.trained(self.plan.index // 2).text
                self._give(as_chat(self.message))
                self._began = len(self.tokens)
        else:
            self._began = len(self.tokens)

    @property
    def temperature(self) -> float:
        """With which temperature the next token is to be drawn."""
        return self.plan.temperature if self.answering else _USER_TEMPERATURE

    def append(self, token: int) -> None:
        """Take the token that was drawn after the last one."""
        self.tokens.append(token)
        self.answer.append(self.answering)
        length = len(self.tokens) - self._began
        if self.answering:
            ended = token == END
            if ended and self._turn < self.plan.turns and len(self.tokens) <= _ROOM_FOR_MORE:
                self._turn += 1
                self._next_turn()
            elif ended or length >= self.plan.longest_answer:
                self.done = True
        elif token == END:
            self._close_message(self.tokens[self._began : -1])
        elif token < _SPECIAL or length > _LONGEST_MESSAGE:
            self.dropped = True
        elif length >= self.plan.message and self.tokenizer.decode([token]).endswith(_STOPS):
            # Left to itself the model goes on and on in the user's name.
            self._give("<|im_end|>")
            self._close_message(self.tokens[self._began : -1])

    def _next_turn(self) -> None:
        if self.plan.own_message:
            self._let_user_speak("\n", "")
        else:
            text = prompts.follow_up(self.plan.index // 2)
            self._give("\n" + as_chat(text))
            self._began = len(self.tokens)

    def _let_user_speak(self, before: str, words: str) -> None:
        self.answering = False
        self._give(before + as_chat(words).partition("<|im_end|>")[0])
        self._began = len(self.tokens) - len(self.tokenizer.encode(words))

    def _close_message(self, ids: list[int]) -> None:
        text = self.tokenizer.decode(ids).strip()
        self.message = self.message or text
        self.dropped = _is_useless(ids, text, first=self._turn == 1)
        self._give(as_chat("").partition("<|im_end|>")[2])
        self._began, self.answering = len(self.tokens), True

    def _give(self, text: str) -> None:
        ids = self.tokenizer.encode(text)
        self.tokens += ids
        self.answer += [False] * len(ids)


def _is_useless(ids: list[int], text: str, first: bool) -> bool:
    """Return whether a message that the model made up is too short, repetitive or held out."""
    words = text.lower().split()
    repetitive = len(ids) >= 20 and len(set(ids)) < 0.35 * len(ids)
    too_short = len(words) < (3 if first else 1)
    return too_short or repetitive or prompts.resembles_held_out(text)
