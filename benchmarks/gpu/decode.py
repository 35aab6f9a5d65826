"""Attention of one layer over long caches, one new token of each sequence: torch's best dense, ours dense and sparse.

Our calls do all that the engine does in a layer: write the token's key and value, choose and attend.
The token that is timed is the second after the prompt, so that `nosa` has a history.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from keysift.attention import Dense, Strategy, bind, make

from ..lib.layer import Layer, Source
from .clock import Clock, gb_per_s
from .rows import Aim, Row, Settings, attempt, best, fallback, free, guarded, ratio

BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
STRATEGIES: dict[str, dict[str, object]] = {
    "quest": {"dense_layers": 0},
    "retrieval": {"epsilon": 0.0},
    "nosa": {},
}
"""Options by strategy; an `epsilon` of 0 reads the whole budget, except for `nosa`, where it means something else."""
OF_COPY, FASTER = 0.8, 8.0
"""Aims: share of the copy bandwidth of dense decoding, and how many times faster sparse decoding is at 128k."""
FAR, MANY = 1 << 17, 16
KINDS = {"": "", "graph ": " from a CUDA graph"}
PAGE, NEW = 16, 2
SPARE = 0.85
"""Greatest share of the free memory that the caches of a row may take."""


@dataclass(frozen=True, slots=True)
class Case:
    """Sequences that decode together, the source of their keys, and how fast memory can be copied."""

    settings: Settings
    source: Source
    context: int
    batch: int
    shared: bool
    copied: float

    @property
    def fixed(self) -> Row:
        return {"batch": self.batch, "context": self.context, "shared": self.shared}


def rows(settings: Settings) -> Iterator[Row]:
    copied = settings.clock.copy_rate()
    yield {"what": "copy within the device", "GB/s": copied}
    for context in settings.contexts:
        yield from guarded({"what": "all of it", "context": context}, _context(settings, context, copied))
        free()


def _context(settings: Settings, context: int, copied: float) -> Iterator[Row]:
    torch.manual_seed(settings.seed)
    with torch.device(settings.device):
        source = Source.make(settings.shape, context)
    for batch in settings.batches:
        case = Case(settings, source, context, batch, shared(settings, context, batch), copied)
        yield from guarded({"what": "all of it", **case.fixed}, _case(case))
        free()


def shared(settings: Settings, context: int, batch: int) -> bool:
    """True if the sequences' keys and values, in pages and contiguous for torch, exceed the device's memory.

    They share the pages of one then, and rows record that, as caches speed up both sides.
    """
    if settings.device.type != "cuda" or batch == 1:
        return False
    _, kv_heads, dim = settings.shape
    size = 2 * context * kv_heads * dim * 2
    return size * batch * 2.3 > SPARE * torch.cuda.mem_get_info(settings.device)[0]


def _case(case: Case) -> Iterator[Row]:
    settings = case.settings
    strategies = {"dense": Dense()} | {
        f"{name} {budget}": make(name, budget=budget, **options)
        for budget, (name, options) in itertools.product(settings.budgets, STRATEGIES.items())
    }
    chunk = 16384 if settings.device.type == "cuda" else 1024
    first = Layer.make(
        case.source, torch.bfloat16, case.context - PAGE, strategies.values(),
        batch=case.batch, shared=case.shared, new=NEW, chunk=chunk,
    )  # fmt: skip
    second = first.after(case.source)
    yield attempt({"what": "torch sdpa", **case.fixed}, lambda: _torch(case, second))
    free()
    for name, strategy in strategies.items():
        work = partial(_own, case, first, second, strategy)
        yield attempt({"what": name, **case.fixed}, work)


def _own(case: Case, first: Layer, second: Layer, strategy: Strategy) -> Row:
    clock, device = case.settings.clock, case.settings.device
    _whole(first, strategy)()
    whole, context = _whole(second, strategy), second.context(strategy)
    seconds = clock.seconds(whole, cold=True)
    selection = strategy.decode(second.q, context)
    choose = None if selection.complete else clock.seconds(lambda: strategy.decode(second.q, context), cold=True)
    attend = clock.seconds(lambda: second.attend(selection), cold=True)
    lists = second.k.shape[1] // selection.pages.shape[1]
    size = int(selection.counts().sum()) * lists * context.spec.read_bytes
    row = _rates(size, seconds, case.copied) | {
        "choose_us": None if choose is None else 1e6 * choose, "attend_us": 1e6 * attend,
        "attend GB/s": gb_per_s(size, attend), "density": float(selection.density(second.step).mean()),
        "reference": fallback(whole, device),
    }  # fmt: skip
    if device.type != "cuda":
        return row
    graph = attempt({}, lambda: _rates(size, clock.captured(whole, cold=True), case.copied))
    return row | {f"graph {name}": graph[name] for name in ("us", "of copy", "error") if name in graph}


def _whole(layer: Layer, strategy: Strategy) -> Callable[[], object]:
    attend = bind(strategy, layer.cache, layer.step)
    return lambda: attend(0, layer.q, layer.k, layer.v)


def _torch(case: Case, layer: Layer) -> Row:
    """The fastest of torch's kernels, each in two layouts: heads of a group by `enable_gqa` or as queries."""
    k, v = _in_a_row(layer, case.shared)
    single = layer.q[:, :, None]  # [B, Hq, 1, D]
    grouped = torch.unflatten(layer.q, 1, (k.shape[1], -1))  # [B, Hkv, G, D]
    ways: dict[str, Callable[[], object]] = {
        "by name": lambda: scaled_dot_product_attention(single, k, v, enable_gqa=True),
        "as queries": lambda: scaled_dot_product_attention(grouped, k, v),
    }
    tried = [
        attempt({"how": f"{name}, heads {way}"}, partial(_forced, case.settings.clock, backend, work))
        for (name, backend), (way, work) in itertools.product(BACKENDS.items(), ways.items())
    ]
    if (fastest := best(tried, "seconds")) is None:
        raise RuntimeError("; ".join(f"{row['how']}: {row['error']}" for row in tried))
    size = 2 * len(layer.q) * k[0].numel() * k.element_size()
    return {**_rates(size, fastest["seconds"], case.copied), "density": 1.0, "how": fastest["how"]}


def _forced(clock: Clock, backend: SDPBackend, work: Callable[[], object]) -> Row:
    with sdpa_kernel([backend]):
        return {"seconds": clock.seconds(work, cold=True)}


def _in_a_row(layer: Layer, shared: bool) -> tuple[Tensor, Tensor]:
    """Keys and values [B, Hkv, T, D] of all sequences; those of shared pages are one sequence's, seen B times."""
    tokens, batch = layer.step.spans[0].stop, len(layer.q)
    copies = []
    for row in range(1 if shared else batch):
        for which, x in enumerate(layer.in_a_row(row)):
            if row == 0:
                copies.append(x.new_empty(1 if shared else batch, len(x), tokens, x.shape[-1]))
            copies[which][row] = x.flatten(1, 2)[:, :tokens]
    k, v = (x.expand(batch, -1, -1, -1) for x in copies)
    return k, v


def _rates(size: int, seconds: float, copied: float) -> Row:
    """Time and bandwidth of a call that reads `size` bytes of keys and values, without those read to choose."""
    rate = gb_per_s(size, seconds)
    return {"us": 1e6 * seconds, "GB/s": rate, "of copy": rate / copied}


def aims(rows: Sequence[Row]) -> list[Aim]:
    """Aims for a layer as the engine runs it, and replayed from a CUDA graph, without host time."""
    sparse = dict.fromkeys((row["what"], row["batch"]) for row in rows if _sparse(row))
    return [aim for kind, words in KINDS.items() for aim in _aims(rows, sparse, kind, words)]


def _aims(rows: Sequence[Row], sparse: Iterable[tuple[str, int]], kind: str, words: str) -> Iterator[Aim]:
    whole = [row[f"{kind}of copy"] for row in rows if f"{kind}of copy" in row and _is_dense(row)]
    yield Aim(f"dense{words} at batch {MANY}, best share of the copy bandwidth", max(whole, default=None), OF_COPY)
    for name, batch in sparse:
        own, dense = (best(rows, f"{kind}us", what=what, batch=batch, context=FAR) for what in (name, "dense"))
        faster = ratio(dense, own, f"{kind}us")
        yield Aim(f"{name}{words} at 128k, batch {batch}, times faster than our dense", faster, FASTER)


def _is_dense(row: Row) -> bool:
    return row["what"] == "dense" and row["batch"] == MANY and not row["shared"]


def _sparse(row: Row) -> bool:
    return row["what"].split()[0] in STRATEGIES and "batch" in row
