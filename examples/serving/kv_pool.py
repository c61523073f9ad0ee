"""Where requests keep their keys and values: slots of one pool, found through a table of rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from examples.serving.llama import Llama


class KVPool:
    """Slots for entries, rows for requests, and what is free of both.

    A request owns a row, and a slot for each of its entries; ``table[row, entry]`` is the slot.
    Row 0 and slot 0 belong to nobody: they are what padding reads and writes.

    The host keeps the books. The device's memory changes in the order of its streams, so that
    what is freed may be given away at once: its last user has been submitted before its next.

    Parameters
    ----------
    llama : Llama
    num_slots, num_rows : int
        Slot 0 and row 0 included.
    max_context : int
        Entries that a request may have.

    Attributes
    ----------
    kv : Tensor, float, [layers, num_slots, 2, kv_heads, width]
    table : Tensor, int64, [num_rows, max_context]
    free_slots, free_rows : list of int
        What nobody owns.
    """

    def __init__(self, llama: Llama, num_slots: int, num_rows: int, max_context: int) -> None:
        self.num_slots, self.num_rows, self.max_context = num_slots, num_rows, max_context
        self.kv = llama.new_kv(num_slots)
        self.table = torch.zeros(num_rows, max_context, dtype=torch.int64, device=llama.device)
        self.free_slots = list(range(num_slots - 1, 0, -1))
        self.free_rows = list(range(num_rows - 1, 0, -1))

    def take_slots(self, count: int) -> list[int]:
        """Give slots away; the caller has seen that so many are free."""
        return [self.free_slots.pop() for _ in range(count)]

    def give_back(self, row: int, slots: list[int]) -> None:
        """Free a request's row and slots."""
        self.free_rows.append(row)
        self.free_slots.extend(slots)

    def move(self, src: torch.Tensor, dst: torch.Tensor) -> None:
        """Copy entries between slots ``[n]``, in every layer."""
        self.kv.index_copy_(1, dst, self.kv.index_select(1, src))
