"""One layer's attention of a prompt under each strategy: choosing, attending, and both against dense and torch's SDPA.

Queries, keys and values are structured like those of trained heads (`structured.py`), in bf16, in chunks as they are
served; torch gets the whole prompt at once. Density has the causal denominator. Coverage is the attention mass that the
chosen pages hold, of four queries of every row but a chunk's last one, which some strategies choose by. Writing keys
and page means into the cache, which dense does too, is not timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from shapes import SHAPES
from structured import structured
from timing import Timing, machine, measure, show
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from keysift.attention import Strategy, make
from keysift.attention.ops import paged_attention
from keysift.attention.probe import take
from keysift.kvcache import CacheSpec, Context, PagedCache, Selection, Span
from keysift.kvcache.native.library import isa
from keysift.kvcache.selection import pairs

STRATEGIES: dict[str, dict[str, object]] = {
    "dense": {},
    "flexprefill 0.95": {"gamma": 0.95},
    "flexprefill 0.9": {"gamma": 0.9},
    "sampleattention 0.95": {"alpha": 0.95},
    "minference": {},
    "xattention 0.9": {"threshold": 0.9},
    "sift": {},
}
ROW = 64
Row = dict[str, object]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One layer of a prompt, cached, and its chunks as the strategies see them."""

    q: Tensor  # [T, Hq, D]
    k: Tensor  # [T, Hkv, D]
    v: Tensor
    contexts: list[Context]

    @classmethod
    def make(
        cls, shape: tuple[int, int, int], tokens: int, chunk: int, *, device: torch.device | str = "cpu", seed: int = 0
    ) -> Prompt:
        torch.manual_seed(seed)
        with torch.device(device):
            q, k, v = structured(tokens, *shape, torch.bfloat16)
        spec = CacheSpec(num_layers=1, num_kv_heads=shape[1], head_dim=shape[2], dtype=torch.bfloat16)
        cache = PagedCache(spec, spec.pages_for(tokens), max_sequences=1, max_len=tokens, device=device)
        sequence, contexts = cache.open(), []
        cache.reserve(sequence, tokens)
        for start in range(0, tokens, chunk):
            step = cache.prefill(Span(sequence, start, min(chunk, tokens - start)), ROW, max(tokens - start - chunk, 0))
            cache.append(0, k[start : start + chunk], v[start : start + chunk], step)
            contexts.append(cache.context(0, step))
        return cls(q, k, v, contexts)

    def chunks(self) -> Iterator[tuple[Tensor, Context]]:
        for context in self.contexts:
            (span,) = context.step.spans
            yield self.q[span.start : span.stop], context

    def choose(self, strategy: Strategy) -> list[Selection]:
        return [strategy.prefill(q, context) for q, context in self.chunks()]

    def attend(self, selections: list[Selection]) -> None:
        for (q, context), selection in zip(self.chunks(), selections, strict=True):
            frames, step = context.fetch(selection), context.step
            paged_attention(
                q, frames.k, frames.v, frames.table, selection.pages, step.starts,
                queries_per_row=ROW, scale=context.spec.softmax_scale,
            )  # fmt: skip

    def density(self, selections: list[Selection]) -> float:
        both = [pairs(c.step, s.counts()) for c, s in zip(self.contexts, selections, strict=True)]
        return float(sum(chosen.mean(-1).sum() for chosen, _ in both) / sum(possible.sum() for _, possible in both))

    def coverage(self, selections: list[Selection]) -> tuple[float, float]:
        """Least (of a probe of 4 queries and a head) and mean."""
        kept, within = [], torch.tensor([5, 21, 37, 53], device=self.q.device)
        for (q, context), selection in zip(self.chunks(), selections, strict=True):
            picks = torch.arange(context.step.num_rows - 1, device=q.device)[:, None] * ROW + within
            evidence = take(q, context, picks)
            mask = selection.mask(context.step.max_pages)
            kept.append(evidence.kept(mask.repeat_interleave(q.shape[1] // mask.shape[1], 1)))
        every = torch.cat(kept)
        return float(every.min()), float(every.mean())


def rows(shape: str, tokens: int, chunk: int, names: list[str], runs: int, with_torch: bool) -> Iterator[Row]:
    prompt = Prompt.make(SHAPES[shape], tokens, chunk)
    peer = torch_seconds(prompt, runs) if with_torch else None
    dense: Timing | None = None
    for name in names:
        strategy = make(name.split()[0], **STRATEGIES[name])
        selections = prompt.choose(strategy)
        chosen = measure(lambda strategy=strategy: prompt.choose(strategy), runs=runs)  # type: ignore[misc]
        attended = measure(lambda selections=selections: prompt.attend(selections), runs=runs)  # type: ignore[misc]
        dense = dense or attended
        density, (least, mean) = prompt.density(selections), prompt.coverage(selections)
        total = attended.seconds + (0.0 if name == "dense" else chosen.seconds)
        yield {
            "shape": shape, "tokens": tokens, "strategy": name, "density": density, "coverage": mean, "least": least,
            "choose_ms": 1e3 * (total - attended.seconds), "attend_ms": 1e3 * attended.seconds,
            "choose/dense": (total - attended.seconds) / dense.seconds,
            "attend/(density dense)": attended.seconds / dense.seconds / density,
            "dense/total": dense.seconds / total, "torch/total": peer.seconds / total if peer else None,
            "quiet": attended.quiet and dense.quiet and (peer is None or peer.quiet),
        }  # fmt: skip


def torch_seconds(prompt: Prompt, runs: int) -> Timing:
    q, k, v = (x.transpose(0, 1)[None].contiguous() for x in (prompt.q, prompt.k, prompt.v))
    return measure(lambda: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), runs=runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=[8192, 32768])
    parser.add_argument(
        "--chunk", type=int, default=1024, help="prompt tokens of one step, as the engine's prefill_chunk"
    )
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=list(STRATEGIES))
    parser.add_argument("--runs", type=int, default=3, help="undisturbed runs to take the median of")
    parser.add_argument("--no-torch", action="store_true", help="leave torch's SDPA out: it takes minutes at 32k")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    options = parser.parse_args()
    names = list(dict.fromkeys(["dense", *options.strategies]))
    results = (
        row
        for shape in options.shape
        for tokens in options.tokens
        for row in rows(shape, tokens, options.chunk, names, options.runs, not options.no_torch)
    )
    show({**machine(), "isa": isa(), "chunk": options.chunk}, results, as_json=options.json)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
