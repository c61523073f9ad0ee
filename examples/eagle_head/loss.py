"""Cross-entropy of draft logits to the target's distribution, without keeping any logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    Block = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

HARD = 0.3
"""How much of what is aimed at is the target's most probable token alone."""
_ROWS = 512  # at a time: their logits stay in the cache


def soft_cross_entropy(
    x: Tensor, head: Tensor, target: Tensor, label: Tensor, weight: Tensor, block: Block
) -> Tensor:
    """Return the weighted sum of the cross-entropies of ``x @ head.T``.

    The gradient is made together with the loss, block by block.

    Parameters
    ----------
    x : Tensor, [n, hidden]
    head : Tensor, [draft_vocab, hidden]
    target : Tensor, [n, draft_vocab]
        Distributions; they are mixed with the label.
    label : Tensor, int64, [n]
    weight : Tensor, float, [n]
    block : callable
        :func:`block_loss`, or what a compiler makes of it.
    """
    apply: Any = _SoftCrossEntropy.apply
    loss: Tensor = apply(x, head, target, label, weight, block)
    return loss


class _SoftCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        head: Tensor,
        target: Tensor,
        label: Tensor,
        weight: Tensor,
        block: Block,
    ) -> Tensor:
        x_grad, head_grad = torch.empty_like(x), torch.zeros_like(head, dtype=torch.float32)
        total = torch.zeros((), device=x.device)
        for start in range(0, len(x), _ROWS):
            part = slice(start, start + _ROWS)
            loss, grad = block(x[part] @ head.T, target[part], label[part], weight[part])
            total += loss
            x_grad[part] = grad @ head
            head_grad += grad.T @ x[part]
        ctx.save_for_backward(x_grad, head_grad.to(head.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_grad, head_grad = ctx.saved_tensors
        return x_grad * grad, head_grad * grad, None, None, None, None


def block_loss(
    logits: Tensor, target: Tensor, label: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the loss of some rows, and its gradient to their logits."""
    logs = logits.float().log_softmax(-1)
    hit = torch.arange(logits.shape[1], device=logits.device) == label.unsqueeze(1)
    aim = (1 - HARD) * target.float() + HARD * hit.float()
    loss = -((aim * logs).sum(-1) * weight).sum()
    grad = (logs.exp() - aim) * weight.unsqueeze(1)
    return loss, grad.to(logits.dtype)
