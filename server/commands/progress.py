"""Progress displays of all commands, on standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Update = Callable[[int, int, str], None]
"""Takes the units that are done, the units in all, and the title of the one that runs."""
PACE_WINDOW_S = 3600.0
"""Span of the past that the time left is estimated from: a unit may take minutes, and an estimate needs two of them."""


class Bar:
    """A bar with one task, drawn inside its `with` block, or until `stop`."""

    def __init__(self, progress: Progress, title: str, total: int | None) -> None:
        self._progress = progress
        self._task = progress.add_task(title, total=total)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def update(self, done: int, total: int | None = None, title: str | None = None) -> None:
        """Show `done` units; None leaves the total or the title as it is."""
        self._progress.update(self._task, completed=done, total=total, description=title)

    def stop(self) -> None:
        self._progress.stop()


def count_bar(title: str, total: int | None = None) -> Bar:
    """A bar with a count, on terminals only, erased at the end."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Bar(Progress(*columns, console=console, transient=True, disable=not console.is_terminal), title, total)


def long_bar(title: str) -> Bar:
    """A bar with the percentage, the time spent and the time left."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    remaining = (TextColumn("left"), TimeRemainingColumn())
    console = Console(stderr=True)
    return Bar(Progress(*columns, *remaining, console=console, speed_estimate_period=PACE_WINDOW_S), title, None)


def interrupted(title: str, work: Callable[[Update], object]) -> bool:
    """Run `work` under a `long_bar`; returns True if Ctrl-C ended it."""
    with long_bar(title) as bar:
        try:
            work(bar.update)
        except KeyboardInterrupt:
            return True
    return False


def report(message: str) -> None:
    """Print one line on standard error."""
    print(message, file=sys.stderr, flush=True)
