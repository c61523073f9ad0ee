"""A progress bar for captures, which take minutes on a real model."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["tracked"]

T = TypeVar("T")


def tracked(items: Sequence[T], shown: bool | None, used_bytes: Callable[[], int]) -> Iterator[T]:
    """Yield items while a bar on standard error shows how many, which, and the memory used.

    Parameters
    ----------
    items : sequence
        Buckets.
    shown : bool or None
        None: only where standard error is a terminal.
    used_bytes : callable
        Asked before every item, and at the end.
    """
    if not (sys.stderr.isatty() if shown is None else shown):
        yield from items
        return
    # Imported only here: rich takes longer to import than a small capture.
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (
        TextColumn("graphs"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[now]}"),
        TextColumn("{task.fields[used]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(items), now="", used="")
        for item in items:
            progress.update(task, now=str(item), used=_mib(used_bytes()))
            yield item
            progress.advance(task)
        progress.update(task, now="", used=_mib(used_bytes()))


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:.0f} MiB used"
