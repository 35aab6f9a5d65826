"""Problems for `column_scores` on scattered pages of a poisoned cache, their solutions, and what runs them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from keysift.attention.ops import ColumnScores, column_scores
from keysift.kvcache.ops import use_backend
from keysift.kvcache.ops.dispatch import Backend
from tests.problems import built, scatter

Probe = tuple[int, tuple[int, ...]]
"""A sequence and where the queries stand, -1: no query; shorter probes are padded with -1."""


@dataclass(frozen=True)
class Case:
    """Probes of sequences whose tokens are cached up to the last that any of their queries sees."""

    probes: tuple[Probe, ...]
    heads: tuple[int, int] = (2, 1)
    head_dim: int = 16
    page_size: int = 16
    spare: int = 0  # pages of the table after all tokens
    spread: float = 1.0  # of the logits
    one_table: bool = False  # for all probes and heads, as axes of stride 0
    heavy: bool = False  # too slow for Triton's interpreter

    @property
    def queries_per_probe(self) -> int:
        return max(len(positions) for _, positions in self.probes)


@dataclass(frozen=True)
class Problem:
    """The arguments of the op, and the tokens of the pages for oracles that know no pages."""

    q: Tensor  # [B * m, Hq, D]
    k: Tensor  # [N, Hkv, S, D]
    frames: Tensor  # [B, Hkv, F]
    positions: Tensor  # [B * m]
    queries_per_probe: int
    keys: list[Tensor]  # of each probe's sequence, [length, Hkv, D]

    @property
    def lasts(self) -> Tensor:
        """[B], the last position among each probe's queries; -1 where there is none."""
        return self.positions.view(-1, self.queries_per_probe).amax(1)


def evenly(start: int, stop: int, step: int, count: int) -> tuple[Probe, ...]:
    """A probe of `count` queries at the end of each `step` tokens of one sequence."""
    return tuple((0, tuple(range(end - count, end))) for end in range(start + step, stop + 1, step))


RAGGED: tuple[Probe, ...] = ((0, (70, 3, 69)), (1, (-1, 40)), (1, ()), (2, (15, 16, 17)))
SHORT: tuple[Probe, ...] = ((0, (40, 3, 39)), (1, (-1, 17)), (1, ()))
CASES = {
    "ragged": Case(RAGGED, heads=(2, 2)),
    "shared-table": Case(((0, (5, 6, 7)), (0, (0, 70))), heads=(4, 2), one_table=True),
    "prompt-blocks": Case(evenly(64, 256, 64, 4), heads=(6, 2), one_table=True, heavy=True),
    "prompt-end": Case(((0, tuple(range(101, 165))),), heads=(3, 1), head_dim=64, one_table=True, heavy=True),
    "prompt-start": Case(((0, tuple(range(20))), (0, (0, 0, 5)))),
    "one-token": Case(((0, (0,)),)),
    "absent": Case(((0, (-1, -1)), (1, (3, 20)))),
    "pieces": Case(((0, (2100, 1023, 1024)), (0, (1040,))), heavy=True),
    "short-pieces": Case(((0, (140, 63, 64)), (0, (65,)))),
    "group-of-1": Case(SHORT, heads=(3, 3)),
    "group-of-3": Case(SHORT, heads=(6, 2), head_dim=40),
    "group-of-4": Case(SHORT, heads=(4, 1), head_dim=128),
    "group-of-8": Case(SHORT, heads=(8, 1)),
    "group-of-71": Case(((0, (11,)),), heads=(71, 1)),
    "many-rows": Case(((0, tuple(range(100))), (0, tuple(range(100)))), heads=(6, 1), heavy=True),
    "some-rows": Case(((0, tuple(range(3, 90, 4))),), heads=(4, 1), head_dim=24),
    "head-dim-24": Case(RAGGED, head_dim=24, page_size=40),
    "head-dim-80": Case(SHORT, head_dim=80),
    "head-dim-200": Case(((0, (18, 19)), (1, (3, 4))), heads=(4, 2), head_dim=200),
    "head-dim-256": Case(((0, (18, 35)),), head_dim=256),
    "pages-of-1": Case(((0, (30, 4, 9)), (1, (12, 13, 14))), page_size=1, spare=2),
    "pages-of-4": Case(SHORT, page_size=4),
    "pages-of-6": Case(((0, (28, 29, 30)), (1, (5, 6, 40))), page_size=6),
    "pages-of-24": Case(RAGGED, page_size=24, spare=7),
    "pages-of-32": Case(SHORT, page_size=32),
    "pages-of-64": Case(((0, (200, 63, 64)), (1, (127, 128))), page_size=64),
    "pages-of-100": Case(((0, (230, 99, 100)), (1, (163, 164))), page_size=100),
    "pages-of-1100": Case(((0, (2300, 1099, 1100)), (1, (1023, 1024))), page_size=1100, heavy=True),
}


TWINS: dict[Backend, bool] = {
    "native": built("keysift.attention.ops.column_scores.native"),
    "triton": built("keysift.attention.ops.column_scores.triton"),
}
ALL: tuple[Backend, ...] = ("reference", *TWINS)
EACH_CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype).removeprefix("torch.")
)


def affordable(backend: Backend, case: Case) -> bool:
    return backend != "triton" or torch.cuda.is_available() or not case.heavy


def twins(case: Case) -> list[Backend]:
    """Those that are here and can run the case in a second or so."""
    return [backend for backend, there in TWINS.items() if there and affordable(backend, case)]


def each(*names: str, backends: tuple[Backend, ...] = ALL) -> pytest.MarkDecorator:
    """Runs a test of `backend` and `case` with these cases, as far as `twins` would."""
    skip = pytest.mark.skip(reason="not built")
    pairs = [
        pytest.param(backend, CASES[name], id=f"{backend}-{name}", marks=[] if TWINS.get(backend, True) else [skip])
        for backend, name in itertools.product(backends, names)
        if affordable(backend, CASES[name])
    ]
    return pytest.mark.parametrize(("backend", "case"), pairs)


def make_problem(case: Case, dtype: torch.dtype) -> Problem:
    """Random sequences on frames that hold NaN where no token is; so does a query that is not there."""
    num_heads, num_kv_heads = case.heads
    sequences = sorted({sequence for sequence, _ in case.probes})
    lengths = [max(max(where, default=-1) + 1 for s, where in case.probes if s == each) for each in sequences]
    keys = [torch.randn(length, num_kv_heads, case.head_dim).to(dtype) for length in lengths]
    num_pages = -(-max(lengths) // case.page_size) + case.spare
    orders = [torch.randperm(len(lengths) * num_pages) for _ in range(num_kv_heads)]
    orders = orders[:1] * num_kv_heads if case.one_table else orders
    table = torch.stack(orders).view(num_kv_heads, -1, num_pages).transpose(0, 1).int()  # [sequences, Hkv, F]
    mine = [sequences.index(sequence) for sequence, _ in case.probes]
    m = case.queries_per_probe
    positions = torch.tensor([[*where, *[-1] * (m - len(where))] for _, where in case.probes]).flatten().int()
    packed = torch.randn(len(mine) * m, num_heads + num_kv_heads, case.head_dim) * case.spread
    packed[positions < 0] = torch.nan
    return Problem(
        q=packed.to(dtype)[:, :num_heads],  # as a slice of a fused projection
        k=scatter(keys, table, case.page_size),
        frames=table[:1, :1].expand(len(mine), num_kv_heads, -1) if case.one_table else table[mine],
        positions=positions,
        queries_per_probe=m,
        keys=[keys[sequence] for sequence in mine],
    )


def only(problem: Problem, probe: int) -> Problem:
    """One of the probes, and of its table the pages that it sees."""
    m, last = problem.queries_per_probe, int(problem.lasts[probe])
    here, needed = slice(probe * m, (probe + 1) * m), last // problem.k.shape[2] + 1
    frames = problem.frames[probe : probe + 1, :, :needed]
    return replace(problem, q=problem.q[here], frames=frames, positions=problem.positions[here])


def written_out(problem: Problem) -> ColumnScores:
    """The definition in fp64, one query and head at a time, over the tokens that it may see."""
    probes, m = problem.frames.shape[0], problem.queries_per_probe
    num_heads, page_size = problem.q.shape[1], problem.k.shape[2]
    shape = (probes, num_heads, problem.frames.shape[2])
    mass, peak, bands = (torch.zeros(shape, dtype=torch.float64) for _ in range(3))
    for b, head in itertools.product(range(probes), range(num_heads)):
        there = [query for query in range(b * m, (b + 1) * m) if problem.positions[query] >= 0]
        for query in there:
            position = int(problem.positions[query])
            keys = problem.keys[b][: position + 1, head * problem.k.shape[1] // num_heads].double()
            weights = torch.softmax(keys @ problem.q[query, head].double() * problem.q.shape[2] ** -0.5, 0)
            seen = torch.arange(position + 1)
            pages = torch.zeros(shape[2], dtype=torch.float64).index_add_(0, seen // page_size, weights)
            mass[b, head] += pages / len(there)
            peak[b, head] = torch.maximum(peak[b, head], pages)
            bands[b, head].index_add_(0, (position - seen) // page_size, weights / len(there))
    return ColumnScores(mass, peak, bands)


def run(backend: Backend, problem: Problem, bands: bool = True) -> ColumnScores:
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    tensors = (x.to(device) for x in (problem.q, problem.k, problem.frames, problem.positions))
    numbers = {"queries_per_probe": problem.queries_per_probe, "scale": problem.q.shape[2] ** -0.5}
    with use_backend(backend):
        got = column_scores(*tensors, **numbers, bands=bands)
    assert (got.bands is not None) == bands
    assert all(part is None or (part.dtype == torch.float32 and part.is_contiguous()) for part in got)
    return ColumnScores(*(None if part is None else part.cpu() for part in got))  # type: ignore[arg-type]


def assert_same(got: ColumnScores, expected: ColumnScores, tolerance: float = 2e-6) -> None:
    """Relative to each page, so that a small mass is right, too; products of 16-bit numbers are exact in fp32."""
    for mine, right in zip(got, expected, strict=True):
        if mine is not None and right is not None:
            torch.testing.assert_close(mine.double(), right.double(), atol=tolerance, rtol=10 * tolerance)


def assert_equal(got: ColumnScores, expected: ColumnScores) -> None:
    for mine, right in zip(got, expected, strict=True):
        assert mine is right is None or (mine is not None and right is not None and torch.equal(mine, right))
