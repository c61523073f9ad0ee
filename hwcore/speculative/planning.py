"""Before the target's forward: a batch's inputs, made on the plan stream and joined."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from hwcore import _env
from hwcore._checks import check_instance, check_size, check_tensor
from hwcore.errors import ArgumentValueError, CapabilityError, describe
from hwcore.fence import StreamFence
from hwcore.graphs.prepared import Verdict
from hwcore.overlap import PlanStream
from hwcore.overlap.checks import check_switch
from hwcore.speculative.batch import check_locs, check_room
from hwcore.speculative.cache_locs import cache_locs
from hwcore.speculative.mrope import MropeContext, compute_spec_mrope_positions
from hwcore.speculative.tree import DraftTree, TreeMaskMode, build_tree

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from hwcore.backend import Backend
    from hwcore.graphs import GraphRunner
    from hwcore.graphs.prepared import Prepared
    from hwcore.speculative.batch import VerifyBatch

__all__ = ["Planner", "PreparedBatch", "plan_stream_of"]

_MROPE = "mrope_positions"


def plan_stream_of(
    where: str, backend: Backend, device: torch.device, plan_stream: bool | None
) -> PlanStream:
    """Return a plan stream as the user and the backend's policy want it.

    Raises
    ------
    CapabilityError
        If the user wants one where the policy has none, with the policy's reason.
    """
    check_switch(where, "plan_stream", plan_stream)
    wanted = _env.plan_stream() if plan_stream is None else plan_stream
    policy = backend.plan_stream_policy()
    if wanted and not policy.enabled:
        said = "plan_stream=True" if plan_stream else f"{_env.PLAN_STREAM}=1"
        fix = "Leave plan_stream out" if plan_stream else f"Unset {_env.PLAN_STREAM}"
        message = (
            f"{where}: {said} asks for a plan stream, which backend `{backend.info.name}` "
            f"disables: {policy.reason}; expected a backend that does not, or no such wish. {fix}."
        )
        raise CapabilityError(message)
    return PlanStream(backend=backend, device=device, enabled=wanted)


class PreparedBatch:
    """A batch whose inputs are made, or being made; to be verified, once.

    Attributes
    ----------
    batch : VerifyBatch
    verdict : Verdict
        Whether a graph runs it, and if not, why.
    vacated : list of int
        Rows that were given back since it was marked.
    """

    __slots__ = ("batch", "vacated", "verdict")

    def __init__(self, batch: VerifyBatch, verdict: Verdict, vacated: list[int]) -> None:
        self.batch = batch
        self.verdict = verdict
        self.vacated = vacated

    def __repr__(self) -> str:
        bs, n = self.batch.draft_tokens.shape
        how = "in a graph" if self.verdict else "eagerly"
        return f"<hwcore PreparedBatch {bs} requests of {n} nodes, {how}>"


class Inputs:
    """A joined batch.

    Attributes
    ----------
    tree : DraftTree
    by_name : dict of str to Tensor
        What the forward may be given.
    graph : graphs.Prepared or None
        The same in a graph's buffers.
    renewed : dict of str to Tensor
        What was made again since, or became another.
    """

    __slots__ = ("by_name", "graph", "renewed", "tree")

    def __init__(
        self,
        tree: DraftTree,
        by_name: dict[str, Tensor],
        graph: Prepared | None,
        renewed: dict[str, Tensor],
    ) -> None:
        self.tree = tree
        self.by_name = by_name
        self.graph = graph
        self.renewed = renewed

    def replace(self, name: str, value: Tensor) -> None:
        """Give an input another value, in a graph's buffers as well."""
        self.by_name[name] = self.renewed[name] = value


class Planner:
    """Makes a batch's inputs on the plan stream. The parameters are those of the worker.

    Attributes
    ----------
    fence : StreamFence
        For what the plan stream reads and others write: ``req_to_token``, ``mrope_deltas``.
    plan : PlanStream
    """

    def __init__(
        self,
        where: str,
        backend: Backend,
        device: torch.device,
        *,
        runner: GraphRunner | None,
        spec_steps: int | None,
        tree_mask_mode: TreeMaskMode,
        req_to_token: Tensor | None,
        mrope_deltas: Tensor | None,
        num_slots: int | None,
        page_size: int,
        fence: StreamFence | None,
        plan_stream: bool | None,
    ) -> None:
        int32, int64 = torch.int32, torch.int64
        check_instance(where, "tree_mask_mode", tree_mask_mode, TreeMaskMode, "TreeMaskMode")
        if spec_steps is not None:
            check_size(where, "spec_steps", spec_steps, 0, "Pass the greatest depth of a tree")
        if num_slots is not None:
            check_size(where, "num_slots", num_slots, 1, "Pass the slots of the KV pool")
        if req_to_token is not None:
            form = [("pool", None), ("max_context", None)]
            check_tensor(where, "req_to_token", req_to_token, (int64, int32), form, device)
            if not req_to_token.is_contiguous():
                got, fix = req_to_token.stride(), "Pass the whole table"
                expected = "a contiguous table"
                raise ArgumentValueError(
                    describe(where, "req_to_token.stride()", got, expected, fix)
                )
        if mrope_deltas is not None:
            check_tensor(where, "mrope_deltas", mrope_deltas, (int64,), [("pool", None)], device)
        self._where, self._hw, self._runner, self._device = where, backend, runner, device
        self._page_size = page_size
        self._spec_steps, self._mask_mode = spec_steps, tree_mask_mode
        self._req_to_token, self._deltas, self._num_slots = req_to_token, mrope_deltas, num_slots
        pools = [pool for pool in (req_to_token, mrope_deltas) if pool is not None]
        self.fence = fence or StreamFence(backend, device, pools)
        self.plan = plan_stream_of(where, backend, device, plan_stream)

    def can_replay(self, batch: VerifyBatch) -> Verdict:
        """Say whether the runner has a graph for a batch."""
        runner = self._runner
        if runner is None:
            return Verdict(None, "no runner", "the worker was given no GraphRunner")
        has = {"draft_tokens", "tree_mask", "seq_lens", "rows", *batch.extra}
        if batch.has_positions:
            has.add("positions")
            if self._deltas is not None:
                has.add(_MROPE)
        if batch.cache_locs is not None or self._req_to_token is not None:
            has.add("cache_locs")
        lacking = sorted(runner.buffers.slots.keys() - has)
        if lacking and not batch.is_empty:
            reason = f"the graph takes {', '.join(lacking)}, which this batch does not have"
            return Verdict(None, "inputs", reason)
        bs = 0 if batch.is_empty else len(batch.host_seq_lens)
        return runner.can_run(bs, batch.draft_tokens.shape[1])

    def prepare(self, prepared: PreparedBatch) -> None:
        """Make the inputs on the plan stream; what goes wrong is raised after its streams."""
        batch = prepared.batch
        with (
            self.plan.block(batch, self._req_to_token, self._deltas) as outputs,
            self.fence.reading(),
        ):
            self._fill(outputs, batch, prepared.verdict)
        if "graph" not in outputs:
            self.plan.join()  # raises

    def join(self, batch: VerifyBatch) -> Inputs:
        """Take over what was prepared, on the current stream."""
        context = None
        if self._deltas is not None:
            context = MropeContext(self._deltas, batch.rows, self._hw)
        joined = self.plan.join(context)
        out = joined.outputs
        by_name = {**out["inputs"], **joined.recomputed}
        return Inputs(out["tree"], by_name, out["graph"], joined.recomputed)

    def _fill(self, outputs: dict[str, Any], batch: VerifyBatch, verdict: Verdict) -> None:
        tree = build_tree(
            batch.draft_tokens,
            batch.parents,
            batch.seq_lens,
            spec_steps=self._spec_steps,
            tree_mask_mode=self._mask_mode,
            seq_lens_sum=batch.seq_lens_sum,
            backend=self._hw,
        )
        inputs = {
            "draft_tokens": batch.draft_tokens,
            "tree_mask": tree.tree_mask,
            "seq_lens": batch.seq_lens,
            "rows": batch.rows.to(torch.int64),
        }
        located, table = batch.cache_locs, self._req_to_token
        if located is None and table is not None:
            check_room(self._where, batch, table.shape[1])
            located = self._located(table, batch)
        if located is not None:
            if self._num_slots is not None:
                check_locs(self._where, located, self._num_slots)
            inputs["cache_locs"] = located
        if batch.has_positions:
            inputs["positions"] = tree.positions
            if self._deltas is not None and batch.is_empty:
                inputs[_MROPE] = tree.positions.new_zeros(3, tree.positions.shape[0])
            elif self._deltas is not None:
                # By these names the join looks for what it is to compute again.
                outputs["positions"] = tree.positions
                outputs[_MROPE] = inputs[_MROPE] = compute_spec_mrope_positions(
                    self._deltas, batch.rows, tree.positions, backend=self._hw
                )
        twice = sorted(inputs.keys() & batch.extra.keys())
        if twice:
            expected, fix = f"other names than {', '.join(inputs)}", "Rename it in the forward"
            raise ArgumentValueError(describe(self._where, "batch.extra", twice[0], expected, fix))
        inputs.update(batch.extra)
        outputs.update(tree=tree, inputs=inputs)
        outputs["graph"] = self._in_graph(batch, inputs) if verdict else None

    def _in_graph(self, batch: VerifyBatch, inputs: Mapping[str, Tensor]) -> Prepared:
        assert self._runner is not None  # it gave the verdict
        n = batch.draft_tokens.shape[1]
        if batch.is_empty:
            return self._runner.prepare({}, (), n, attention=batch.attention)
        given = {name: inputs[name] for name in self._runner.buffers.slots}
        return self._runner.prepare(given, batch.host_seq_lens, n, attention=batch.attention)

    def _located(self, table: Tensor, batch: VerifyBatch) -> Tensor:
        """Return the slots of the nodes: the places of each row from its length on."""
        n = batch.draft_tokens.shape[1]
        slots = cache_locs(table, batch.rows, batch.seq_lens, n, backend=self._hw)
        return self.redirected(slots, batch, batch.rows == 0)

    def redirected(self, cache_locs: Tensor, batch: VerifyBatch, gone: Tensor) -> Tensor:
        """Return KV slots with those of some requests in page 0, which is nobody's."""
        node = torch.arange(cache_locs.shape[1], device=self._device)
        # At its own place of the page, as a slot of any page would be.
        place = (batch.seq_lens.unsqueeze(1) + node) % self._page_size
        return torch.where(gone.unsqueeze(1), place, cache_locs)
