"""The Triton twins of `page_masses`, `code_masses` and `page_bounds` on scattered frames of a poisoned cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import Tensor

from keysift.kvcache.ops import BackendUnavailable, use_backend
from keysift.kvcache.ops.dispatch import Backend
from keysift.kvcache.ops.encode import Codes, encode
from keysift.kvcache.ops.page_masses import code_masses, page_bounds, page_masses
from keysift.kvcache.ops.summarize import summarize

pytest.importorskip("triton")

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
ROUNDING, CODE_ROUNDING = 1e-5, {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-5}
"""Of log masses. Products of 16-bit numbers are exact in fp32; but bf16 rounds three quarters of a large half width."""


@dataclass(frozen=True)
class Case:
    lengths: tuple[int, ...]  # tokens of each row's sequence, its query at the last
    heads: tuple[int, int] = (4, 2)
    dim: int = 32
    page_size: int = 16
    bits: int = 2
    one_table: bool = False  # for all rows and heads, as axes of stride 0


CASES = {
    "ragged": Case((70, 3, 48)),
    "group of three": Case((82, 33), heads=(6, 2), dim=64),
    "more heads than a program has": Case((66,), heads=(20, 1)),
    "one head each": Case((65, 64), heads=(3, 3), dim=16),
    "four bits": Case((130, 20), bits=4),
    "no power of two": Case((50, 19), heads=(2, 1), dim=40, page_size=6),
    "part of a word": Case((33,), dim=8),
    "pages of one": Case((9, 1), page_size=1),
    "pages larger than a tile": Case((200,), heads=(2, 1), page_size=96),
    "one table": Case((80, 80, 80), one_table=True),
}


@dataclass(frozen=True)
class Problem:
    q: Tensor  # [R, Hq, D]
    k: Tensor  # [N, Hkv, S, D]
    summaries: Tensor
    codes: Codes
    frames: Tensor  # [R, Hkv, F]
    positions: Tensor  # [R]

    def to(self, device: str) -> Problem:
        codes = Codes(*(part.to(device) for part in self.codes))
        moved = (part.to(device) for part in (self.q, self.k, self.summaries))
        return Problem(*moved, codes, self.frames.to(device), self.positions.to(device))


def make_problem(case: Case, dtype: torch.dtype) -> Problem:
    """Sequences in frames in random order; NaN, or the worst codes, where no token or no full page is."""
    (heads, kv_heads), pages = case.heads, -(-max(case.lengths) // case.page_size)
    sequences = 1 if case.one_table else len(case.lengths)
    table = torch.randperm(sequences * pages).int().view(sequences, 1, pages)
    frames = table.expand(len(case.lengths), kv_heads, pages)
    k = torch.full((sequences * pages + 1, kv_heads, case.page_size, case.dim), torch.nan)
    channels = 3 * torch.randn(kv_heads, 1, case.dim)  # some channels are far from 0, as keys' are
    for row, length in list(enumerate(case.lengths))[:sequences]:
        for page in range(-(-length // case.page_size)):
            count = min(case.page_size, length - page * case.page_size)
            k[frames[row, 0, page], :, :count] = torch.randn(kv_heads, count, case.dim) + channels
    full = torch.cat([frames[row, 0, : n // case.page_size] for row, n in enumerate(case.lengths)]).unique().long()
    packed = torch.randn(len(case.lengths), heads + 2 * kv_heads, case.dim)  # q, k and v of one projection
    return Problem(
        packed.to(dtype)[:, :heads],
        k.to(dtype),
        *stored(case, k.to(dtype), full),
        frames,
        torch.tensor(case.lengths, dtype=torch.int32) - 1,
    )


def stored(case: Case, k: Tensor, full: Tensor) -> tuple[Tensor, Codes]:
    """Summaries and codes of the frames that are full."""
    (num, kv_heads, page_size, dim), words = k.shape, -(-case.dim * case.bits // 32)
    summaries = torch.full((num, kv_heads, 4, dim), torch.nan, dtype=k.dtype)
    levels = torch.full((num, kv_heads, words, page_size), -1, dtype=torch.int32)
    bounds = torch.full((num, kv_heads, 2, dim), -128, dtype=torch.int8)
    codes = Codes(levels, bounds, torch.full((num, kv_heads, 2), torch.nan))
    with use_backend("reference"):
        summarize(summaries, k, k, full)
        encode(k, summaries, full, codes)
    return summaries, codes


def exact(problem: Problem) -> Tensor:
    scale = problem.q.shape[2] ** -0.5
    return page_masses(problem.q, problem.k, problem.frames, problem.positions, scale=scale)


def own(problem: Problem) -> Tensor:
    """[R, Hkv], the frame of each row's own page."""
    last = (problem.positions.long() // problem.k.shape[2]).clamp(min=0)
    return problem.frames.gather(2, last[:, None, None].expand(-1, problem.frames.shape[1], 1))[..., 0]


def bounded(problem: Problem) -> Tensor:
    scale, given = problem.q.shape[2] ** -0.5, (problem.frames, problem.positions)
    return page_bounds(problem.q, problem.k, own(problem), problem.summaries, *given, scale=scale)


def coded(problem: Problem, candidates: int = 10**6) -> Tensor:
    numbers = {"scale": problem.q.shape[2] ** -0.5, "candidates": candidates}
    return code_masses(problem.q, problem.k, own(problem), problem.codes, problem.frames, problem.positions, **numbers)


Op = Callable[[Problem], Tensor]
OPS: dict[str, Op] = {"exact": exact, "bounds": bounded, "codes": coded, "few codes": partial(coded, candidates=3)}
EACH = pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())


def run(backend: Backend, op: Op, problem: Problem) -> Tensor:
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    with use_backend(backend):
        return op(problem.to(device)).cpu()


def assert_same(op: Op, problem: Problem) -> Tensor:
    masses, expected = (run(backend, op, problem) for backend in ("triton", "reference"))
    rounding = ROUNDING if op in (exact, bounded) else CODE_ROUNDING[problem.q.dtype]
    torch.testing.assert_close(masses, expected, rtol=rounding, atol=rounding)
    return masses


@EACH
@DTYPES
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_masses_are_those_of_the_reference(op: Op, dtype: torch.dtype, case: Case) -> None:
    problem = make_problem(case, dtype)
    masses = assert_same(op, problem)
    unseen = torch.arange(masses.shape[2]) > problem.positions[:, None] // case.page_size
    assert torch.equal(masses.isneginf(), unseen[:, None].expand_as(masses)), "all others hold something"


@EACH
def test_half_precision(op: Op) -> None:
    assert_same(op, make_problem(CASES["group of three"], torch.float16))


@pytest.mark.parametrize("candidates", [0, 1, 5, 6])
def test_any_number_of_candidates(candidates: int) -> None:
    problem = make_problem(Case((110, 64, 16), dim=16), torch.float32)
    few = assert_same(partial(coded, candidates=candidates), problem)
    differ = (few != run("triton", coded, problem)).sum(-1)  # of 6, 3 and 0 full pages
    assert torch.equal(differ, (torch.tensor([6, 3, 0]) - candidates).clamp(min=0)[:, None].expand(3, 4))


def test_more_pages_than_a_program_can_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of many, one of few, and one without any full page."""
    monkeypatch.setattr("keysift.kvcache.ops.heaviest.triton.MAX_PAGES", 4)
    problem = make_problem(Case((200, 40, 7), heads=(6, 2)), torch.float32)
    for candidates in (0, 1, 5, 11):
        assert_same(partial(coded, candidates=candidates), problem)


def test_pages_are_ranked_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem(Case((2500, 40), heads=(2, 1), dim=16), torch.float32)
    whole = run("triton", partial(coded, candidates=20), problem)
    monkeypatch.setattr("keysift.kvcache.ops.heaviest.triton.MAX_PAGES", 128)
    assert torch.equal(assert_same(partial(coded, candidates=20), problem), whole)


def test_of_equal_pages_the_lower_ones_are_candidates() -> None:
    problem = make_problem(Case((16 * 6 + 1,), heads=(2, 1)), torch.float32)
    same = problem.frames[0, 0, :1].expand(6)
    problem = replace(problem, frames=torch.cat([same, problem.frames[0, 0, 6:]])[None, None])
    few = assert_same(partial(coded, candidates=2), problem)
    assert torch.equal(few == run("triton", coded, problem), torch.tensor([[[True] * 2 + [False] * 4 + [True]] * 2]))


@EACH
def test_rows_alone_and_among_longer_ones_have_the_same_bits(op: Op) -> None:
    problem = make_problem(Case((40, 700, 130), heads=(2, 1), dim=16), torch.bfloat16)
    alone = replace(problem, q=problem.q[:1], frames=problem.frames[:1, :, :4], positions=problem.positions[:1])
    assert torch.equal(run("triton", op, problem)[:1, :, :4], run("triton", op, alone))


def test_rows_before_the_first_page_see_nothing() -> None:
    """Means of pages, one token each: a row on its first page has none before it."""
    problem = make_problem(Case((9, 5), page_size=1), torch.float32)
    nowhere = replace(problem, positions=torch.tensor([-1, 3], dtype=torch.int32))
    assert assert_same(exact, nowhere)[0].isneginf().all()


@EACH
def test_no_rows(op: Op) -> None:
    problem = make_problem(CASES["ragged"], torch.float32)
    none = replace(problem, q=problem.q[:0], frames=problem.frames[:0], positions=problem.positions[:0])
    assert run("triton", op, none).shape == (0, 4, 5)


def refused() -> dict[str, Problem]:
    problem = make_problem(Case((20,)), torch.float32)
    return {
        "two dtypes": replace(problem, q=problem.q.bfloat16()),
        "a dtype without kernels": make_problem(Case((20,)), torch.float64),
        "too large a head": make_problem(Case((20,), dim=272), torch.float32),
        "values of a key apart": replace(problem, k=problem.k.repeat_interleave(2, -1)[..., ::2]),
    }


@pytest.mark.parametrize("why", ["two dtypes", "a dtype without kernels", "too large a head", "values of a key apart"])
@EACH
def test_calls_that_the_twins_cannot_do_are_refused(op: Op, why: str) -> None:
    with pytest.raises(BackendUnavailable):
        run("triton", op, refused()[why])


@pytest.mark.gpu
@EACH
def test_the_device_is_never_waited_for(op: Op) -> None:
    problem = make_problem(CASES["group of three"], torch.bfloat16).to("cuda")
    expected = op(problem)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        masses = op(problem)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(masses, expected)
