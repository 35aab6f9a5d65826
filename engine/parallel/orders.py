"""Orders of the leader to its followers: changes of the page tables, and forward passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from keysift.kvcache import PagedCache
from keysift.kvcache.index import IndexSpec

from ..execution.forward import ForwardInput

Change = tuple[str, tuple[Any, ...]]
"""Name of a method of `PagedCache`, and its arguments."""


@dataclass(frozen=True, slots=True)
class Order:
    """One forward pass, and the changes of the page tables since the one before."""

    changes: list[Change]
    free_pages: int
    """Free pages after the changes, as a check of the follower's page tables."""
    work: ForwardInput
    last: list[int]
    """Indices of the packed tokens after which logits are needed."""


class RecordedCache(PagedCache):
    """Paged cache that records all changes of its page tables, for `replay` on other ranks."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._changes: list[Change] = []

    def take_changes(self) -> list[Change]:
        """Changes since the last call, in order."""
        changes, self._changes = self._changes, []
        return changes

    def _note(self, name: str, *arguments: Any) -> None:
        self._changes.append((name, arguments))

    def open(self, *specs: IndexSpec) -> int:
        sequence = super().open(*specs)
        self._note("open", *specs)
        return sequence

    def share(self, sequence: int, frames: Sequence[int]) -> None:
        self._note("share", sequence, list(frames))
        super().share(sequence, frames)

    def reserve(self, sequence: int, tokens: int) -> None:
        before = self.free_pages
        try:
            super().reserve(sequence, tokens)
        finally:  # after an error the sequence may own the pages until it is released
            if self.free_pages != before:
                self._note("reserve", sequence, tokens)

    def release(self, sequence: int) -> None:
        super().release(sequence)
        self._note("release", sequence)

    def rollback(self, sequence: int, tokens: int) -> None:
        super().rollback(sequence, tokens)
        self._note("rollback", sequence, tokens)

    def keep(self, sequence: int, keys: Sequence[bytes], first_page: int = 0, note: object = None) -> None:
        super().keep(sequence, keys, first_page, note)  # only the leader, which schedules, reads the note
        self._note("keep", sequence, list(keys), first_page)

    def withdraw(self, sequence: int) -> None:
        super().withdraw(sequence)
        self._note("withdraw", sequence)


def replay(cache: PagedCache, order: Order) -> None:
    """Apply the leader's changes to the page tables. Raises `RuntimeError` where the result differs."""
    for name, arguments in order.changes:
        getattr(cache, name)(*arguments)
    if cache.free_pages != order.free_pages:
        raise RuntimeError(f"{cache.free_pages} pages are free here, {order.free_pages} at the leader")
