"""A head in training: the data's order, the schedule, a step, and all that a checkpoint holds."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from examples.eagle_head import network
from examples.eagle_head.loss import block_loss, soft_cross_entropy
from examples.eagle_head.rows import ROW, batch, cut, pack

if TYPE_CHECKING:
    from torch import Tensor

    from examples.eagle_head.layout import Shape
    from examples.eagle_head.rows import Batch
    from examples.eagle_head.store import Document

STEPS = 4


@dataclass(frozen=True)
class Settings:
    """What a run depends on besides its data; kept in its checkpoints."""

    tokens: int = 20_000_000  # to be seen in all: the schedule's length
    shards: int = 0  # 0: as many as there are
    draft_vocab: int = 10240  # with it the head is 22 MB
    rows: int = 12
    seed: int = 0
    matrix_rate: float = 0.02
    rate: float = 1e-3
    decay: float = 0.8  # weight of a draft step, to the one before
    warm_up: int = 50  # iterations
    deeper: tuple[int, int] = (500_000, 1_500_000)  # tokens seen before 3 and 4 steps are unrolled

    def rate_at(self, done: float, iteration: int) -> float:
        """Return the learning rates' factor after a part of the run: flat, then linear to 0."""
        return min(1.0, (iteration + 1) / self.warm_up) * min(1.0, max(0.02, (1 - done) / 0.7))

    def steps_at(self, seen: int) -> int:
        """Return how many draft steps are unrolled: the first ones are learnt first."""
        return 2 + sum(seen >= bound for bound in self.deeper)


class Data:
    """Rows to train on, and what belongs to them.

    Parameters
    ----------
    documents : list of Document
    best : list of Tensor
        The target's most probable tokens, as :mod:`labels` gives them.
    """

    def __init__(self, documents: list[Document], best: list[Tensor]) -> None:
        self.documents, self.best = documents, best
        self.rows = pack(cut(documents, best, STEPS))

    def order(self, epoch: int, seed: int) -> list[int]:
        """Return the rows' order in an epoch."""
        generator = torch.Generator().manual_seed(seed + epoch)
        return torch.randperm(len(self.rows), generator=generator).tolist()


def draft_vocabulary(data: Data, vocab: int, size: int) -> Tensor:
    """Return the token ids that the answers of the training data have most often, ascending."""
    counts = torch.zeros(vocab, dtype=torch.int64)
    for document, best in zip(data.documents, data.best, strict=True):
        counts += torch.bincount(best[document.answer[1:]], minlength=vocab)
    return counts.topk(size).indices.sort().values


def feature_scale(data: Data, shape: Shape, documents: int = 200) -> Tensor:
    """Return what makes the features about 1 in size ``[taps * hidden]``; a part of ``fc``."""
    width = len(shape.taps) * shape.hidden
    # The first tokens' states are some hundred times larger than any other.
    samples = [one.states[4:, :width].float() for one in data.documents[:documents]]
    size = torch.cat(samples).square().mean(0).sqrt()
    of_tap = size.view(len(shape.taps), -1).square().mean(1).sqrt()
    return 1 / (size + 0.1 * of_tap.repeat_interleave(shape.hidden))


class Training:
    """A head in training: weights, optimisers, and how far it is.

    Parameters
    ----------
    settings : Settings
    shape : Shape
    embedding : Tensor, float, [vocab, hidden]
        The target's, on the device to train on; its output matrix too.
    draft_ids : Tensor, int64, [draft_vocab]
    scale : Tensor, float, [taps * hidden]
    compiled : bool
    """

    def __init__(
        self,
        settings: Settings,
        shape: Shape,
        embedding: Tensor,
        draft_ids: Tensor,
        scale: Tensor,
        compiled: bool = False,
    ) -> None:
        self.settings, self.shape, self.embedding = settings, shape, embedding
        device = embedding.device
        self.draft_ids, self._scale = draft_ids.to(device), scale.to(device)
        self._teacher = embedding[self.draft_ids].bfloat16()
        self._draft_of = torch.full((shape.vocab,), -1, device=device)
        self._draft_of[self.draft_ids] = torch.arange(len(draft_ids), device=device)
        self._unroll = torch.compile(network.unroll) if compiled else network.unroll
        self._block = torch.compile(block_loss) if compiled else block_loss
        generator = torch.Generator().manual_seed(settings.seed)
        self.weights = {}
        for name, size in shape.matrices().items():
            # What adds to the residual stream begins small.
            small = 0.25 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.5
            drawn = torch.randn(size, generator=generator) * small / size[1] ** 0.5
            self.weights[name] = drawn.to(device)
        matrices = list(self.weights.values())
        self.weights |= {name: torch.ones(shape.hidden, device=device) for name in shape.norms()}
        self.weights["lm_head.weight"] = embedding[self.draft_ids].float().clone()
        others = list(self.weights.values())[len(matrices) :]
        for weight in self.weights.values():
            weight.requires_grad_()
        rate, matrix_rate = settings.rate, settings.matrix_rate
        self.optimisers: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.Muon(matrices, lr=matrix_rate, weight_decay=0.0, momentum=0.95),
            torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.0),
        )
        self._rates = matrix_rate, rate
        self.iteration = self.seen = 0

    @property
    def done(self) -> float:
        """Which part of the run is behind it."""
        return self.seen / self.settings.tokens

    def exported(self) -> dict[str, Tensor]:
        """Return the weights of the head that this has become."""
        scaled = self.weights["fc.weight"] * self._scale
        return {
            name: weight.detach() for name, weight in (self.weights | {"fc.weight": scaled}).items()
        }

    def step(self, data: Data) -> list[float]:
        """Learn from the next rows; return the loss of each draft step."""
        per_epoch = len(data.rows) // self.settings.rows
        epoch, number = divmod(self.iteration, per_epoch)
        order = data.order(epoch, self.settings.seed)[number * self.settings.rows :]
        rows = [data.rows[index] for index in order[: self.settings.rows]]
        steps = self.settings.steps_at(self.seen)
        learnt = batch(self.shape, self.embedding, rows, STEPS)
        losses = self._losses(learnt, steps)
        weight = torch.tensor([self.settings.decay**step for step in range(steps)])
        torch.autograd.backward((torch.stack(losses) * weight.to(losses[0].device)).sum())
        factor = self.settings.rate_at(self.done, self.iteration)
        for optimiser, rate in zip(self.optimisers, self._rates, strict=True):
            optimiser.param_groups[0]["lr"] = rate * factor
            optimiser.step()
            optimiser.zero_grad()
        self.iteration += 1
        self.seen += int(learnt.counts[0].sum())
        return torch.stack(losses).tolist()

    def _losses(self, learnt: Batch, steps: int) -> list[Tensor]:
        weights = self._halved()
        last, best = learnt.last, self._draft_of[learnt.best]
        # Which states teach anything; their distributions are needed up to ``steps`` times.
        teaches = torch.zeros(best.shape, dtype=torch.bool, device=best.device)
        for step in range(steps):
            teaches[:, step + 1 : step + 1 + ROW] |= learnt.counts[step]
        teaches &= best >= 0
        place = (teaches.flatten().cumsum(0) - 1).view(best.shape)
        chances = torch.cat(
            [(part @ self._teacher.T).softmax(-1) for part in torch.split(last[teaches], 512)]
        )
        losses = []
        for step, found in enumerate(self._unroll(self.shape, weights, learnt.text, steps)):
            there = slice(step + 1, step + 1 + ROW)
            counts = learnt.counts[step] & teaches[:, there]
            x = network.normed(self.shape, weights, found[counts]).bfloat16()
            label, target_of = best[:, there][counts], chances[place[:, there][counts]]
            weight = torch.full((len(x),), 1 / max(1, len(x)), device=x.device)
            losses.append(
                soft_cross_entropy(
                    x, weights["lm_head.weight"], target_of, label, weight, self._block
                )
            )
        return losses

    def _halved(self) -> dict[str, Tensor]:
        scaled = self.weights | {"fc.weight": self.weights["fc.weight"] * self._scale}
        return {name: weight.bfloat16() for name, weight in scaled.items()}

    @torch.no_grad()
    def agreement(self, data: Data) -> dict[str, list[float]]:
        """Return how often the head names the target's most probable token, by draft step.

        ``joint`` counts a step only where all before it are right as well: what a chain accepts.
        """
        weights = self._halved()
        right, joint, total = torch.zeros(3, STEPS).unbind()
        rows, size = data.rows, self.settings.rows
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            filled = part + [[] for _ in range(size - len(part))]
            asked = batch(self.shape, self.embedding, filled, STEPS)
            agreed = torch.ones_like(asked.counts[0])
            for step, found in enumerate(self._unroll(self.shape, weights, asked.text, STEPS)):
                x = network.normed(self.shape, weights, found).bfloat16()
                named = torch.stack([(row @ weights["lm_head.weight"].T).argmax(-1) for row in x])
                best = asked.best[:, step + 1 : step + 1 + ROW]
                hit = self.draft_ids[named] == best
                agreed = agreed & hit
                counts = asked.counts[step]
                right[step] += (hit & counts).sum().cpu()
                joint[step] += (agreed & counts).sum().cpu()
                total[step] += counts.sum().cpu()
        return {"marginal": (right / total).tolist(), "joint": (joint / total).tolist()}

    def state(self) -> dict[str, Any]:
        """Return all that a checkpoint holds."""
        return {
            "settings": asdict(self.settings),
            "weights": {name: weight.detach() for name, weight in self.weights.items()},
            "optimisers": [one.state_dict() for one in self.optimisers],
            "draft_ids": self.draft_ids,
            "scale": self._scale,
            "iteration": self.iteration,
            "seen": self.seen,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's state."""
        with torch.no_grad():
            for name, weight in state["weights"].items():
                self.weights[name].copy_(weight)
        for optimiser, kept in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(kept)
        self.iteration, self.seen = state["iteration"], state["seen"]
