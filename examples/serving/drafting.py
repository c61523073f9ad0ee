"""Where the trees of a batch come from: what the worker asks for, and prompt lookup."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from hwcore.overlap import RelayPayload

if TYPE_CHECKING:
    from examples.serving.kv_pool import KVPool
    from hwcore.speculative import VerifyStep


class Drafting(Protocol):
    """What the worker asks of it; the host waits for none of it.

    Attributes
    ----------
    width : int
        Nodes of a tree, the last token among them.
    spec_steps : int
        Greatest depth of a tree: a step emits at most one token more.
    branches : bool
        Whether trees are more than chains, so that accepted entries have to move.
    reach : int
        Slots beyond a request's entries that a step writes to.
    taps : tuple of int
        Layers of the model whose input it wants to see.
    relay : dict
        What it leaves for the next step, as :class:`~hwcore.overlap.RelaySpec` says it.
    """

    width: int
    spec_steps: int
    branches: bool
    reach: int
    taps: tuple[int, ...]
    relay: dict[str, Any]

    def prefill(
        self,
        rows: Tensor,
        start: Tensor,
        text: Tensor,
        count: Tensor,
        features: Tensor,
        slots: Tensor,
    ) -> RelayPayload:
        """Take a chunk of a text, and return what the next step starts from.

        Parameters
        ----------
        rows, start, count : Tensor, int64, [1]
            Of the request; entries before the chunk; tokens in it.
        text : Tensor, int64, [1, chunk + 1]
            The ``count`` tokens, the one after them, and what does not count.
        features : Tensor, float, [1, chunk, taps * hidden]
            The model's at the tokens of the chunk.
        slots : Tensor, int64, [1, context]
        """

    def draft(
        self, rows: Tensor, lens: Tensor, relayed: RelayPayload, slots: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return tokens and parents ``[bs, width]``, as ``build_tree`` takes them.

        Parameters
        ----------
        rows, lens : Tensor, int64, [bs]
            Of the requests; entries, before the root.
        relayed : RelayPayload
            What the last step left.
        slots : Tensor, int64, [bs, context]
        """

    def extend(self, step: VerifyStep, slots: Tensor) -> RelayPayload:
        """Take what was accepted, and return what the next step starts from."""


class BatchLookup:
    """Prompt lookup: the text of every row on the device, and chains drafted from it.

    Parameters
    ----------
    pool : KVPool
    width : int
        Nodes of a tree: the last token, and ``width - 1`` drafts; 1: plain decoding.
    """

    longest = 4  # tokens of agreement beyond which no match is better than another
    branches = False
    taps: tuple[int, ...] = ()

    def __init__(self, pool: KVPool, width: int) -> None:
        self.width, self.spec_steps, self.reach = width, width - 1, width
        self.relay: dict[str, Any] = {}
        self._max_context = pool.max_context
        # The last column takes what belongs nowhere.
        shape = pool.num_rows, pool.max_context + 1
        self._text = torch.zeros(shape, dtype=torch.int64, device=pool.table.device)

    def prefill(  # noqa: D102
        self,
        rows: Tensor,
        start: Tensor,
        text: Tensor,
        count: Tensor,
        features: Tensor,
        slots: Tensor,
    ) -> RelayPayload:
        self.append(rows, start, text)
        return RelayPayload(text.gather(1, count.unsqueeze(1))[:, 0])

    def draft(  # noqa: D102
        self, rows: Tensor, lens: Tensor, relayed: RelayPayload, slots: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self.continuations(rows, lens, relayed.next_token)

    def extend(self, step: VerifyStep, slots: Tensor) -> RelayPayload:  # noqa: D102
        # The root is token number `seq_lens` of the text, and has been appended before.
        self.append(step.rows, lens_before(step) + 1, step.commit.accept_tokens)
        return RelayPayload(step.result.bonus_tokens)

    def append(self, rows: Tensor, places: Tensor, tokens: Tensor) -> None:
        """Write tokens ``[bs, n]`` to the texts of rows ``[bs]`` from places ``[bs]`` on.

        Negative tokens are left out.
        """
        step = torch.arange(tokens.shape[1], device=tokens.device)
        column = (places.unsqueeze(1) + step).clamp(max=self._max_context)
        column = torch.where(tokens < 0, self._max_context, column)
        self._text.index_put_((rows.unsqueeze(1).expand_as(column), column), tokens)

    def continuations(self, rows: Tensor, lens: Tensor, roots: Tensor) -> tuple[Tensor, Tensor]:
        """Continue each text as it continued after the longest, and of equals latest, match.

        Parameters
        ----------
        rows, lens, roots : Tensor, int64, [bs]
            The requests' rows, entries, and last tokens: token number ``lens`` of their texts.

        Returns
        -------
        tokens, parents : Tensor, int64, [bs, width]
            Chains, as :func:`hwcore.speculative.build_tree` takes them; -1, no parent, where the
            match ends or there is none.
        """
        text = self._text.index_select(0, rows)[:, :-1]  # [bs, max_context]
        place = torch.arange(self._max_context, device=text.device)
        # At each place: how many tokens before it are those at the end of the text.
        agreement = torch.zeros_like(text)
        agrees = place <= lens.unsqueeze(1)  # the text itself; what lies beyond is old
        for back in range(self.longest):
            sought = text.gather(1, (lens.unsqueeze(1) - back).clamp(min=0))
            same = torch.nn.functional.pad(text == sought, (back + 1, 0))[:, : self._max_context]
            agrees = agrees & same
            agreement = agreement + agrees
        best = (agreement * self._max_context + place).argmax(1, keepdim=True)  # [bs, 1]
        found = agreement.gather(1, best) > 0
        ahead = best + torch.arange(self.width - 1, device=text.device)  # [bs, width - 1]
        real = found & (ahead <= lens.unsqueeze(1))
        drafts = text.gather(1, ahead.clamp(max=self._max_context - 1))
        roots = roots.unsqueeze(1)
        parents = torch.where(real, torch.arange(self.width - 1, device=text.device), -1)
        none = torch.full_like(roots, -1)
        return torch.cat((roots, torch.where(real, drafts, roots)), 1), torch.cat(
            (none, parents), 1
        )


def lens_before(step: VerifyStep) -> Tensor:
    """Return the entries ``[bs]`` that the requests had before a step."""
    return step.commit.new_seq_lens - step.result.accept_lens


NO_DRAFTS = partial(BatchLookup, width=1)
"""No drafts: each step decodes one token."""
