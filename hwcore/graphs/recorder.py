"""Which torch calls a tape repeats, and how it repeats each."""

from __future__ import annotations

import functools
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from hwcore.errors import CaptureError
from hwcore.graphs.host_reads import check_call, tensors_in

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Recorder"]

aten = torch.ops.aten

# Memory whose contents nobody may rely on: nothing to do again.
_UNINITIALISED = {
    aten.empty,
    aten.empty_like,
    aten.empty_permuted,
    aten.empty_strided,
    aten.new_empty,
    aten.new_empty_strided,
}
# Results that depend on no tensor's values: written again only where something overwrites them.
_CONSTANT = {
    aten.arange,
    aten.eye,
    aten.full,
    aten.full_like,
    aten.lift_fresh,  # torch.tensor(host data)
    aten.new_full,
    aten.new_ones,
    aten.new_zeros,
    aten.ones,
    aten.ones_like,
    aten.scalar_tensor,
    aten.zeros,
    aten.zeros_like,
}


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch leaves it untyped
    """Runs each call while it is active, and keeps those that a replay has to run again.

    Attributes
    ----------
    devices : set of str
        Device types of the tensors in the recorded calls.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch leaves it untyped
        self.devices: set[str] = set()
        self._steps: list[Callable[[], object]] = []
        self._constants: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._written: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        plain = torch._C._disabled_torch_dispatch_impl
        if any(cls.__torch_dispatch__ is not plain for cls in types):
            return NotImplemented  # a tensor subclass: the plain calls it makes come here again
        with self:
            # In inference mode composite ops arrive whole, the reads inside them unseen.
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        check_call(func, args, kwargs)
        result = func(*args, **kwargs)
        if func.namespace != "profiler" and func.overloadpacket not in _UNINITIALISED:
            self._record(func, args, kwargs, result)
        return result

    def _record(self, func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        if func.overloadpacket in _CONSTANT:
            self._constants.append((result.detach(), result.clone()))
            return
        # Storages rather than the schema tell what is new: `_unsafe_view` returns an undeclared
        # alias, and some ops write one argument and return another tensor as well.
        old = {_storage(t) for t in tensors_in((args, kwargs))}
        leaves = tree_leaves(result)
        new = [isinstance(t, torch.Tensor) and _storage(t) not in old for t in leaves]
        # In-place views (`t_`) change the program's tensor, not memory.
        writes = func._schema.is_mutable and torch.Tag.inplace_view not in func.tags
        if not (writes or any(new) or not func._schema.returns):
            return  # a view, or a question about metadata
        # Aliases keep the shape and address of now, whatever the program does to its tensors.
        args, kwargs = tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs))
        targets = [t.detach() if is_new else None for t, is_new in zip(leaves, new, strict=True)]
        self._steps.append(_step(func, args, kwargs, targets))
        self.devices.update(t.device.type for t in tensors_in((args, kwargs, targets)))
        arguments = func._schema.arguments
        given = dict(zip((a.name for a in arguments), args, strict=False)) | kwargs
        written = [given.get(a.name) for a in arguments if a.is_write]
        self._written.update(_storage(t) for t in tensors_in(written))

    def finish(self, outputs: Any) -> list[Callable[[], object]]:
        """Return the steps of a replay; those that restore overwritten constants come first."""
        # Whoever is handed a constant may write into it.
        self._written.update(_storage(t) for t in tensors_in(outputs))
        restore = [
            partial(aten.copy_.default, constant, value)
            for constant, value in self._constants
            if _storage(constant) in self._written
        ]
        return [*restore, *self._steps]


def _step(
    func: Any, args: Any, kwargs: dict[str, Any], targets: list[torch.Tensor | None]
) -> Callable[[], object]:
    """Return what repeats one call."""
    call = partial(func, *args, **kwargs)
    fresh = [target for target in targets if target is not None]
    if not fresh:
        return call
    if func.overloadpacket in (aten.clone, aten._to_copy):
        return partial(aten.copy_.default, fresh[0], args[0])
    if len(fresh) == len(targets) and all(t.device.type == "cpu" for t in fresh):
        # Another device need not have the overload, and would say so in the first replay only.
        out = _out_overload(func)
        if out is not None:
            return partial(out[0], *args, **kwargs, **dict(zip(out[1], fresh, strict=True)))
    if len(targets) == 1:
        return partial(_copy_result, call, fresh[0])
    return partial(_copy_results, call, targets)


@functools.cache
def _out_overload(func: Any) -> tuple[Any, list[str]] | None:
    """Return the overload that writes the results of func into given tensors, and their names."""
    wanted = [(a.name, str(a.type)) for a in func._schema.arguments]
    if func._schema.is_mutable or any(str(r.type) != "Tensor" for r in func._schema.returns):
        return None
    for name in func.overloadpacket.overloads():
        candidate = getattr(func.overloadpacket, name)
        arguments = candidate._schema.arguments
        outs = [a.name for a in arguments if a.is_out]
        # Generated ones allocate and copy as well.
        if (
            len(outs) == len(func._schema.returns)
            and [(a.name, str(a.type)) for a in arguments if not a.is_out] == wanted
            and torch.Tag.generated not in candidate.tags
        ):
            return candidate, outs
    return None


def _copy_result(call: Callable[[], torch.Tensor], target: torch.Tensor) -> None:
    target.copy_(call())


def _copy_results(call: Callable[[], object], targets: list[torch.Tensor | None]) -> None:
    for target, result in zip(targets, tree_leaves(call()), strict=True):
        if target is not None:
            target.copy_(result)


def _storage(tensor: torch.Tensor) -> int:
    """Return what identifies a tensor's memory; for as long as the tensor lives."""
    if tensor.layout is not torch.strided:
        message = (
            f"Tape.capture: fn used a tensor of layout {tensor.layout}; expected torch.strided. "
            "Convert it with to_dense() before the capture."
        )
        raise CaptureError(message)
    return int(tensor.untyped_storage()._cdata)
