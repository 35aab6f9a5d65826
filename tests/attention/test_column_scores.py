"""`column_scores`: the twins against the reference, and all of them against the definition in fp64."""

from __future__ import annotations

import importlib
import itertools
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from keysift.attention.ops import ColumnScores, column_scores
from keysift.kvcache.ops import BackendUnavailable, use_backend
from keysift.kvcache.ops.dispatch import Backend
from tests.problems import scatter


def built(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


TWINS: dict[Backend, bool] = {"native": built("keysift.attention.native.column_scores")}
BACKENDS = [
    pytest.param("reference"),
    *(pytest.param(name, marks=pytest.mark.skipif(not there, reason="not built")) for name, there in TWINS.items()),
]
NATIVE = pytest.mark.skipif(not TWINS["native"], reason="not built")
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype).removeprefix("torch.")
)

Probe = tuple[int, tuple[int, ...]]  # a sequence and where the queries stand; shorter ones are padded with -1


@dataclass(frozen=True)
class Case:
    """Probes of sequences whose tokens are cached up to the last that any of their queries sees."""

    probes: tuple[Probe, ...]
    heads: tuple[int, int] = (4, 2)
    head_dim: int = 16
    page_size: int = 16
    spare: int = 0  # pages of the table behind all tokens
    spread: float = 1.0  # of the logits
    one_table: bool = False  # for all probes and heads, as axes of stride 0

    @property
    def queries_per_probe(self) -> int:
        return max(len(positions) for _, positions in self.probes)


@dataclass(frozen=True)
class Problem:
    """The arguments of the op, and the tokens behind the pages for whoever does not look at pages."""

    q: Tensor  # [B * m, Hq, D]
    k: Tensor  # [N, Hkv, S, D]
    frames: Tensor  # [B, Hkv, F]
    positions: Tensor  # [B * m]
    queries_per_probe: int
    keys: list[Tensor]  # of each probe's sequence, [length, Hkv, D]


def make_problem(case: Case, dtype: torch.dtype) -> Problem:
    """Random sequences on frames that hold NaN where no token is."""
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
    packed = torch.randn(len(mine) * m, num_heads + num_kv_heads, case.head_dim) * case.spread
    return Problem(
        q=packed.to(dtype)[:, :num_heads],  # as a slice of a fused projection
        k=scatter(keys, table, case.page_size),
        frames=table[:1, :1].expand(len(mine), num_kv_heads, -1) if case.one_table else table[mine],
        positions=torch.tensor([[*where, *[-1] * (m - len(where))] for _, where in case.probes]).flatten().int(),
        queries_per_probe=m,
        keys=[keys[sequence] for sequence in mine],
    )


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
        got = column_scores(*tensors, **numbers, bands=bands)  # type: ignore[arg-type]
    assert (got.bands is not None) == bands
    assert all(part is None or (part.dtype == torch.float32 and part.is_contiguous()) for part in got)
    return ColumnScores(*(None if part is None else part.cpu() for part in got))  # type: ignore[arg-type]


def assert_same(got: ColumnScores, expected: ColumnScores, tolerance: float = 2e-6) -> None:
    """Relative to each page, so that a small mass is right, too."""
    for mine, right in zip(got, expected, strict=True):
        if mine is not None and right is not None:
            torch.testing.assert_close(mine.double(), right.double(), atol=tolerance, rtol=10 * tolerance)


def assert_equal(got: ColumnScores, expected: ColumnScores) -> None:
    for mine, right in zip(got, expected, strict=True):
        assert mine is right is None or (mine is not None and right is not None and torch.equal(mine, right))


def evenly(start: int, stop: int, step: int, count: int) -> tuple[Probe, ...]:
    """A probe of `count` queries at the end of each `step` tokens of one sequence."""
    return tuple((0, tuple(range(end - count, end))) for end in range(start + step, stop + 1, step))


RAGGED: tuple[Probe, ...] = ((0, (70, 3, 69)), (1, (40,)), (1, ()), (0, (0, 70)), (2, (15, 16, 17)))
CASES = {
    "ragged": Case(RAGGED),
    "ragged-spare-pages": Case(RAGGED, spare=7),
    "prompt-blocks": Case(evenly(64, 256, 64, 4), heads=(6, 2), one_table=True),
    "prompt-end": Case(((0, tuple(range(101, 165))),), heads=(3, 1), head_dim=64, one_table=True),
    "prompt-start": Case(((0, tuple(range(20))), (0, (0, 0, 5)))),
    "one-token": Case(((0, (0,)),)),
    "pieces": Case(((0, (2100, 1023, 1024)), (0, (1040,))), heads=(2, 1)),
    "group-of-1": Case(RAGGED, heads=(2, 2)),
    "group-of-3": Case(RAGGED, heads=(9, 3), head_dim=64),
    "group-of-4": Case(RAGGED, heads=(4, 1), head_dim=128),
    "group-of-8": Case(RAGGED, heads=(8, 1)),
    "many-rows": Case(((0, tuple(range(100))), (0, tuple(range(100)))), heads=(6, 1)),
    "head-dim-24": Case(RAGGED, head_dim=24, page_size=40),
    "head-dim-80": Case(RAGGED, head_dim=80),
    "head-dim-256": Case(RAGGED, head_dim=256),
    "pages-of-1": Case(RAGGED, page_size=1, spare=2),
    "pages-of-4": Case(RAGGED, page_size=4),
    "pages-of-24": Case(RAGGED, page_size=24),
    "pages-of-32": Case(RAGGED, page_size=32),
    "pages-of-64": Case(((0, (200, 63, 64)), (1, (127, 128))), page_size=64),
    "pages-of-100": Case(((0, (330, 99, 100)), (1, (163, 164))), page_size=100),
    "pages-of-1100": Case(((0, (2300, 1099, 1100)), (1, (1023, 1024))), heads=(2, 1), page_size=1100),
}
EACH_CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@DTYPES
@EACH_CASE
def test_twins_equal_reference(case: Case, dtype: torch.dtype) -> None:
    problem = make_problem(case, dtype)
    reference = run("reference", problem)
    assert_same(reference, written_out(problem))
    for backend in (name for name, there in TWINS.items() if there):
        assert_same(run(backend, problem), reference)
        assert_same(run(backend, problem, bands=False), reference)


@pytest.mark.parametrize("backend", BACKENDS)
@EACH_CASE
def test_masses_are_shares(backend: Backend, case: Case) -> None:
    problem = make_problem(case, torch.bfloat16)
    mass, peak, bands = run(backend, problem)
    assert bands is not None
    last = problem.positions.view(-1, case.queries_per_probe).amax(1)[:, None]  # -1 where there is no query
    for shares in (mass, bands):
        assert shares.min() >= 0
        torch.testing.assert_close(shares.sum(-1), (last >= 0).float().expand(shares.shape[:2]))
    assert (peak >= mass - 1e-6).all()
    assert peak.max() <= 1 + 1e-6
    unseen = torch.arange(mass.shape[2]) * case.page_size > last[..., None]
    assert not any(part.masked_select(unseen).any() for part in (mass, peak, bands))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["ragged-spare-pages", "prompt-blocks", "pages-of-24", "pages-of-100"])
def test_what_no_query_sees_changes_no_bit(backend: Backend, name: str) -> None:
    poisoned = make_problem(CASES[name], torch.bfloat16)
    got = run(backend, poisoned)
    assert not any(part is None or part.isnan().any() for part in got)
    assert_equal(got, run(backend, replace(poisoned, k=poisoned.k.nan_to_num(nan=3.0))))


@pytest.mark.parametrize("backend", BACKENDS)
@DTYPES
@pytest.mark.parametrize("spread", [0.0, 30.0, 600.0])
def test_any_magnitude_of_logits(backend: Backend, dtype: torch.dtype, spread: float) -> None:
    problem = make_problem(replace(CASES["pieces"], spread=spread), dtype)
    assert_same(run(backend, problem), written_out(problem), 2e-6 * max(1.0, spread))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_that_is_seen_is_not_hidden(backend: Backend) -> None:
    problem = make_problem(CASES["pieces"], torch.float32)
    problem.q[1, 0] = float("nan")
    for part in run(backend, problem):
        assert part is not None
        assert part[0, 0, : 1023 // 16 + 1].isnan().all()
        assert part[:, 1].isfinite().all()
        assert part[1].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_probe_and_no_query(backend: Backend) -> None:
    problem = make_problem(CASES["ragged"], torch.float32)
    nobody = run(backend, replace(problem, positions=torch.full_like(problem.positions, -1)))
    assert not any(part is None or part.any() for part in nobody)
    nothing = replace(problem, q=problem.q[:0], frames=problem.frames[:0], positions=problem.positions[:0])
    assert run(backend, nothing).mass.shape == (0, *nobody.mass.shape[1:])


@NATIVE
@DTYPES
@EACH_CASE
def test_every_instruction_set(case: Case, dtype: torch.dtype) -> None:
    from keysift.attention.native.library import isas, use_isa

    problem = make_problem(case, dtype)
    reference = run("reference", problem)
    for isa, bands in itertools.product(isas(), (True, False)):
        with use_isa(isa):
            assert_same(run("native", problem, bands), reference)


@NATIVE
@pytest.mark.parametrize("name", ["ragged", "pieces", "many-rows", "pages-of-1100"])
def test_the_number_of_threads_changes_no_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, got = make_problem(CASES[name], torch.bfloat16), []
    for count in (1, 2, 2, 5):
        monkeypatch.setattr("keysift.attention.native.column_scores.num_threads", lambda count=count: count)
        got.append(run("native", problem))
        assert_equal(got[-1], got[0])


@NATIVE
@pytest.mark.parametrize("name", ["ragged", "prompt-blocks", "pieces", "pages-of-100"])
def test_neither_company_nor_spare_pages_change_a_bit(name: str) -> None:
    problem, m = make_problem(CASES[name], torch.float32), CASES[name].queries_per_probe
    together = run("native", problem)
    for b, pages in enumerate(problem.positions.view(-1, m).amax(1).tolist()):
        here, needed = slice(b * m, (b + 1) * m), pages // CASES[name].page_size + 1
        frames = problem.frames[b : b + 1, :, :needed]
        alone = replace(problem, q=problem.q[here], frames=frames, positions=problem.positions[here])
        expected = ColumnScores(*(part[b : b + 1, :, :needed] for part in together if part is not None))
        assert_equal(run("native", alone), expected)


@NATIVE
@pytest.mark.parametrize("one_table", [True, False], ids=["one-sequence", "two-sequences"])
def test_more_sums_than_are_kept_at_once(one_table: bool) -> None:
    length, m = 40_000, 40  # pages of one token: 160 rows of two times 40 000 sums, of which 102 fit
    k = torch.randn(length, 1, 1, 8)
    frames = torch.arange(length, dtype=torch.int32).expand(2, 1, length)
    problem = Problem(
        q=torch.randn(2 * m, 2, 8),
        k=k,
        frames=frames if one_table else torch.stack((frames[0], frames[1].flip(-1))),
        positions=torch.randint(length // 2, length, (2 * m,)).int(),
        queries_per_probe=m,
        keys=[],
    )
    assert_same(run("native", problem), run("reference", problem), 1e-7)


def test_what_a_twin_cannot_do_is_left_to_the_reference() -> None:
    problem = make_problem(CASES["ragged"], torch.float64)
    assert_same(run("auto", problem), written_out(problem))
    for backend in TWINS:
        with pytest.raises(BackendUnavailable, match="column_scores"):
            run(backend, problem)


@NATIVE
def test_native_refuses_odd_calls() -> None:
    problem = make_problem(CASES["ragged"], torch.float32)
    odd_dim = make_problem(Case(RAGGED, head_dim=20), torch.float32)
    for other in (odd_dim, replace(problem, q=problem.q.bfloat16()), replace(problem, frames=problem.frames.long())):
        with pytest.raises(BackendUnavailable, match="column_scores"):
            run("native", other)
