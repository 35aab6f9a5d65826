"""A prompt's chunk that reads everything: the op over pages against kernels that take keys and values in one piece.

The choices of `--dense-kernel`, for one layer and random numbers, on whichever device: the last chunk of prompts
of these lengths, whose pages lie apart. `own_ms` has the copy in it, which `copy_ms` states alone; a kernel that cannot
run here has no rows.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from keysift.attention import DenseKernel
from keysift.attention.attend import read
from keysift.attention.contiguous import contiguous_attention, gather, obstacle
from keysift.engine.calibration.calibration import running_backend
from keysift.kvcache import CacheSpec, Context, PagedCache, Span

from ..lib import cli
from ..lib.shapes import DTYPES, SHAPES
from ..lib.timing import Row, Timing, machine, measure, show

ROW = 64
OTHERS: tuple[DenseKernel, ...] = ("sdpa", "flash-attn")


@dataclass(frozen=True, slots=True)
class Chunk:
    """The last queries [T, Hq, D] of a prompt, and the cache that they look into."""

    q: Tensor
    context: Context

    @classmethod
    def make(cls, shape: str, dtype: str, tokens: int, chunk: int, device: torch.device) -> Chunk:
        heads, kv_heads, dim = SHAPES[shape]
        spec = CacheSpec(num_layers=1, num_kv_heads=kv_heads, head_dim=dim, dtype=DTYPES[dtype], code_bits=None)
        cache = PagedCache(spec, 2 * spec.pages_for(tokens), max_sequences=2, max_len=tokens, device=device)
        sequence, other = cache.open(), cache.open()
        for stop in range(spec.page_size, tokens + spec.page_size, spec.page_size):
            for each in (sequence, other):
                cache.reserve(each, min(stop, tokens))
        k, v = (torch.randn(tokens, kv_heads, dim, dtype=spec.dtype, device=device) for _ in range(2))
        cache.append(0, k, v, cache.prefill(Span(sequence, 0, tokens), ROW))
        length = min(chunk, tokens)
        step = cache.prefill(Span(sequence, tokens - length, length), ROW)
        q = torch.randn(length, heads, dim, dtype=spec.dtype, device=device)
        return cls(q, cache.context(0, step))

    def attend(self, kernel: DenseKernel) -> Tensor:
        """[T, Hq, D]"""
        if kernel == "paged":
            return read(self.q, self.context, self.context.all())[0]
        return contiguous_attention(self.q, self.context, kernel)

    def copy(self) -> None:
        """The copy that `contiguous_attention` begins with."""
        gather(self.context)


def rows(shape: str, dtype: str, tokens: int, chunk: int, device: torch.device, runs: int) -> Iterator[Row]:
    case = Chunk.make(shape, dtype, tokens, chunk, device)
    timed = functools.partial(time, device=device, runs=runs)
    paged, copied, expected = timed(lambda: case.attend("paged")), timed(case.copy), case.attend("paged")
    for kernel in OTHERS:
        if obstacle(kernel, case.context.spec, device) is not None:
            continue
        own = timed(lambda kernel=kernel: case.attend(kernel))  # type: ignore[misc]
        yield {
            "shape": shape, "dtype": dtype, "tokens": tokens, "chunk": len(case.q), "kernel": kernel,
            "paged_ms": 1e3 * paged.seconds, "own_ms": 1e3 * own.seconds, "copy_ms": 1e3 * copied.seconds,
            "paged/own": paged.seconds / own.seconds,
            "difference": float((case.attend(kernel) - expected).abs().max()),
            "quiet": paged.quiet and copied.quiet and own.quiet,
        }  # fmt: skip


def time(work: Callable[[], object], *, device: torch.device, runs: int) -> Timing:
    def done() -> None:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return measure(done, runs=runs)


def main() -> None:
    parser = cli.parser("benchmarks.ops.dense_kernel", __doc__)
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--dtype", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1024, 4096, 8192, 32768])
    parser.add_argument("--chunk", type=int, default=1024, help="prompt tokens of one step, as the engine's")
    parser.add_argument("--runs", type=int, default=3, help="undisturbed runs to take the median of")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    options = parser.parse_args()
    gpu = options.device.type == "cuda"
    if gpu:
        torch.set_num_threads(1)  # the waiting one, whose share of its core measures quiet
    torch.manual_seed(0)
    cases = itertools.product(options.shape, options.dtype, options.tokens)
    results = (row for case in cases for row in rows(*case, options.chunk, options.device, options.runs))
    name = torch.cuda.get_device_name(options.device) if gpu else "cpu"
    about = {**machine(), "device": name, "paged": running_backend("auto", options.device)}
    show(about, results, as_json=options.json)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
