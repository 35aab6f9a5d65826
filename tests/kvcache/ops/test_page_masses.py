"""Masses of pages: the native twins against the references, and both against the definitions in fp64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import pytest
import torch
from torch import Tensor

from keysift.kvcache.ops import BackendUnavailable, use_backend
from keysift.kvcache.ops.dispatch import Backend
from keysift.kvcache.ops.encode import Codes, encode
from keysift.kvcache.ops.page_masses import code_masses, page_bounds, page_masses
from tests.problems import built

Kind = Literal["exact", "codes", "bounds"]
LEAST = -87.0
"""Exact shares below exp of it may count as none."""
BUILT = built("keysift.kvcache.ops.page_masses.native")
NATIVE = pytest.mark.skipif(not BUILT, reason="not built")
BACKENDS = pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=NATIVE)])
KINDS = pytest.mark.parametrize("kind", ["exact", "codes", "bounds"])
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype).removeprefix("torch.")
)


@dataclass(frozen=True)
class Case:
    """Rows that stand at `positions`, each in a sequence of its own."""

    positions: tuple[int, ...]
    group: int = 3
    kv_heads: int = 2
    dim: int = 64
    page_size: int = 16
    bits: int = 2
    candidates: int = 5
    spare: int = 0  # pages of the table after all tokens
    one_table: bool = False  # for all heads, as an axis of stride 0
    spread: float = 2.0  # of the queries


CASES = {
    "ragged": Case((170, 0, 15, 16, 79, 300), spare=3),
    "shared-table": Case((170, 100), group=4, one_table=True),
    "wide-heads": Case((140, 170), group=4, dim=128),
    "narrow-heads": Case((140, 171), group=1, kv_heads=3, dim=16),
    "group-of-8": Case((140, 171), group=8, kv_heads=1),
    "group-of-11": Case((140,), group=11, kv_heads=1, dim=48),
    "pages-of-4": Case((43, 44, 70), page_size=4, group=4),
    "pages-of-8": Case((88, 99), page_size=8, dim=128),
    "pages-of-12": Case((88, 190), page_size=12),
    "pages-of-32": Case((300, 288), page_size=32),
    "four-bits": Case((170, 95), bits=4),
    "four-bits-narrow": Case((170, 95), bits=4, dim=16, group=1),
    "four-bits-wide": Case((170, 95), bits=4, dim=128, page_size=24),
    "all-candidates": Case((170, 300), candidates=1000),
    "one-candidate": Case((170, 300), candidates=1),
    "many-pages": Case((4 * 600 + 1, 4 * 255, 4 * 520), page_size=4, group=1, dim=16, candidates=300),
    "great-logits": Case((170, 90), spread=60.0),
}
EACH_CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@dataclass(frozen=True)
class Problem:
    """The arguments of the ops."""

    case: Case
    q: Tensor  # [R, Hq, D]
    k: Tensor  # [N, Hkv, S, D]
    summaries: Tensor  # [N, Hkv, 4, D]
    codes: Codes
    frames: Tensor  # [R, Hkv, F]
    positions: Tensor  # [R]

    @property
    def scale(self) -> float:
        return self.case.dim**-0.5


def make_problem(case: Case, dtype: torch.dtype) -> Problem:
    """Scattered pages; NaN wherever no token is, and in what belongs to pages that are not full."""
    rows, size = len(case.positions), case.page_size
    pages = max(case.positions) // size + 1 + case.spare
    count = rows * pages + 2
    tables = [torch.randperm(count - 2)[: rows * pages].view(rows, pages) for _ in range(case.kv_heads)]
    tables = tables[:1] * case.kv_heads if case.one_table else tables
    frames = torch.stack(tables, 1)
    k = torch.randn(count, case.kv_heads, size, case.dim)
    k = (k + torch.randn(count, case.kv_heads, 1, case.dim) * torch.linspace(0.1, 3.0, case.dim)).to(dtype)
    summaries = torch.stack((k.float().mean(2), k.float().amin(2), k.float().amax(2), k.float().mean(2)), 2).to(dtype)
    shape = (count, case.kv_heads)
    codes = Codes(
        torch.zeros(*shape, case.dim * case.bits // 32, size, dtype=torch.int32),
        torch.zeros(*shape, 2, case.dim, dtype=torch.int8),
        torch.zeros(*shape, 2),
    )
    encode(k, summaries, torch.arange(count), codes)
    for row, position in enumerate(case.positions):
        for head in range(case.kv_heads):
            own = frames[row, head, position // size]
            k[own, head, position % size + 1 :] = torch.nan
            poison = torch.cat((frames[row, head, position // size :], torch.tensor([count - 2, count - 1])))
            k[poison[1:], head] = torch.nan
            summaries[poison, head] = torch.nan
            codes.scales[poison, head] = torch.nan
            codes.bounds[poison, head] = 77
    q = (torch.randn(rows, case.group * case.kv_heads + 2, case.dim) * case.spread).to(dtype)[:, 1:-1]
    table = frames.int()[:, :1].expand_as(frames) if case.one_table else frames.int()
    return Problem(case, q, k, summaries, codes, table, torch.tensor(case.positions).int())


def run(backend: Backend, kind: Kind, problem: Problem) -> Tensor:
    """Results of the op; exact masses, which are only defined up to a factor, as shares."""
    masses = run_raw(backend, kind, problem)
    if kind != "exact":
        return masses
    shares = masses - masses.logsumexp(-1, keepdim=True).nan_to_num(neginf=0.0)
    return shares.masked_fill(shares < LEAST, -torch.inf)


def elsewhere(problem: Problem) -> tuple[Tensor, Tensor]:
    """The rows' own pages in other frames than everything else, as they are where most pages are not at hand."""
    rows, kv_heads = problem.frames.shape[:2]
    index = (problem.positions.long() // problem.k.shape[2]).clamp(min=0)[:, None, None].expand(-1, kv_heads, 1)
    frames = problem.frames.gather(2, index)[..., 0].long()  # [R, Hkv]
    heads = torch.arange(kv_heads)
    keys = torch.full((rows + 2, *problem.k.shape[1:]), torch.nan, dtype=problem.k.dtype)
    keys[1:-1] = problem.k[frames, heads]
    return keys, torch.arange(1, rows + 1, dtype=torch.int32)[:, None].expand(-1, kv_heads)


def run_raw(backend: Backend, kind: Kind, problem: Problem) -> Tensor:
    p = problem
    place = {"frames": p.frames, "positions": p.positions, "scale": p.scale}
    keys, own = elsewhere(p)
    with use_backend(backend):
        if kind == "exact":
            return page_masses(p.q, p.k, **place)
        if kind == "codes":
            return code_masses(p.q, keys, own, p.codes, **place, candidates=p.case.candidates)
        return page_bounds(p.q, keys, own, p.summaries, **place)


def keys_by_code(problem: Problem, frame: int, head: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys [S, D], middle and half width [D] of a page, one level at a time."""
    levels, bits = problem.codes.levels[frame, head].tolist(), problem.case.bits
    middle, half = problem.codes.bounds[frame, head].double() * problem.codes.scales[frame, head].double()[:, None]
    each = 32 // bits
    cell = [
        [levels[d // each][token] >> d % each * bits & (1 << bits) - 1 for d in range(problem.case.dim)]
        for token in range(problem.case.page_size)
    ]
    return middle + half * ((2 * torch.tensor(cell).double() + 1) / (1 << bits) - 1), middle, half


def written_out(kind: Kind, problem: Problem) -> Tensor:
    """The definition in fp64, one row and KV head and page at a time."""
    case, q = problem.case, problem.q.double() * problem.scale
    masses = torch.full((*q.shape[:2], problem.frames.shape[2]), -torch.inf, dtype=torch.float64)
    for row, position in enumerate(case.positions):
        own = position // case.page_size
        for head in range(case.kv_heads):
            heads = slice(head * case.group, (head + 1) * case.group)
            mine, frames = q[row, heads], problem.frames[row, head].tolist()
            keys = problem.k[frames[own], head, : position % case.page_size + 1].double()
            masses[row, heads, own] = (mine @ keys.T).logsumexp(-1)
            write = {"exact": write_exact, "codes": write_codes, "bounds": write_bounds}[kind]
            write(problem, mine, frames[:own], head, masses[row, heads])
    shares = masses - masses.logsumexp(-1, keepdim=True)
    return shares.masked_fill(shares < LEAST, -torch.inf) if kind == "exact" else masses


def write_exact(problem: Problem, q: Tensor, frames: list[int], head: int, masses: Tensor) -> None:
    for page, frame in enumerate(frames):
        masses[:, page] = (q @ problem.k[frame, head].double().T).logsumexp(-1)


def write_bounds(problem: Problem, q: Tensor, frames: list[int], head: int, masses: Tensor) -> None:
    for page, frame in enumerate(frames):
        least, greatest = problem.summaries[frame, head, 1:3].double()
        masses[:, page] = torch.maximum(q * least, q * greatest).sum(-1) + math.log(problem.case.page_size)


def write_codes(problem: Problem, q: Tensor, frames: list[int], head: int, masses: Tensor) -> None:
    if not frames:
        return
    pages = [keys_by_code(problem, frame, head) for frame in frames]
    centres = torch.stack([q @ middle for _, middle, _ in pages], -1)  # [G, F]
    spreads = torch.stack([q.abs() @ half for _, _, half in pages], -1)
    ranks = (centres + 0.35 * spreads).softmax(-1).sum(0).tolist()
    best = sorted(range(len(pages)), key=lambda page: (-ranks[page], page))[: problem.case.candidates]
    masses[:, : len(pages)] = centres + math.log(problem.case.page_size)
    for page in best:
        masses[:, page] = (q @ pages[page][0].T).logsumexp(-1)


def assert_same(got: Tensor, expected: Tensor, case: Case) -> None:
    tolerance = 2e-4 * case.spread
    torch.testing.assert_close(got.double(), expected.double(), atol=tolerance, rtol=1e-5)


@NATIVE
@KINDS
@EACH_CASE
@DTYPES
def test_native_equals_reference_on_every_instruction_set(dtype: torch.dtype, case: Case, kind: Kind) -> None:
    from keysift.kvcache.native.library import isas, use_isa

    problem = make_problem(case, dtype)
    reference = run("reference", kind, problem)
    for isa in isas():
        with use_isa(isa):
            assert_same(run("native", kind, problem), reference, case)


@KINDS
@BACKENDS
@EACH_CASE
def test_the_definition(case: Case, backend: Backend, kind: Kind) -> None:
    problem = make_problem(case, torch.bfloat16)
    got = run(backend, kind, problem)
    assert got.dtype == torch.float32
    assert_same(got, written_out(kind, problem), case)


@BACKENDS
@pytest.mark.parametrize("candidates", [1, 3, 19, 20])
def test_ties_go_to_the_lower_page(backend: Backend, candidates: int) -> None:
    """All full pages are the same: the first ones are looked at."""
    problem = make_problem(Case((320,), candidates=candidates), torch.float32)
    frames = problem.frames.clone()
    frames[..., :20] = frames[..., :1]
    masses = run(backend, "codes", replace(problem, frames=frames))[..., :20]
    near, rest = masses[..., :candidates], masses[..., candidates:]
    torch.testing.assert_close(near, near[..., :1].expand_as(near))
    torch.testing.assert_close(rest, rest[..., :1].expand_as(rest))
    assert candidates == 20 or (near[..., :1] != rest[..., :1]).all()


@NATIVE
@KINDS
@pytest.mark.parametrize("name", ["ragged", "group-of-8", "pages-of-12", "many-pages"])
def test_neither_company_nor_spare_pages_nor_threads_change_a_bit(
    name: str, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = make_problem(CASES[name], torch.bfloat16)
    together = run_raw("native", kind, problem)
    for row, position in enumerate(CASES[name].positions):
        here, pages = slice(row, row + 1), position // CASES[name].page_size + 1
        frames = problem.frames[here, :, :pages]
        alone = replace(problem, q=problem.q[here], frames=frames, positions=problem.positions[here])
        for threads in (1, 5):
            monkeypatch.setattr("keysift.kvcache.ops.page_masses.native.num_threads", lambda threads=threads: threads)
            assert torch.equal(run_raw("native", kind, alone), together[here, :, :pages])
        assert (together[here, :, pages:] == -torch.inf).all()


@BACKENDS
@DTYPES
def test_a_query_that_sees_nothing(backend: Backend, dtype: torch.dtype) -> None:
    problem = make_problem(CASES["ragged"], dtype)
    blind = replace(problem, positions=torch.full_like(problem.positions, -1))
    assert (run(backend, "exact", blind) == -torch.inf).all()


@BACKENDS
@pytest.mark.parametrize("kind", ["codes", "bounds"])
def test_a_nan_in_a_query_is_not_hidden(backend: Backend, kind: Kind) -> None:
    problem = make_problem(CASES["pages-of-12"], torch.float32)
    problem.q[1, 2, 5] = torch.nan
    masses = run(backend, kind, problem)
    assert masses[1, 2].isnan().any()
    assert not masses[0].isnan().any()


@BACKENDS
@KINDS
def test_no_rows(backend: Backend, kind: Kind) -> None:
    problem = make_problem(CASES["ragged"], torch.float32)
    none = replace(problem, q=problem.q[:0], frames=problem.frames[:0], positions=problem.positions[:0])
    assert run(backend, kind, none).shape == (0, *problem.q.shape[1:2], problem.frames.shape[2])


Change = Callable[[Problem], Problem]
ODD: dict[str, Change] = {
    "dtypes": lambda p: replace(p, q=p.q.double()),
    "strides": lambda p: replace(p, q=p.q.mT.contiguous().mT),
    "frames": lambda p: replace(p, frames=p.frames.long()),
    "positions": lambda p: replace(p, positions=p.positions.repeat_interleave(2)[::2]),
}


@NATIVE
@KINDS
@pytest.mark.parametrize("change", ODD.values(), ids=ODD.keys())
def test_what_native_cannot_do_is_left_to_the_reference(change: Change, kind: Kind) -> None:
    with pytest.raises(BackendUnavailable, match="twin"):
        run("native", kind, change(make_problem(CASES["ragged"], torch.float32)))
