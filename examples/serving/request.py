"""What is asked of the engine, and what of it one step runs."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(eq=False)
class Request:
    """A prompt to answer.

    Attributes
    ----------
    name : str
    prompt : list of int
    count : int
        Tokens to decode.
    arrival : int
        Number of the step from which on the request is there.
    end : int or None
        A token after which the answer is over, however few came before.
    temperature : float
        0: the likeliest token, always.
    seed : int
        Of the request's coins, which are its own: nobody it runs with changes its answer, unless
        they drive it out of memory. What it draws after that, with drafts, may be other tokens of
        the same distribution.
    tokens : list of int
        The answer, as far as the host knows it.
    retractions : int
        How often the request lost its memory to older ones.
    row, slots
        What it owns in the pool; row 0: nothing.
    entries : int
        Tokens of the text that prefills have brought into the cache.
    in_flight : int
        Steps submitted for it whose tokens are not on the host yet.
    """

    name: str
    prompt: list[int]
    count: int
    arrival: int = 0
    end: int | None = None
    temperature: float = 0.0
    seed: int = 0
    tokens: list[int] = field(default_factory=list)
    retractions: int = 0
    row: int = 0
    slots: list[int] = field(default_factory=list)
    entries: int = 0
    in_flight: int = 0

    @property
    def finished(self) -> bool:
        """Whether the whole answer is on the host."""
        return len(self.tokens) >= self.count or (self.end is not None and self.end in self.tokens)

    def take(self, tokens: list[int]) -> None:
        """Append what a step gave, as far as the answer goes."""
        for token in tokens:
            if not self.finished:
                self.tokens.append(token)


@dataclass
class Batch:
    """One step.

    Attributes
    ----------
    requests : list of Request
    chunk : list of int
        Of a prefill, which is of one request: the tokens to bring in. Empty: everyone decodes.
    following : list of int
        The token after the chunk; none after the last.
    start : int
        Entry of the chunk's first token.
    emits : bool
        Whether the step gives tokens: only the last chunk of a prefill does.
    new_slots : list of (int, int, int)
        Row, entry and slot of what was taken from the pool for this step.
    """

    requests: list[Request]
    chunk: list[int] = field(default_factory=list)
    following: list[int] = field(default_factory=list)
    start: int = 0
    emits: bool = True
    new_slots: list[tuple[int, int, int]] = field(default_factory=list)
