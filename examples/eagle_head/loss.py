"""Cross-entropy of draft logits to the target's distribution, without keeping any logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

_ROWS = 512  # at a time: their logits stay in the cache
HARD = 0.3
"""How much of what is aimed at is the target's most probable token alone."""


class SoftCrossEntropy(torch.autograd.Function):
    """The weighted sum of cross-entropies to ``target``, which is mixed with ``label``.

    The gradient is made together with the loss, block by block.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, head: Tensor, target: Tensor, label: Tensor, weight: Tensor
    ) -> Tensor:
        """Return the loss.

        Parameters
        ----------
        ctx : context
        x : Tensor, [n, hidden]
        head : Tensor, [draft_vocab, hidden]
        target : Tensor, [n, draft_vocab]
        label : Tensor, int64, [n]
        weight : Tensor, float, [n]
        """
        x_grad, head_grad = torch.empty_like(x), torch.zeros_like(head, dtype=torch.float32)
        total = torch.zeros((), device=x.device)
        for start in range(0, len(x), _ROWS):
            part = slice(start, start + _ROWS)
            loss, grad = _block(x[part] @ head.T, target[part], label[part], weight[part])
            total += loss
            x_grad[part] = grad @ head
            head_grad += grad.T @ x[part]
        ctx.save_for_backward(x_grad, head_grad.to(head.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Return the gradients of ``x`` and ``head``."""
        x_grad, head_grad = ctx.saved_tensors
        return x_grad * grad, head_grad * grad, None, None, None


def _block_eager(
    logits: Tensor, target: Tensor, label: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    logs = logits.float().log_softmax(-1)
    hit = torch.arange(logits.shape[1], device=logits.device) == label.unsqueeze(1)
    aim = (1 - HARD) * target.float() + HARD * hit.float()
    loss = -((aim * logs).sum(-1) * weight).sum()
    grad = (logs.exp() - aim) * weight.unsqueeze(1)
    return loss, grad.to(logits.dtype)


_block = torch.compile(_block_eager)
