"""Conversations cut to pieces and packed to rows of one length; batches of rows as tensors."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from examples.eagle_head.network import Text
from examples.serving.attention import frequencies

if TYPE_CHECKING:
    from torch import Tensor

    from examples.eagle_head.layout import Shape
    from examples.eagle_head.store import Document

ROW = 256
_OVERLAP = 32  # of a long conversation's pieces: what is before counts little
_FAR = -1e30


@dataclass(frozen=True)
class Piece:
    """The positions ``begin`` to ``end`` of a document; the loss counts from ``counts_from``."""

    document: Document
    best: Tensor  # [length - 1]: the target's most probable token after each position
    begin: int
    end: int
    counts_from: int


class Batch(NamedTuple):
    """Rows of packed text, what the head is to say, and where that counts."""

    text: Text
    last: Tensor  # [bs, row + steps, hidden]: the target's last normed state at each position
    best: Tensor  # int64, [bs, row + steps]: its most probable next token
    counts: Tensor  # bool, [steps, bs, row]


def cut(documents: list[Document], best: list[Tensor], steps: int) -> list[Piece]:
    """Return the documents in pieces no longer than a row."""
    pieces = []
    for document, tokens in zip(documents, best, strict=True):
        length, begin, counts_from = len(document.tokens) - 1, 0, 0
        while True:
            end = min(begin + ROW, length)
            pieces.append(Piece(document, tokens, begin, end, counts_from))
            if end == length:
                break
            # The last positions of a piece could not be unrolled: they count in the next.
            begin, counts_from = end - _OVERLAP, end - steps
    return pieces


def pack(pieces: list[Piece]) -> list[list[Piece]]:
    """Return rows of pieces: each goes where it leaves the least room, the longest first."""
    rows: list[list[Piece]] = []
    with_room: dict[int, list[list[Piece]]] = defaultdict(list)
    for piece in sorted(pieces, key=lambda one: one.begin - one.end):
        length = piece.end - piece.begin
        room = next((room for room in range(length, ROW + 1) if with_room[room]), None)
        if room is None:
            row: list[Piece] = []
            rows.append(row)
            room = ROW
        else:
            row = with_room[room].pop()
        row.append(piece)
        with_room[room - length].append(row)
    return rows


def batch(shape: Shape, embedding: Tensor, rows: list[list[Piece]], steps: int) -> Batch:
    """Return rows as tensors on the embedding's device."""
    bs, hidden, taps = len(rows), shape.hidden, len(shape.taps)
    tokens = torch.zeros(bs, ROW + steps, dtype=torch.int64)
    states = torch.zeros(bs, ROW + steps, (taps + 1) * hidden, dtype=torch.bfloat16)
    best = torch.zeros(bs, ROW + steps, dtype=torch.int64)
    owner = torch.full((bs, ROW + steps), -1)
    positions = torch.zeros(bs, ROW, dtype=torch.int64)
    answer = torch.zeros(bs, ROW + steps, dtype=torch.bool)
    begun = torch.zeros(bs, ROW, dtype=torch.bool)
    for index, row in enumerate(rows):
        at = 0
        for number, piece in enumerate(row):
            length, source = piece.end - piece.begin, slice(piece.begin, piece.end)
            here, following = slice(at, at + length), slice(piece.begin + 1, piece.end + 1)
            tokens[index, here] = piece.document.tokens[following]
            answer[index, here] = piece.document.answer[following]
            states[index, here] = piece.document.states[source]
            best[index, here] = piece.best[source]
            owner[index, here] = number
            positions[index, here] = torch.arange(piece.begin, piece.end)
            begun[index, here] = positions[index, here] >= piece.counts_from
            at += length
    device = embedding.device
    states = states.to(device)
    owned = owner[:, :ROW]
    sees = (owned.unsqueeze(2) == owned.unsqueeze(1)).tril()
    mask = torch.zeros(sees.shape, dtype=torch.bfloat16).masked_fill_(~sees, _FAR)
    cos, sin = angles(shape, positions, steps)
    text = Text(
        embedded=torch.nn.functional.embedding(tokens.to(device), embedding).bfloat16(),
        features=states[:, :ROW, : taps * hidden],
        mask=mask.view(bs, 1, 1, ROW, ROW).to(device),
        cos=cos.to(device),
        sin=sin.to(device),
    )
    # Drafting begins after a token of the answer, and goes on while the answer does.
    count = begun & answer[:, :ROW]
    counts = []
    for step in range(1, steps + 1):
        there = slice(step, step + ROW)
        count = count & answer[:, there] & (owner[:, there] == owned)
        counts.append(count)
    return Batch(
        text, states[..., taps * hidden :], best.to(device), torch.stack(counts).to(device)
    )


def angles(shape: Shape, positions: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Return cosines and sines ``[steps, *positions.shape, 1, width / 2]``, a step further each."""
    at = torch.stack([positions + step for step in range(steps)])
    turned = at[..., None, None] * frequencies(shape.theta, shape.width)
    return turned.cos(), turned.sin()
