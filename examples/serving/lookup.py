"""Prompt lookup: drafting what may come next from where the text has been like this before."""

from __future__ import annotations

import heapq
import itertools
from collections import defaultdict
from dataclasses import dataclass

_LONGEST = 32  # tokens of agreement beyond which nothing is gained by looking further back


@dataclass(frozen=True)
class Draft:
    """A draft tree, likeliest nodes first, so that its first ``n`` nodes are a tree too.

    Attributes
    ----------
    tokens : list of int
        Token of each node; the first is the root, the last token of the text.
    parents : list of int
        Index of each node's parent; -1 for the root.
    depths : list of int
        Edges between each node and the root.
    chances : list of float
        How likely each node is thought to be accepted; 1 for the root.
    agreement : int
        Tokens over which the text agrees with its best match; 0 where there is none.
    """

    tokens: list[int]
    parents: list[int]
    depths: list[int]
    chances: list[float]
    agreement: int

    def __len__(self) -> int:
        return len(self.tokens)

    def path(self, following: list[int]) -> tuple[list[int], bool]:
        """Walk the tree along the tokens that did follow.

        Returns
        -------
        nodes : list of int
            The nodes met, the root left out.
        ended : bool
            False where the tokens ran out before the tree did, so that the path may go on.
        """
        children = {
            (p, t): n for n, (p, t) in enumerate(zip(self.parents, self.tokens, strict=True))
        }
        nodes: list[int] = []
        for token in following:
            child = children.get((nodes[-1] if nodes else 0, token))
            if child is None:
                return nodes, True
            nodes.append(child)
        return nodes, (nodes[-1] if nodes else 0) not in self.parents


class Lookup:
    """A text, and an index of where each of its tokens occurred."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens: list[int] = []
        self._after: defaultdict[int, list[int]] = defaultdict(list)
        self.extend(tokens)

    def extend(self, tokens: list[int]) -> None:
        """Append tokens to the text."""
        for token in tokens:
            self.tokens.append(token)
            self._after[token].append(len(self.tokens))

    def draft(self, size: int) -> Draft:
        """Merge what followed every earlier match of the text's end into one tree.

        Matches are of any length: the 3-, 2- and 1-grams of prompt lookup and longer. They are
        merged as they share tokens, and part where they differ: real branches.

        A match that agreed on ``k`` tokens is trusted to agree on the next one with a chance of
        ``k / (k + 1)``: each agreement counts one, doubt counts one. A later sibling gets what the
        earlier ones leave. The likeliest ``size`` nodes stay.

        Parameters
        ----------
        size : int
            Nodes at most, the root included.
        """
        matches = self._matches()
        draft = Draft([self.tokens[-1]], [-1], [0], [1.0], matches[0][0] if matches else 0)
        tick = itertools.count()  # among equals, the earlier found
        frontier: list[tuple[float, int, int, int, list[tuple[int, int]]]] = []
        node, chance = 0, 1.0
        while len(draft) < size:
            families: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
            for agreement, place in matches:
                if place < len(self.tokens):
                    families[self.tokens[place]].append((agreement + 1, place + 1))
            for token, family in families.items():
                trust = 1 - 1 / family[0][0]
                heapq.heappush(frontier, (-chance * trust, next(tick), node, token, family))
                chance *= 1 - trust
            if not frontier:
                break
            negative, _, parent, token, matches = heapq.heappop(frontier)
            node, chance = len(draft), -negative
            draft.tokens.append(token)
            draft.parents.append(parent)
            draft.depths.append(draft.depths[parent] + 1)
            draft.chances.append(chance)
        return draft

    def _matches(self) -> list[tuple[int, int]]:
        """Return (agreement, place of the next token) of every match, longest and latest first."""
        places = self._after[self.tokens[-1]][-2::-1]  # but for the end itself; latest first
        found = [(self._agreement(place), place) for place in places]
        return sorted(found, key=lambda match: -match[0])

    def _agreement(self, place: int) -> int:
        end, longest = len(self.tokens), min(place, _LONGEST)
        for length in range(1, longest):
            if self.tokens[place - 1 - length] != self.tokens[end - 1 - length]:
                return length
        return longest
