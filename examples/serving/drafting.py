"""Prompt lookup on the device: drafts for requests whose last token the host has not seen."""

from __future__ import annotations

import torch
from torch import Tensor


class PromptLookup:
    """The text of every row on the device, and chains drafted from it.

    Parameters
    ----------
    num_rows, max_context : int
        Of the pool.
    width : int
        Nodes of a tree: the last token, and ``width - 1`` drafts.
    device : torch.device

    Notes
    -----
    Host sync: no, nowhere.
    """

    longest = 4  # tokens of agreement beyond which no match is better than another

    def __init__(self, num_rows: int, max_context: int, width: int, device: torch.device) -> None:
        self._width, self._max_context = width, max_context
        # The last column takes what belongs nowhere.
        self._text = torch.zeros(num_rows, max_context + 1, dtype=torch.int64, device=device)

    def append(self, rows: Tensor, places: Tensor, tokens: Tensor) -> None:
        """Write tokens ``[bs, n]`` to the texts of rows ``[bs]`` from places ``[bs]`` on.

        Negative tokens are left out.
        """
        step = torch.arange(tokens.shape[1], device=tokens.device)
        column = (places.unsqueeze(1) + step).clamp(max=self._max_context)
        column = torch.where(tokens < 0, self._max_context, column)
        self._text.index_put_((rows.unsqueeze(1).expand_as(column), column), tokens)

    def draft(self, rows: Tensor, lens: Tensor, roots: Tensor) -> tuple[Tensor, Tensor]:
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
        ahead = best + torch.arange(self._width - 1, device=text.device)  # [bs, width - 1]
        real = found & (ahead <= lens.unsqueeze(1))
        drafts = text.gather(1, ahead.clamp(max=self._max_context - 1))
        roots = roots.unsqueeze(1)
        parents = torch.where(real, torch.arange(self._width - 1, device=text.device), -1)
        none = torch.full_like(roots, -1)
        return torch.cat((roots, torch.where(real, drafts, roots)), 1), torch.cat(
            (none, parents), 1
        )
