"""Attention of one layer over a prompt: torch's best dense, FlexAttention, and ours dense and sparse."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from keysift.attention import Dense, Strategy, make, patterns
from keysift.attention.strategy import Share
from keysift.kvcache import Context, Selection
from keysift.kvcache.selection import pairs

from ..lib.prompt import ROW, Prompt
from .clock import Clock, causal_pairs, tflop_per_s
from .flex import BLOCKS, Flex
from .rows import Aim, Row, Settings, attempt, best, fallback, free, guarded, ratio

PEERS = {"torch flash": SDPBackend.FLASH_ATTENTION, "torch cudnn": SDPBackend.CUDNN_ATTENTION}
SHARES = (0.1, 0.2, 0.3)
STRATEGIES: dict[str, tuple[str, dict[str, object]]] = {
    "flexprefill 0.95": ("flexprefill", {"gamma": 0.95}),
    "flexprefill 0.9": ("flexprefill", {"gamma": 0.9}),
    "sampleattention 0.95": ("sampleattention", {"alpha": 0.95}),
    "sift": ("sift", {}),
}
RATE, FASTER, CHOICE = 0.7, 4.0, 0.08
"""Aims: rate on kept pairs against SDPA's dense one, times faster than it at 128k, and the share of it that choosing
may take."""
FAR = 1 << 17


@dataclass(frozen=True, slots=True, kw_only=True)
class Heaviest(Strategy):
    """A fixed share of every row's pairs, in the pages with the greatest mass by means; a fixed rule, not a method."""

    share: Share = 0.1

    def prefill(self, q: Tensor, context: Context) -> Selection:
        step = context.step
        first = (step.starts // step.page_size)[:, None]  # [R, 1], of the row's own pages
        page = patterns.pages(step)
        own, before = (page >= first) & patterns.causal(step), page < first  # [R, F]
        kept, causal = pairs(step, own.sum(-1, keepdim=True))  # [R, 1], [R]
        room = (self.share * causal[:, None] - kept) / (step.page_size * step.queries_per_row)
        mass = patterns.pooled(q, context, 8).masked_fill(~before[:, None], -1.0)  # [R, Hq, F]
        order = mass.sort(dim=-1, descending=True, stable=True).indices
        taken = (page < room.round())[:, None].expand(mass.shape)
        chosen = torch.zeros_like(taken).scatter(-1, order, taken)
        return Selection.from_mask((chosen & before[:, None]) | own[:, None])


def rows(settings: Settings) -> Iterator[Row]:
    for tokens in settings.lengths:
        yield from guarded({"what": "all of it", "tokens": tokens}, _length(settings, tokens))
        free()


def _length(settings: Settings, tokens: int) -> Iterator[Row]:
    chunk, fixed = min(settings.chunk, tokens), {"tokens": tokens}
    prompt = Prompt.make(settings.shape, tokens, chunk, device=settings.device, seed=settings.seed)
    yield from _peers(prompt, settings.clock, fixed)
    yield from _own(prompt, settings, fixed)


def _peers(prompt: Prompt, clock: Clock, fixed: Row) -> Iterator[Row]:
    for name, backend in PEERS.items():
        yield attempt({"what": name, **fixed}, lambda backend=backend: _torch(prompt, clock, backend))  # type: ignore[misc]
        free()


def _torch(prompt: Prompt, clock: Clock, backend: SDPBackend) -> Row:
    """The whole prompt at once; a backend that shares no key heads between queries gets them repeated, untimed."""
    q, k, v = (x.transpose(0, 1)[None].contiguous() for x in (prompt.q, prompt.k, prompt.v))
    with sdpa_kernel([backend]):
        try:
            scaled_dot_product_attention(q[:, :, :1], k[:, :, :1], v[:, :, :1], is_causal=True, enable_gqa=True)
        except RuntimeError:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        grouped = k.shape[1] < q.shape[1]
        seconds = clock.seconds(lambda: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped))
    rate = tflop_per_s(causal_pairs(len(prompt.q)) * q.shape[1], q.shape[3], seconds)
    return {"density": 1.0, "coverage": 1.0, "attend_ms": 1e3 * seconds, "ms": 1e3 * seconds, "TFLOP/s": rate}


def _own(prompt: Prompt, settings: Settings, fixed: Row) -> Iterator[Row]:
    clock = settings.clock
    yield attempt({"what": "dense", **fixed}, partial(_measured, prompt, clock, Dense(), False))
    flex = Flex(settings.device)
    for share in SHARES:
        strategy, name = Heaviest(share=share), f"{share:.0%} of the pairs"
        yield attempt({"what": name, **fixed}, partial(_measured, prompt, clock, strategy, False))
        for block in BLOCKS:
            label = f"flex {block[0]}x{block[1]}, {name}"
            if settings.device.type != "cuda":
                yield {"what": label, **fixed, "skipped": "only its compiled form leaves blocks out"}
            else:
                yield attempt({"what": label, **fixed}, partial(_flex, flex, prompt, clock, strategy, block))
            free()
    for name, (strategy_name, options) in STRATEGIES.items():
        chosen = make(strategy_name, **options)
        yield attempt({"what": name, **fixed}, partial(_measured, prompt, clock, chosen, True))
        free()


def _measured(prompt: Prompt, clock: Clock, strategy: Strategy, choosing: bool) -> Row:
    """`choosing`: the time that it takes counts."""
    selections = prompt.choose(strategy)
    choose = clock.seconds(lambda: prompt.choose(strategy)) if choosing else 0.0
    attend = clock.seconds(lambda: prompt.attend(selections))
    heads, dim = prompt.q.shape[1:]
    least, mean = prompt.coverage(selections)
    return {
        "density": prompt.density(selections), "coverage": mean, "least": least,
        "choose_ms": 1e3 * choose if choosing else None, "attend_ms": 1e3 * attend, "ms": 1e3 * (choose + attend),
        "TFLOP/s": tflop_per_s(kept_pairs(prompt, selections, heads), dim, attend),
        "reference": fallback(lambda: prompt.attend(prompt.choose(strategy)), clock.device),
    }  # fmt: skip


def kept_pairs(prompt: Prompt, selections: Sequence[Selection], heads: int) -> float:
    """Pairs of a query and a key that are attended to, all query heads counted."""
    each = (
        pairs(c.step, s.counts())[0].sum() * (heads / s.pages.shape[1])
        for c, s in zip(prompt.contexts, selections, strict=True)
    )
    return float(sum(each))


def _flex(flex: Flex, prompt: Prompt, clock: Clock, strategy: Strategy, block: tuple[int, int]) -> Row:
    mask, kept = flex.mask(prompt, prompt.choose(strategy), ROW, block)
    work = flex.work(prompt, mask)
    seconds = clock.seconds(work)
    tokens, heads, dim = prompt.q.shape
    return {
        "density": kept / heads / causal_pairs(tokens), "attend_ms": 1e3 * seconds, "ms": 1e3 * seconds,
        "TFLOP/s": tflop_per_s(kept, dim, seconds),
    }  # fmt: skip


def aims(rows: Sequence[Row]) -> list[Aim]:
    """Against the better of torch's two."""
    found = [Aim("our least rate on kept pairs at 128k, against SDPA's dense rate", _least_rate(rows), RATE)]
    peer = _peer(rows, FAR)
    for name in STRATEGIES:
        row = best(rows, "ms", what=name, tokens=FAR)
        took = ratio(row, peer, "choose_ms", "ms")
        if name.startswith("flexprefill"):
            faster = ratio(peer, row, "ms")
            found.append(Aim(f"{name} at 128k, times faster than SDPA", faster, FASTER))
        found.append(Aim(f"{name} at 128k, choosing against SDPA", took, CHOICE, False))
    return found


def _peer(rows: Sequence[Row], tokens: int) -> Row | None:
    both = (best(rows, "ms", what=name, tokens=tokens) for name in PEERS)
    return min((row for row in both if row), key=lambda row: row["ms"], default=None)


def _least_rate(rows: Sequence[Row]) -> float | None:
    peer = _peer(rows, FAR)
    own = [row["TFLOP/s"] for row in rows if row.get("tokens") == FAR and "TFLOP/s" in row and _is_ours(row)]
    return min(own) / peer["TFLOP/s"] if own and peer else None


def _is_ours(row: Row) -> bool:
    return row["what"] not in PEERS and not row["what"].startswith("flex ")
