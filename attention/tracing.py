"""Where a step tells what its time goes to."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal, Protocol, get_args

Part = Literal["linear", "selection", "attention", "index", "transfer", "sampling", "other"]
"""What time is spent on.

linear: the model outside of attention, its linear layers, norms and embeddings; selection: a strategy chooses;
attention: the chosen pages are read, and estimates merged; index: keys, their codes and summaries are written, indexes
built; transfer: pages are brought where an op can read them; sampling: logits become tokens; other: the rest.
"""
PARTS: tuple[Part, ...] = get_args(Part)

Stretch = Literal["prefill", "decode"]
"""A whole step of this phase."""


class Spans(Protocol):
    """Told by a step what it is about to do. Spans nest: what an inner one is about is not the outer one's."""

    def __call__(self, name: Part | Stretch, layer: int | None = None) -> AbstractContextManager[None]:
        """Entered where such work begins and left where it ends."""


def unwatched(name: Part | Stretch, layer: int | None = None) -> AbstractContextManager[None]:
    """`Spans` while nobody measures."""
    return _NOTHING


_NOTHING = nullcontext()
