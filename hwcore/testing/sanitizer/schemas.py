"""What an op reads and writes, from its schema; looked up once for each op.

The schema says which arguments an op writes and which results are views. What it does not say, or
says wrongly, is in the tables here: ops that use an argument's shape alone, ops that leave their
result uninitialised, results that are undeclared aliases.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import torch

__all__ = ["Op", "is_mask_index", "op_of"]

aten = torch.ops.aten

# Of these arguments only shape, dtype and device are used.
_LIKE = re.compile(r"(new_\w+|\w+_like)$")
_UNINITIALISED = re.compile(r"(empty(_like|_strided|_permuted)?|new_empty(_strided)?)$")

_METADATA = {
    aten._has_compatible_shallow_copy_type,
    aten._is_zerotensor,
    aten._nested_tensor_size,
    aten._unsafe_view,  # an undeclared alias
    aten._version,
    aten.is_coalesced,
    aten.is_complex,
    aten.is_contiguous,
    aten.is_floating_point,
    aten.is_inference,
    aten.is_neg,
    aten.is_non_overlapping_and_dense,
    aten.is_pinned,
    aten.is_same_size,
    aten.is_strides_like_format,
    aten.numel,
    aten.size,
    aten.storage_offset,
    aten.stride,
    aten.sym_is_contiguous,
    aten.sym_numel,
    aten.sym_size,
    aten.sym_storage_offset,
    aten.sym_stride,
}
# The tensor gets another storage, or another name for its own; no memory is touched.
_REBINDING = {aten.set_, aten.set_data, aten.set}
_MASK_INDEXING = {aten.index, aten._unsafe_index}
_MASK_WRITING = {aten.index_put, aten.index_put_, aten._unsafe_index_put, aten._index_put_impl_}
_READS_HOST = {aten.equal, aten.is_nonzero, aten.item, aten._linalg_check_errors}
# Which rows they touch depends on an index; `rows` may say so.
_INDEXED = (
    _MASK_INDEXING
    | _MASK_WRITING
    | {
        aten.embedding,
        aten.gather,
        aten.index_add,
        aten.index_add_,
        aten.index_copy,
        aten.index_copy_,
        aten.index_fill,
        aten.index_fill_,
        aten.index_reduce_,
        aten.index_select,
        aten.masked_fill_,
        aten.masked_scatter_,
        aten.masked_select,
        aten.put_,
        aten.scatter,
        aten.scatter_,
        aten.scatter_add,
        aten.scatter_add_,
        aten.scatter_reduce,
        aten.scatter_reduce_,
        aten.take,
        aten.take_along_dim,
    }
)
# Written although the schema does not say so.
_ALSO_WRITES = {aten.native_batch_norm: ("running_mean", "running_var")}


@dataclasses.dataclass(frozen=True, slots=True)
class Op:
    """One op overload.

    Attributes
    ----------
    name : str
        As reports show it, such as ``"aten::add"``.
    kind : str
        ``"inert"`` (touches no memory), ``"composite"`` (to be decomposed), ``"copy"``,
        ``"record_stream"``, ``"resize"``, or ``"plain"``.
    tensors : tuple
        (position, name, is written) of each argument that may hold tensors whose memory counts.
    fresh : tuple of int
        Which results are new tensors.
    initialises : bool
        Whether it writes its new results.
    reads_host : bool
        The host waits for the op, to learn a value or a shape.
    indexed : bool
        It touches rows that depend on an index.
    """

    name: str
    kind: str
    tensors: tuple[tuple[int, str, bool], ...] = ()
    fresh: tuple[int, ...] = ()
    initialises: bool = True
    reads_host: bool = False
    indexed: bool = False


_INERT = Op("", "inert")
_known: dict[Any, Op] = {}


def op_of(func: Any) -> Op:
    """Return what is known of a function that a dispatch mode was given."""
    found = _known.get(func)
    if found is None:
        found = _known[func] = _learn(func)
    return found


def is_mask_index(func: Any, args: tuple[Any, ...]) -> bool:
    """Say whether an indexing op turns a mask into positions, for which the host waits."""
    packet = func.overloadpacket
    if packet not in _MASK_INDEXING and packet not in _MASK_WRITING:
        return False
    masked = any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
    # With one value torch fills by the mask and needs no positions.
    return masked and (packet in _MASK_INDEXING or args[2].numel() != 1)


def _learn(func: Any) -> Op:
    if not isinstance(func, torch._ops.OpOverload):
        return _INERT  # a higher-order op: the ops that it runs come by themselves
    schema, packet = func._schema, func.overloadpacket
    name = schema.name
    if packet is aten.record_stream:
        return Op(name, "record_stream")
    if packet is aten.resize_:
        return Op(name, "resize")
    if packet is aten.lift_fresh:  # torch.tensor(host data)
        return Op(name, "plain", fresh=(0,), initialises=False)
    if func.namespace in ("prim", "profiler") or packet in _METADATA or packet in _REBINDING:
        return _INERT
    if torch.Tag.inplace_view in func.tags:
        return _INERT
    if func._can_decompose() and _is_composite(func):
        return Op(name, "composite")
    own = name.rpartition("::")[2]
    also = _ALSO_WRITES.get(packet, ())
    tensors = tuple(
        (position, argument.name, argument.is_write or argument.name in also)
        for position, argument in enumerate(schema.arguments)
        if "Tensor" in str(argument.type) and (argument.is_write or not _LIKE.match(own))
    )
    fresh = tuple(
        index
        for index, result in enumerate(schema.returns)
        if result.alias_info is None and "Tensor" in str(result.type)
    )
    writes = any(written for _, _, written in tensors)
    views = any(result.alias_info is not None for result in schema.returns)
    if not writes and not fresh and (views or not tensors):
        return _INERT
    kind = "copy" if packet in (aten.copy_, aten._to_copy, aten._foreach_copy_) else "plain"
    return Op(
        name,
        kind,
        tensors,
        fresh,
        initialises=not _UNINITIALISED.match(own),
        reads_host=_reads_host(func, packet),
        indexed=packet in _INDEXED,
    )


def _is_composite(func: Any) -> bool:
    """Say whether an op has no kernel of its own: it arrives whole in inference mode alone."""
    key = "CompositeImplicitAutograd"
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key))


def _reads_host(func: Any, packet: Any) -> bool:
    if packet in _MASK_INDEXING or packet in _MASK_WRITING:
        return False  # with a mask alone: see is_mask_index
    tags = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
    return packet in _READS_HOST or any(tag in func.tags for tag in tags)
