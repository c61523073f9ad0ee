"""After the target's forward: verify, commit, move, and what the next step starts from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from hwcore._checks import check_callable, check_size
from hwcore.errors import ArgumentValueError, describe
from hwcore.kernels import torch_ops
from hwcore.overlap.relay import RelayPayload
from hwcore.speculative.batch import VerifyStep
from hwcore.speculative.commit import commit
from hwcore.speculative.inputs import logits_and_hidden
from hwcore.speculative.sampling import verify_sampling
from hwcore.speculative.sampling_params import SamplingParams
from hwcore.speculative.verify import VerifyResult, verify_greedy

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from hwcore.backend import Backend
    from hwcore.overlap.relay import RelaySpec
    from hwcore.speculative.batch import VerifyBatch
    from hwcore.speculative.planning import Inputs
    from hwcore.speculative.tensor_parallel import ResultBroadcast
    from hwcore.speculative.tree import DraftTree

__all__ = ["Finisher"]


class Finisher:
    """Turns what a forward returned into a :class:`VerifyStep`. Parameters: the worker's.

    Attributes
    ----------
    why_not_captured : str
        What the logit processor says of graphs; empty if nothing.
    """

    def __init__(
        self,
        where: str,
        backend: Backend,
        spec: RelaySpec,
        *,
        draft_extend: Callable[[VerifyStep], RelayPayload] | None,
        move_kv: Callable[[Tensor, Tensor], Any] | None,
        page_size: int,
        threshold_single: float,
        threshold_acc: float,
        processor: Callable[..., Any] | None,
        broadcast: ResultBroadcast | None,
    ) -> None:
        check_size(where, "page_size", page_size, 1, "Pass the page size of the KV pool")
        check_callable(where, "draft_extend", draft_extend, "Pass a function of a VerifyStep")
        check_callable(where, "move_kv", move_kv, "Pass a function of slots and slots")
        needed = [name for name in ("topk", "draft_probs") if getattr(spec, name)]
        if needed and draft_extend is None:
            expected, fix = f"a callable, for relay holds {' and '.join(needed)}", "Pass it"
            raise ArgumentValueError(describe(where, "draft_extend", None, expected, fix))
        self._where, self._hw, self._spec = where, backend, spec
        self._draft_extend, self._move_kv = draft_extend, move_kv
        self._page_size, self._processor = page_size, processor
        self._threshold_single, self._threshold_acc = threshold_single, threshold_acc
        self._broadcast, self._ops = broadcast, torch_ops(backend)
        self.why_not_captured: str = getattr(processor, "why_not_captured", "")

    def finish(self, batch: VerifyBatch, inputs: Inputs, rows: Tensor, out: Any) -> VerifyStep:
        """Verify, commit, and move the KV entries of the accepted paths."""
        tree, locs = inputs.tree, inputs.by_name.get("cache_locs")
        (bs, n), device = tree.draft_tokens.shape, tree.draft_tokens.device
        logits, hidden = logits_and_hidden(f"{self._where}.verify", out, bs, n)
        result = None
        if self._broadcast is None or self._broadcast.is_source:
            result = self._verify(tree, logits, batch)
        if self._broadcast is not None:
            result = self._broadcast(result, bs, n, tree.spec_steps + 1, device)
        assert result is not None  # from here, or from rank 0
        committed = commit(
            tree,
            result,
            batch.seq_lens,
            locs,
            page_size=self._page_size,
            hidden_states=hidden,
            backend=self._hw,
        )
        if self._move_kv is not None:
            if committed.kv_src is None or committed.kv_dst is None:
                expected, fix = "the slots to move between", "Pass cache_locs, or req_to_token"
                raise ArgumentValueError(
                    describe(self._where, "batch.cache_locs", None, expected, fix)
                )
            self._move_kv(committed.kv_src.view(-1), committed.kv_dst.view(-1))
        graph = inputs.graph is not None
        return VerifyStep(rows, tree, result, committed, locs, graph)

    def payload(self, step: VerifyStep) -> RelayPayload:
        """Return what the next step of the batch starts from."""
        if self._draft_extend is not None:
            return self._draft_extend(step)
        last = None
        if self._spec.hidden_size:
            hidden = step.commit.hidden_states
            if hidden is None:
                expected, fix = "hidden states, for relay holds them", "Return (logits, hidden)"
                raise ArgumentValueError(
                    describe(self._where, "what forward returned", None, expected, fix)
                )
            at = (step.result.accept_lens.to(torch.int64) - 1).view(-1, 1, 1)
            at = at.expand(-1, 1, hidden.shape[2])
            last = self._ops.gather(hidden, 1, at).squeeze(1).to(self._spec.hidden_dtype)
        return RelayPayload(step.result.bonus_tokens, hidden_states=last)

    def _verify(self, tree: DraftTree, logits: Tensor, batch: VerifyBatch) -> VerifyResult:
        params, seeds, processor = batch.sampling, batch.seeds, self._processor
        if params is None:
            if processor is None:
                return verify_greedy(tree, logits, backend=self._hw)
            bs, device = len(tree.draft_tokens), tree.draft_tokens.device
            params = SamplingParams(torch.zeros(bs, device=device), all_greedy=True)
        if seeds is None:  # nobody tosses a coin
            seeds = torch.zeros(len(tree.draft_tokens), dtype=torch.int64, device=logits.device)
        return verify_sampling(
            tree,
            logits,
            params,
            seeds=seeds,
            processor=processor,
            backend=self._hw,
            threshold_single=self._threshold_single,
            threshold_acc=self._threshold_acc,
        )
