"""Queries, keys and values of the embedded model over a real text, as realistic input for indexes.

`python -m benchmarks.lib.captured FILE` writes them to a file, for `benchmarks.ops.index --captured FILE`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from keysift.attention import Strategy
from keysift.engine.measure.evaluation.reader import Reader
from keysift.kvcache import Context, Selection, Span

from . import cli
from .quality import Bench
from .texts import KINDS

LAYERS = (0, 4, 9, 14, 19, 24, 29)
"""First, last, and five between."""


@dataclass(frozen=True, slots=True)
class Captured:
    """Inputs of attention in some layers, after rotary embedding, fp32."""

    layers: tuple[int, ...]
    q: Tensor
    """[L, T, Hq, D]"""
    k: Tensor
    """[L, T, Hkv, D]"""
    v: Tensor | None = None
    """[L, T, Hkv, D]; None: it was not kept."""

    @classmethod
    def load(cls, file: Path) -> Captured:
        return cls(**torch.load(file))

    def only(self, places: Sequence[int] | None) -> Captured:
        """The layers at these places; None: all."""
        if places is None:
            return self
        layers, parts = tuple(self.layers[place] for place in places), (self.q, self.k, self.v)
        return Captured(layers, *(None if part is None else part[list(places)] for part in parts))  # type: ignore[arg-type]

    def save(self, file: Path) -> None:
        torch.save({"layers": self.layers, "q": self.q, "k": self.k, "v": self.v}, file)


@dataclass(frozen=True, slots=True, kw_only=True)
class Noted(Strategy):
    """Dense attention that keeps the queries of some layers."""

    queries: dict[int, list[Tensor]]

    def __post_init__(self) -> None:
        """It has no options to check."""

    def prefill(self, q: Tensor, context: Context) -> Selection:
        if context.layer in self.queries:
            self.queries[context.layer].append(q.float().clone())
        return context.all()


def capture(reader: Reader, tokens: Sequence[int], layers: tuple[int, ...] = LAYERS) -> Captured:
    """Prefill tokens [T] densely; queries as attention receives them, keys and values as the cache holds them."""
    queries: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    with reader.open([tokens], Noted(queries=queries, dense_below=0), 0) as (reading,):
        reader.read(reading)
        cache = reader.engine.cache
        step = cache.decode([Span(reading.handle, len(tokens) - 1, 1)])
        rows = [_cached(cache.context(layer, step), len(tokens)) for layer in layers]
    k, v = (torch.stack(parts) for parts in zip(*rows, strict=True))
    return Captured(layers, torch.stack([torch.cat(queries[layer]) for layer in layers]), k, v)


def _cached(context: Context, tokens: int) -> tuple[Tensor, Tensor]:
    """Keys and values [T, Hkv, D] fp32 of a sequence."""
    frames = context.fetch(context.all())
    heads = torch.arange(frames.table.shape[1])[:, None]
    pages = (x[frames.table[0].long(), heads] for x in (frames.k, frames.v))  # [Hkv, F, S, D]
    k, v = (x.flatten(1, 2)[:, :tokens].transpose(0, 1).float() for x in pages)
    return k, v


def of_text(kind: str, tokens: int) -> Captured:
    """The embedded model in fp32 over the first tokens of a text, with the needles of `lib/quality.py` in it."""
    bench = Bench.open(chunk=1024)
    return capture(bench.reader, bench.haystack(kind, tokens))


def main() -> None:
    parser = cli.parser("benchmarks.lib.captured", __doc__)
    parser.add_argument("file", type=Path, help="output file, 27 kB a token")
    parser.add_argument("--text", default="manual", choices=KINDS)
    parser.add_argument("--tokens", type=int, default=8000)
    options = parser.parse_args()
    of_text(options.text, options.tokens).save(options.file)


if __name__ == "__main__":
    main()
