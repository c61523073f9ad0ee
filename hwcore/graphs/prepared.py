"""What a graph runner says about a batch: whether a graph takes it, and that it is in place."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from hwcore.graphs.captured import Captured, Outputs
    from hwcore.graphs.rows import Rows
    from hwcore.graphs.slots import Bucket
    from hwcore.types import ReplayBatch, Stream

__all__ = ["Place", "Prepared", "Verdict"]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether a graph takes a batch; true if so.

    Attributes
    ----------
    bucket : (int, int) or None
        The smallest bucket that takes it.
    kind : str
        Why there is none, for counting: ``"not captured"``, ``"tokens per request"`` or
        ``"batch size"``.
    reason : str
        The same as a sentence, with the numbers of this batch.
    """

    bucket: Bucket | None
    kind: str = ""
    reason: str = ""

    def __bool__(self) -> bool:
        return self.bucket is not None


class Place:
    """Where batches of one size go: a bucket's graph, and their rows in its inputs and outputs."""

    __slots__ = ("captured", "outputs", "padding_lens", "rows")

    def __init__(self, captured: Captured, rows: Rows, pad_seq_len: int) -> None:
        self.captured = captured
        self.rows = rows
        self.outputs: Outputs = captured.outputs(rows.batch_size)
        self.padding_lens = (pad_seq_len,) * (captured.bucket[0] - rows.batch_size)


class Prepared:
    """A batch whose inputs are in place, to be replayed once and before the next is prepared.

    Attributes
    ----------
    batch : ReplayBatch
        What the backend is told, but for what is known only after the join.
    place : Place
    stream : Stream
        On which the inputs were copied.
    missing : frozenset of str
        Slots that were given no input yet.
    """

    __slots__ = ("batch", "missing", "place", "stream")

    def __init__(
        self, batch: ReplayBatch, place: Place, stream: Stream, missing: frozenset[str]
    ) -> None:
        self.batch = batch
        self.place = place
        self.stream = stream
        self.missing = missing

    def __repr__(self) -> str:
        return f"<hwcore Prepared {len(self.batch.seq_lens)} requests in {self.batch.bucket}>"

    @property
    def inputs(self) -> Mapping[str, torch.Tensor]:
        """Every slot as the graph sees it, for what plans by its inputs."""
        return self.place.captured.inputs
