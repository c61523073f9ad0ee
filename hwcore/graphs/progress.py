"""A progress bar for captures, which take minutes on a real model."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["progress_bar"]


@contextlib.contextmanager
def progress_bar(
    total: int, shown: bool | None, used_bytes: Callable[[], int]
) -> Iterator[Callable[[int, str], None]]:
    """Show on standard error how many graphs there are, which comes now, and the memory used.

    Parameters
    ----------
    total : int
    shown : bool or None
        None: only where standard error is a terminal.
    used_bytes : callable
        Asked each time that the bar moves.

    Yields
    ------
    move : callable
        Takes how many graphs are done, and the bucket that is captured now.
    """
    if shown is None:
        shown = sys.stderr is not None and sys.stderr.isatty()
    if not shown:
        yield lambda done, now: None
        return
    # Imported only here: rich takes longer to import than a small capture.
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (
        TextColumn("graphs"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[used]}  {task.fields[now]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=total, used="", now="")

        def move(done: int, now: str) -> None:
            used = f"{used_bytes() / 2**20:.0f} MiB used"
            progress.update(task, completed=done, used=used, now=now)

        yield move
