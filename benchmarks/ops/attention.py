"""Paged attention and decode's linear layers on the CPU: the native twins against torch, both in one run."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import linear as torch_linear
from torch.nn.functional import scaled_dot_product_attention

from keysift.attention.ops.paged_attention.native import paged_attention
from keysift.engine.model.cpu.native import linear
from keysift.kvcache.native.library import isa

from ..lib import cli
from ..lib.shapes import COLD_BYTES, DTYPES, SHAPES
from ..lib.timing import machine, measure, show

T = TypeVar("T")

PAGE, QUERIES, CHUNK = 16, 64, 1024


@dataclass(frozen=True, slots=True)
class Cache:
    """Keys and values of one layer: for torch in a row, for the kernel in shuffled pages."""

    k: Tensor  # [1, Hkv, T, D]
    v: Tensor
    paged_k: Tensor  # [N, Hkv, S, D]
    paged_v: Tensor
    frames: Tensor  # [F] int32

    @classmethod
    def random(cls, tokens: int, num_kv_heads: int, dim: int, dtype: torch.dtype) -> Cache:
        k, v = (torch.randn(1, num_kv_heads, tokens, dim).to(dtype) for _ in range(2))
        frames = torch.randperm(tokens // PAGE)
        paged_k, paged_v = (_paged(x, frames) for x in (k, v))
        return cls(k, v, paged_k, paged_v, frames.int())

    def attend(self, q: Tensor, pages: Tensor, starts: Tensor, queries_per_row: int) -> object:
        frames = self.frames.expand(starts.shape[0], self.k.shape[1], -1)
        scale = q.shape[-1] ** -0.5
        kwargs = {"queries_per_row": queries_per_row, "scale": scale}
        return paged_attention(q, self.paged_k, self.paged_v, frames, pages, starts, **kwargs)

    def prefill(self, q: Tensor, pages: Tensor, starts: Tensor) -> None:
        for token in range(0, q.shape[0], CHUNK):
            rows = slice(token // QUERIES, (token + CHUNK) // QUERIES)
            self.attend(q[token : token + CHUNK], pages[rows], starts[rows], QUERIES)


def _paged(x: Tensor, frames: Tensor) -> Tensor:
    _, heads, tokens, dim = x.shape
    paged = torch.empty(tokens // PAGE, heads, PAGE, dim, dtype=x.dtype)
    paged[frames] = x.view(heads, -1, PAGE, dim).transpose(0, 1)
    return paged


def choose_pages(tokens: int, num_kv_heads: int, density: float) -> tuple[Tensor, float]:
    """Random pages of each row and head, with the first and the row's own -> [R, Hkv, P], their real share."""
    rows, count = tokens // QUERIES, tokens // PAGE
    own = torch.arange(rows)[:, None, None] * (QUERIES // PAGE)
    page = torch.arange(count).expand(rows, num_kv_heads, count)
    causal = page < own + QUERIES // PAGE
    fixed = causal & ((page >= own) | (page == 0))
    share = (density * causal.sum() - fixed.sum()) / (causal & ~fixed).sum()
    chosen = fixed | (causal & (torch.rand(page.shape) < share))
    order = torch.where(chosen, page, count).sort(-1).values[..., : int(chosen.sum(-1).max())]
    return torch.where(order < count, order, -1).int(), float(chosen.sum() / causal.sum())


def prefill(shape: str, dtype: str, tokens: int) -> Iterator[dict[str, object]]:
    """One layer's attention of a prompt, in chunks as it is served, over falling densities; torch gets it whole."""
    heads, num_kv_heads, dim = SHAPES[shape]
    cache = Cache.random(tokens, num_kv_heads, dim, DTYPES[dtype])
    q = torch.randn(tokens, heads, dim).to(DTYPES[dtype])
    packed = q.transpose(0, 1)[None].contiguous()
    starts = torch.arange(0, tokens, QUERIES, dtype=torch.int32)
    peer = measure(
        lambda: scaled_dot_product_attention(packed, cache.k, cache.v, is_causal=True, enable_gqa=True), runs=3
    )
    dense = 0.0
    for target in (1.0, 0.5, 0.3, 0.2, 0.1):
        pages, density = choose_pages(tokens, num_kv_heads, target)
        own = measure(lambda pages=pages: cache.prefill(q, pages, starts))  # type: ignore[misc]
        dense = dense or own.seconds
        gflops = 2.0 * tokens * tokens * heads * dim * density / own.seconds / 1e9
        yield {
            "what": "prefill", "shape": shape, "dtype": dtype, "size": str(tokens), "density": round(density, 3),
            "torch_ms": peer.seconds * 1e3, "native_ms": own.seconds * 1e3, "ratio": peer.seconds / own.seconds,
            "rate": f"{gflops:.0f} GFLOP/s", "time/density": own.seconds / dense / density,
            "quiet": peer.quiet and own.quiet,
        }  # fmt: skip


def decode(shape: str, dtype: str, tokens: int) -> Iterator[dict[str, object]]:
    """One token against a long cache that lies in no CPU cache."""
    heads, num_kv_heads, dim = SHAPES[shape]
    size = 2 * tokens * num_kv_heads * dim * DTYPES[dtype].itemsize
    caches = [Cache.random(tokens, num_kv_heads, dim, DTYPES[dtype]) for _ in range(COLD_BYTES // size + 1)]
    q = torch.randn(1, heads, dim).to(DTYPES[dtype])
    pages = torch.arange(tokens // PAGE, dtype=torch.int32).expand(1, num_kv_heads, -1)
    starts = torch.tensor([tokens - 1], dtype=torch.int32)

    def torch_attend(cache: Cache) -> object:
        return scaled_dot_product_attention(q[:, :, None], cache.k, cache.v, enable_gqa=True)

    peer = measure(rotate(torch_attend, caches), runs=3)
    own = measure(rotate(lambda cache: cache.attend(q, pages, starts, 1), caches))
    yield {
        "what": "decode", "shape": shape, "dtype": dtype, "size": str(tokens), "density": 1.0,
        "torch_ms": peer.seconds * 1e3, "native_ms": own.seconds * 1e3, "ratio": peer.seconds / own.seconds,
        "rate": f"{size / own.seconds / 1e9:.1f} GB/s", "time/density": 1.0, "quiet": peer.quiet and own.quiet,
    }  # fmt: skip


def linears(dtype: str, inputs: int, outputs: int) -> Iterator[dict[str, object]]:
    """One token through a linear layer whose weights lie in no CPU cache."""
    size = inputs * outputs * DTYPES[dtype].itemsize
    weights = [torch.randn(outputs, inputs).to(DTYPES[dtype]) for _ in range(COLD_BYTES // size + 1)]
    x = torch.randn(1, inputs).to(DTYPES[dtype])
    peer = measure(rotate(lambda weight: torch_linear(x, weight), weights))
    own = measure(rotate(lambda weight: linear(x, weight), weights))
    yield {
        "what": "linear", "shape": f"{inputs}x{outputs}", "dtype": dtype, "size": "1", "density": 1.0,
        "torch_ms": peer.seconds * 1e3, "native_ms": own.seconds * 1e3, "ratio": peer.seconds / own.seconds,
        "rate": f"{size / own.seconds / 1e9:.1f} GB/s", "time/density": 1.0, "quiet": peer.quiet and own.quiet,
    }  # fmt: skip


def rotate(work: Callable[[T], object], over: list[T]) -> Callable[[], object]:
    """Work on the next of `over` at each call."""
    turn = itertools.cycle(over)
    return lambda: work(next(turn))


def rows(what: list[str], shapes: list[str], dtypes: list[str]) -> Iterator[dict[str, object]]:
    for shape, dtype in itertools.product(shapes, dtypes):
        if "prefill" in what:
            yield from itertools.chain(*(prefill(shape, dtype, tokens) for tokens in (4096, 8192)))
        if "decode" in what:
            yield from itertools.chain(*(decode(shape, dtype, tokens) for tokens in (8192, 32768)))
    if "linear" in what:
        for dtype, (inputs, outputs) in itertools.product(dtypes, ((576, 576), (576, 1536), (1536, 576), (576, 49152))):
            yield from linears(dtype, inputs, outputs)


def main() -> None:
    parser = cli.parser("benchmarks.ops.attention", __doc__)
    parser.add_argument(
        "--what", nargs="+", default=["prefill", "decode", "linear"], choices=["prefill", "decode", "linear"]
    )
    parser.add_argument("--shape", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--dtype", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    args = parser.parse_args()
    torch.manual_seed(0)
    show({**machine(), "isa": isa()}, rows(args.what, args.shape, args.dtype), as_json=args.json)


if __name__ == "__main__":
    main()
