"""Queries, keys and values of the embedded model over a real text: what an index meets, and random numbers hide.

`python -m benchmarks.lib.captured FILE` writes them to a file, for `benchmarks.ops.index --captured FILE`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from keysift.attention import Attend, Dense, bind
from keysift.kvcache import Span

from . import cli
from .quality import Bench
from .texts import KINDS

LAYERS = (0, 4, 9, 14, 19, 24, 29)
"""First, last, and five between."""


@dataclass(frozen=True, slots=True)
class Captured:
    """What attention got in some layers, after rotary embedding, fp32."""

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


@torch.inference_mode()
def capture(bench: Bench, tokens: Tensor, layers: tuple[int, ...] = LAYERS) -> Captured:
    """Prefill tokens [T] under dense attention, chunk by chunk, and note what these layers are given."""
    notes: dict[int, list[tuple[Tensor, ...]]] = {layer: [] for layer in layers}
    cache, sequence = bench.sequence(len(tokens))
    for start in range(0, len(tokens), bench.chunk):
        span = Span(sequence, start, min(bench.chunk, len(tokens) - start))
        step = cache.prefill(span, bench.row)
        attend = noting(bind(Dense(), cache, step), notes)
        bench.model.forward(tokens[span.start : span.stop], step.positions, torch.tensor([0]), attend)
    return Captured(layers, *(torch.stack([_joined(notes[layer], part) for layer in layers]) for part in range(3)))


def noting(attend: Attend, notes: dict[int, list[tuple[Tensor, ...]]]) -> Attend:
    """`attend`, which appends what it is given to the notes of the layers that have some."""

    def noted(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if layer in notes:
            notes[layer].append((q.float().clone(), k.float().clone(), v.float().clone()))
        return attend(layer, q, k, v)

    return noted


def _joined(chunks: list[tuple[Tensor, ...]], part: int) -> Tensor:
    return torch.cat([chunk[part] for chunk in chunks])


def of_text(kind: str, tokens: int) -> Captured:
    """The embedded model in fp32 over the first tokens of a text, with the needles of `lib/quality.py` in it."""
    bench = Bench.open(chunk=1024)
    return capture(bench, torch.tensor(bench.haystack(kind, tokens)))


def main() -> None:
    parser = cli.parser("benchmarks.lib.captured", __doc__)
    parser.add_argument("file", type=Path, help="where to write, 27 kB a token")
    parser.add_argument("--text", default="manual", choices=KINDS)
    parser.add_argument("--tokens", type=int, default=8000)
    options = parser.parse_args()
    of_text(options.text, options.tokens).save(options.file)


if __name__ == "__main__":
    main()
