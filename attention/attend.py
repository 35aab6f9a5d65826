"""The attention function that a model calls: select pages, fetch them, compute over them."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor

from keysift.kvcache import Context, PagedCache, Phase, Selection, Step

from .contiguous import DenseKernel, contiguous_attention, suits
from .estimates import estimate
from .failure import Blame
from .laws import check
from .ops.merge import merge
from .ops.paged_attention import paged_attention
from .strategy import Strategy
from .telemetry import Telemetry
from .tracing import Spans, untraced

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""layer, q [T, Hq, D], k [T, Hkv, D], v [T, Hkv, D] -> out [T, Hq, D]: appends k and v to the cache, then attends."""


def bind(
    strategy: Strategy,
    cache: PagedCache,
    step: Step,
    telemetry: Telemetry | None = None,
    spans: Spans = untraced,
    *,
    dense_kernel: DenseKernel = "paged",
) -> Attend:
    """`Attend` for one step: the strategy selects pages, the cache fetches them, an op computes; `spans` traces each.

    A layer computes on the device of its queries, to which the step's tensors are copied once. A layer with a sliding
    window reads exactly that window, without the strategy. `dense_kernel` takes prompt chunks that read everything.

    `attend` raises `StrategyFailure` for what the strategy, its index or the telemetry of its selection raises.
    """
    spec = cache.spec
    on = functools.cache(step.on)
    with Blame(strategy, "index_spec"):
        index_spec = strategy.index_spec()
    choose = _chooser(strategy, step.phase)
    observing, recording = Blame(strategy, "index.observe"), Blame(strategy, "telemetry")

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        here = on(q.device)
        with spans("index", layer):
            cache.append(layer, k, v, here)
            with observing:
                cache.observe(layer, q, here)
        context = cache.context(layer, here, index_spec)
        window = spec.window(layer)
        with spans("selection", layer):
            selection = context.zones(sink=0, window=window) if window else choose(q, context)
        with spans("attention", layer):
            out, exact, lse = _compute(q, context, selection, window, dense_kernel)
        if telemetry is not None and not window:
            with spans("other", layer), recording:
                telemetry.record(layer, selection, exact, lse)
        return out

    return attend


def _chooser(strategy: Strategy, phase: Phase) -> Callable[[Tensor, Context], Selection]:
    """The strategy's method for this phase, whose exceptions and lawless selections become its `StrategyFailure`."""
    choosing, lawful = Blame(strategy, "prefill" if phase is Phase.PREFILL else "decode"), check(strategy)
    with choosing:
        method = strategy.prefill if phase is Phase.PREFILL else strategy.decode

    def choose(q: Tensor, context: Context) -> Selection:
        with choosing:
            lawful(selection := method(q, context), q, context)
        return selection

    return choose


def _compute(
    q: Tensor, context: Context, selection: Selection, window: int, dense_kernel: DenseKernel
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Output [T, Hq, D], and log-sum-exps [T, Hq] over the chosen pages alone and with the estimated ones.

    A contiguous kernel returns no log-sum-exp: it reads every page, so nothing is estimated, prefetched or merged.
    """
    if dense_kernel != "paged" and suits(context, selection, window):
        return contiguous_attention(q, context, dense_kernel), None, None
    out, exact = read(q, context, selection, window)
    if selection.prefetch is not None:
        context.tier.prefetch(context.layer, selection.prefetch, context.step)
    if selection.estimated is None:
        return out, exact, exact
    out, lse = merge(out, exact, *estimate(q, context, selection.estimated))
    return out, exact, lse


def read(q: Tensor, context: Context, selection: Selection, window: int = 0) -> tuple[Tensor, Tensor]:
    """Attention of q [T, Hq, D] over the chosen pages, merged over the parts that the tier fetches: out and lse."""
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
