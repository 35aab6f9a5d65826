"""Errors of every op with a GPU kernel against float64 (few codes: fp32), and their limits.

The problems are random sequences of several lengths in scattered frames; unused memory is NaN. Results
that are lists or copies must be equal; errors are relative to numbers above 1.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from keysift.attention.ops.column_scores import column_scores
from keysift.attention.ops.paged_attention import paged_attention
from keysift.attention.ops.steady_pages import SteadyPages, steady_pages
from keysift.attention.ops.top_pages import TopPages, top_pages
from keysift.kvcache.ops import use_backend
from keysift.kvcache.ops.admit import Residents, admit
from keysift.kvcache.ops.encode import Codes, decode, encode
from keysift.kvcache.ops.fetch import fetch
from keysift.kvcache.ops.page_masses import code_masses, page_bounds, page_masses
from keysift.kvcache.ops.store import store
from keysift.kvcache.ops.summarize import summarize

from .oracles import SIZE, Pages, attention, bounds, code_scores, columns, empty_codes, exact_masses, summary
from .rows import Aim, Row, Settings, fallback, guarded

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FINE = 2e-4
"""Limit for results that are accumulated and kept in fp32."""
COARSE = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 2e-4}
"""Limits for results in the cache's dtype, or multiplied in it."""
Found = tuple[float, float]
"""The worst error and its limit."""
Check = Callable[[Pages], Found]


def rows(settings: Settings) -> Iterator[Row]:
    for name, check in CHECKS.items():
        for dtype in DTYPES:
            fixed = {"what": name, "dtype": str(dtype).removeprefix("torch."), "passed": False}
            yield from guarded(fixed, _checked(fixed, check, settings, dtype))


def _checked(fixed: Row, check: Check, settings: Settings, dtype: torch.dtype) -> Iterator[Row]:
    torch.manual_seed(settings.seed)
    lengths = (70, 3, 48, 130) if settings.small else (4100, 3, 1040, 2048)
    pages = Pages.make(settings.shape, lengths, dtype, settings.device)
    error, limit = check(pages)
    without = fallback(partial(check, pages), settings.device)
    yield {**fixed, "worst": error, "limit": limit, "passed": error <= limit, "reference": without}


def aims(rows: Sequence[Row]) -> list[Aim]:
    passed = sum(bool(row.get("passed")) for row in rows) / max(len(rows), 1)
    return [Aim("share of the checks that passed", passed, 1.0)]


def worst(found: Tensor, expected: Tensor) -> float:
    """The greatest difference, relative where numbers are above 1; infinite where one is NaN or infinite alone."""
    found, expected = found.double(), expected.double()
    same = found == expected  # infinities that agree
    gap = (found - expected).abs() / expected.abs().clamp(min=1.0)
    gap = gap.masked_fill(same, 0.0).nan_to_num(torch.inf, posinf=torch.inf)
    return float(gap.max()) if gap.numel() else 0.0


def check_decode(pages: Pages, window: int = 0) -> Found:
    rows = Rows(range(len(pages.q)), pages.lasts, pages.lasts, 1)
    return _attend(pages, pages.q, rows, pages.k.shape[1], window)


def check_prefill(pages: Pages, each: bool = False, window: int = 0) -> Found:
    """The end of the longest sequence, in rows of 64 queries of which the last is short; lists of each query head."""
    length, row, device = int(pages.lengths.max()), int(pages.lengths.argmax()), pages.q.device
    starts = torch.arange(max(length - 200, 0) // SIZE * SIZE, length, 64, dtype=torch.int32, device=device)
    tokens = length - int(starts[0])
    q = torch.randn(tokens, *pages.q.shape[1:], device=device).to(pages.q.dtype)
    rows = Rows([row] * len(starts), starts, (starts + 63).clamp(max=length - 1), 64)
    return _attend(pages, q, rows, q.shape[1] if each else pages.k.shape[1], window)


class Rows(NamedTuple):
    """Their sequences, the positions of their first and last queries, and how many queries a full one has."""

    sequences: Sequence[int]
    starts: Tensor
    lasts: Tensor
    width: int


def _attend(pages: Pages, q: Tensor, rows: Rows, heads: int, window: int) -> Found:
    lists = pages.listed(rows.lasts, rows.starts, heads)
    given = pages.k, pages.v, pages.frames[list(rows.sequences)], lists, rows.starts
    out, lse = paged_attention(q, *given, queries_per_row=rows.width, scale=pages.scale, window=window)
    expected, expected_lse = attention(q, pages, rows.sequences, lists, rows.starts, rows.width, window)
    return max(worst(out, expected), worst(lse, expected_lse)), COARSE[q.dtype]


def check_columns(pages: Pages) -> Found:
    """Four queries of each sequence, of which one is not there; errors are of shares of 1."""
    last = pages.lengths - 1
    positions = torch.stack([torch.full_like(last, -1), last // 3, last // 2, last], 1).flatten().int()
    q = torch.randn(len(positions), *pages.q.shape[1:], device=pages.q.device).to(pages.q.dtype)
    found = column_scores(q, pages.k, pages.frames, positions, queries_per_probe=4, scale=pages.scale, bands=True)
    expected = columns(q, pages, positions, 4)
    assert found.bands is not None
    return max(worst(*both) for both in zip((found.mass, found.peak, found.bands), expected, strict=True)), FINE


def check_masses(pages: Pages) -> Found:
    """Error of the shares of page masses."""
    found = page_masses(pages.q, pages.k, pages.frames, pages.lasts, scale=pages.scale)
    return worst(found.double().log_softmax(-1), exact_masses(pages).log_softmax(-1)), FINE


def check_codes(pages: Pages) -> Found:
    _, codes = pages.described()
    work = partial(code_masses, pages.q, pages.k, pages.own, codes, pages.frames, pages.lasts, scale=pages.scale)
    found = work(candidates=pages.frames.shape[2])
    return worst(found, code_scores(pages, codes)), COARSE[pages.q.dtype]


def check_few_codes(pages: Pages) -> Found:
    """Against the reference in fp32: pages of another mass, as a share of the candidates; some may be nearly tied."""
    _, codes = pages.described()
    work = partial(code_masses, pages.q, pages.k, pages.own, codes, pages.frames, pages.lasts, scale=pages.scale)
    found = work(candidates=4)
    with use_backend("reference"):
        expected = work(candidates=4)
    near = COARSE[pages.q.dtype]
    apart = ~torch.isclose(found, expected, rtol=near, atol=near)  # infinities that agree are near, NaN never is
    return float(apart.sum()) / (4 * pages.q.shape[0] * pages.q.shape[1]), 0.1


def check_many_codes(pages: Pages) -> Found:
    """As few codes, among more pages than one program ranks."""
    many = Pages.make((2, 1, 64), (8200 * SIZE, 40), pages.q.dtype, pages.q.device)
    return check_few_codes(many)


def check_bounds(pages: Pages) -> Found:
    summaries, _ = pages.described()
    found = page_bounds(pages.q, pages.k, pages.own, summaries, pages.frames, pages.lasts, scale=pages.scale)
    return worst(found, bounds(pages, summaries)), FINE


def check_top_pages(pages: Pages, times: int = 1) -> Found:
    """Share of lists that differ from those in float64, and the error of the mass that they keep.

    The problem has `times` as many pages.
    """
    masses = torch.randn(*pages.q.shape[:2], pages.frames.shape[2] * times, device=pages.q.device) * 3
    lasts = pages.lasts // SIZE * times
    given: dict[str, Any] = {"heads": pages.k.shape[1], "sinks": 1, "window": 2, "budget": 16}
    errors = []
    for epsilon in (0.0, 0.1):
        zones = (lasts - 1).clamp(min=0), lasts
        found = top_pages(masses, *zones, epsilon=epsilon, **given)
        expected = TopPages(*top_pages.__wrapped__(masses.double(), *zones, epsilon=epsilon, **given))  # type: ignore[attr-defined]
        wrong = float((found.pages != expected.pages).any(-1).double().mean())
        errors.append(max(wrong, worst(found.kept, expected.kept)))
    return max(errors), FINE


def check_steady_pages(pages: Pages, times: int = 1) -> Found:
    """Share of lists that differ from the reference's, and the error of the other results.

    Three tokens, each with the history of the one before; the first has none. The problem has `times` as many pages.
    """
    (rows, query_heads), lasts = pages.q.shape[:2], pages.lasts // SIZE * times
    lists = (rows, heads := pages.k.shape[1], pages.frames.shape[2] * times)
    device = lasts.device
    options: dict[str, Any] = {"heads": heads, "sinks": 1, "window": 2, "budget": 16, "queried": 8, "most": 2}
    options |= {"factor": 1.25, "keep": 0.9, "epsilon": 0.02}
    known, read = torch.zeros(rows, device=device).bool(), torch.zeros(lists, device=device).bool()
    averages = torch.zeros(lists, device=device)
    masses, errors = torch.randn(rows, query_heads, lists[2], device=device) * 3, []
    for _ in range(3):
        given = masses, (lasts - 1).clamp(min=0), lasts, known, read, averages
        found = steady_pages(*given, **options)
        expected = SteadyPages(*steady_pages.__wrapped__(*given, **options))  # type: ignore[attr-defined]
        named = [
            (getattr(found, name), getattr(expected, name)) for name in ("pages", "refused", "read", "bound_exceeded")
        ]
        errors += [float((one != other).reshape(rows, heads, -1).any(-1).double().mean()) for one, other in named]
        values = [(getattr(found, name), getattr(expected, name)) for name in ("kept", "averages", "overlap")]
        errors += [worst(one.nan_to_num(-1.0), other.nan_to_num(-1.0)) for one, other in values]
        known, read, averages = torch.ones_like(known), expected.read, expected.averages
        masses = masses + torch.randn_like(masses)
    return max(errors), FINE


def check_store(pages: Pages) -> Found:
    """Error of the written slots; all others must be unchanged."""
    cache_k, cache_v, tokens = pages.k.clone(), pages.v.clone(), 37
    slots = torch.randperm(len(cache_k) * SIZE, device=cache_k.device)[:tokens]
    k, v = (torch.randn(tokens, *pages.k.shape[1::2], device=slots.device).to(pages.k.dtype) for _ in range(2))
    store(cache_k, cache_v, k, v, slots)
    wrong = 0.0
    for cache, before, new in ((cache_k, pages.k, k), (cache_v, pages.v, v)):
        expected = before.transpose(1, 2).flatten(0, 1)  # [N * S, Hkv, D]
        expected = expected.index_copy(0, slots, new)
        wrong = max(wrong, worst(cache.transpose(1, 2).flatten(0, 1).nan_to_num(7.0), expected.nan_to_num(7.0)))
    return wrong, 0.0


def check_summarize(pages: Pages) -> Found:
    summaries = torch.full((len(pages.k), pages.k.shape[1], 4, pages.k.shape[3]), torch.nan, device=pages.k.device)
    summaries = summaries.to(pages.k.dtype)
    summarize(summaries, pages.k, pages.v, pages.full)
    return worst(summaries[pages.full], summary(pages)), COARSE[pages.k.dtype] / 2


def check_encode(pages: Pages) -> Found:
    """Error of decoded keys, as a share of the error that rounding of cells and bounds allows."""
    summaries, _ = pages.described()
    codes, full = empty_codes(pages.k), pages.full
    encode(pages.k, summaries, full, codes)
    here = Codes(*(part[full] for part in codes))
    gap = (decode(here).double() - pages.k[full].double()).abs()  # [n, Hkv, S, D]
    half = here.bounds[..., 1, :].double() * here.scales[..., 1:].double()
    allowed = half / 2**here.bits + here.scales.double().sum(-1, keepdim=True) / 2  # [n, Hkv, D]
    return float((gap / (allowed[:, :, None] + 1e-6)).max()), 1.001


def check_admit(pages: Pages) -> Found:
    """Share of list and table entries that differ from the reference's: three tokens and a prefetch in a small pool."""
    heads, count, device = pages.k.shape[1], len(pages.k), pages.k.device
    empty = partial(torch.full, fill_value=-1, dtype=torch.int32, device=device)
    ours, theirs = (Residents(empty((heads, count)), *empty((2, heads, 24)).unbind()) for _ in range(2))
    errors = []
    for now, before in ((2, 2), (4, 4), (5, 2), (6, 6)):
        listed = pages.listed(pages.lasts, pages.lasts, heads)
        found = admit(pages.frames, listed, ours, now=now, before=before)
        expected = admit.__wrapped__(pages.frames, listed, theirs, now=now, before=before)  # type: ignore[attr-defined]
        tables = (part.table.gather(2, listed.clamp(min=0).long()).where(listed >= 0, -1) for part in (found, expected))
        pairs = [*zip(found[:3], expected[:3], strict=True), *zip(ours, theirs, strict=True), tuple(tables)]
        errors += [float((one != other).double().mean()) for one, other in pairs]
    return max(errors), 0.0


def check_fetch(pages: Pages) -> Found:
    """Error of single heads of pages fetched from host memory; other slots must be unchanged."""
    device, (_, kv_heads, _, dim) = pages.k.device, pages.k.shape
    shape = (2, 64, kv_heads, 2, SIZE, dim)
    stored = [torch.randn(shape).to(pages.k.dtype) for _ in range(2)]
    extents = [extent.pin_memory() for extent in stored] if device.type == "cuda" else stored
    pool = torch.zeros(24, *shape[2:], dtype=pages.k.dtype, device=device)
    loads = torch.stack([torch.randperm(128)[:20].sort().values for _ in range(kv_heads)]).int()
    slots = torch.stack([torch.randperm(24)[:20] for _ in range(kv_heads)]).int()
    loads[:, 17:] = slots[:, 17:] = -1
    fetch(pool, extents, 1, loads.to(device), slots.to(device))
    expected = torch.zeros_like(pool, device="cpu")
    for head, place in itertools.product(range(kv_heads), range(17)):
        frame = int(loads[head, place])
        expected[slots[head, place], head] = stored[frame // 64][1, frame % 64, head]
    return worst(pool.cpu(), expected), 0.0


CHECKS: dict[str, Check] = {
    "paged_attention, prefill": check_prefill,
    "paged_attention, prefill, query heads": partial(check_prefill, each=True),
    "paged_attention, prefill, window": partial(check_prefill, window=100),
    "paged_attention, decode": check_decode,
    "paged_attention, decode, window": partial(check_decode, window=100),
    "column_scores": check_columns,
    "page_masses": check_masses,
    "code_masses, all pages": check_codes,
    "code_masses, candidates": check_few_codes,
    "code_masses, candidates of many": check_many_codes,
    "page_bounds": check_bounds,
    "top_pages": check_top_pages,
    "top_pages, more than a program holds": partial(check_top_pages, times=64),
    "steady_pages": check_steady_pages,
    "steady_pages, more than a program holds": partial(check_steady_pages, times=64),
    "store": check_store,
    "summarize": check_summarize,
    "encode": check_encode,
    "admit": check_admit,
    "fetch": check_fetch,
}
