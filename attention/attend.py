"""The one function that a model knows."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor

from keysift.kvcache import Context, PagedCache, Phase, Selection, Step

from .contiguous import DenseKernel, contiguous_attention, suits
from .estimates import estimate
from .ops.merge import merge
from .ops.paged_attention import paged_attention
from .strategy import Strategy
from .telemetry import Telemetry
from .tracing import Spans, unwatched

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""layer, q [T, Hq, D], k [T, Hkv, D], v [T, Hkv, D] -> out [T, Hq, D]: appends k and v to the cache, then attends."""


def bind(
    strategy: Strategy,
    cache: PagedCache,
    step: Step,
    telemetry: Telemetry | None = None,
    spans: Spans = unwatched,
    *,
    dense_kernel: DenseKernel = "paged",
) -> Attend:
    """`Attend` for one step: the strategy chooses, the cache brings, the op computes; `spans` hears which of them does.

    A layer is attended to where its queries are: what a step tells is copied there, once for each device.
    Layers with a sliding window read that window exactly; no strategy is asked about them. Where a prompt's chunk reads
    everything, `dense_kernel` may compute instead of the op.
    """
    spec = cache.spec
    on = functools.cache(step.on)
    which = strategy.index_spec()
    choose = strategy.prefill if step.phase is Phase.PREFILL else strategy.decode

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        here = on(q.device)
        with spans("index", layer):
            cache.append(layer, k, v, here)
            cache.observe(layer, q, here)
        context = cache.context(layer, here, which)
        window = spec.window(layer)
        with spans("selection", layer):
            selection = context.zones(sink=0, window=window) if window else choose(q, context)
        with spans("attention", layer):
            lse: Tensor | None = None
            if dense_kernel != "paged" and suits(context, selection, window):
                out = contiguous_attention(q, context, dense_kernel)
            else:
                out, lse = read(q, context, selection, window)
            if selection.prefetch is not None:
                cache.tier.prefetch(layer, selection.prefetch, here)
            exact = lse
            if selection.estimated is not None:
                assert lse is not None, "who reads everything estimates nothing"
                out, lse = merge(out, lse, *estimate(q, context, selection.estimated))
        if telemetry is not None and not window:
            with spans("other", layer):
                telemetry.record(layer, selection, exact, lse)
        return out

    return attend


def read(q: Tensor, context: Context, selection: Selection, window: int = 0) -> tuple[Tensor, Tensor]:
    """Attention of q [T, Hq, D] over the chosen pages, in as many parts as the tier brings them in: out and lse."""
    step = context.step
    parts = (
        paged_attention(
            q,
            frames.k,
            frames.v,
            frames.table,
            part.pages,
            step.starts,
            queries_per_row=step.queries_per_row,
            scale=context.spec.softmax_scale,
            window=window,
        )
        for part, frames in context.parts(selection)
    )
    return functools.reduce(lambda one, other: merge(*one, *other), parts)
