"""Tracing hooks for the parts of a step."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal, Protocol, get_args

Part = Literal["linear", "selection", "attention", "index", "transfer", "sampling", "other"]
"""Kinds of work that a step's time is attributed to.

linear: the model outside of attention, its linear layers, norms and embeddings; selection: a strategy chooses pages;
attention: chosen pages are read, estimates merged; index: keys, codes and summaries are written, indexes built;
transfer: pages are fetched to where an op can read them; sampling: tokens from logits; other: the rest.
"""
PARTS: tuple[Part, ...] = get_args(Part)

Stretch = Literal["prefill", "decode"]
"""A whole step of this phase."""


class Spans(Protocol):
    """Factory of context managers around the work of a step.

    Spans nest; the time of an inner span does not count for the outer one.
    """

    def __call__(self, name: Part | Stretch, layer: int | None = None) -> AbstractContextManager[None]:
        """Context manager around one piece of work, of a layer if it belongs to one."""


def untraced(name: Part | Stretch, layer: int | None = None) -> AbstractContextManager[None]:
    """`Spans` that record nothing."""
    return _NOTHING


_NOTHING = nullcontext()
