"""`paged_attention`: the twins against the reference, and all of them against softmax attention in fp64."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module

import pytest
import torch
from torch import Tensor

from keysift.attention.ops import paged_attention
from keysift.kvcache.ops import BackendUnavailable, use_backend
from keysift.kvcache.ops.dispatch import Backend
from tests.problems import Case, Problem, built, dense_attention, keep, make_problem, written_out

TWINS: dict[Backend, bool] = {
    "native": built("keysift.attention.ops.paged_attention.native"),
    "triton": built("keysift.attention.ops.paged_attention.triton"),
}
BACKENDS = [
    pytest.param("reference"),
    *(pytest.param(name, marks=pytest.mark.skipif(not there, reason="not built")) for name, there in TWINS.items()),
]
DTYPES = [  # the outputs' tolerance is some roundings of a number near one, the lse is fp32 whatever the dtype
    pytest.param(torch.float32, 1e-5, 1e-5, id="fp32"),
    pytest.param(torch.bfloat16, 1e-2, 1e-4, id="bf16"),
    pytest.param(torch.float16, 2e-3, 1e-4, id="fp16"),
]


def run(backend: Backend, problem: Problem) -> tuple[Tensor, Tensor]:
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    tensors = (problem.q, problem.k, problem.v, problem.frames, problem.pages, problem.starts)
    with use_backend(backend):
        out, lse = paged_attention(
            *(tensor.to(device) for tensor in tensors),
            queries_per_row=problem.queries_per_row,
            scale=problem.scale,
            window=problem.window,
        )
    assert out.dtype == problem.q.dtype
    assert out.is_contiguous()
    assert lse.dtype == torch.float32
    return out.cpu(), lse.cpu()


def assert_same(
    got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], out_tolerance: float, lse_tolerance: float
) -> None:
    torch.testing.assert_close(got[0].double(), expected[0].double(), atol=out_tolerance, rtol=out_tolerance)
    torch.testing.assert_close(got[1].double(), expected[1].double(), atol=lse_tolerance, rtol=lse_tolerance)


CASES = {
    "chunk-ragged": Case((29,), chunk=21, queries_per_row=8, density=0.6),
    "chunk-first": Case((23,), chunk=23, queries_per_row=8, density=0.7),
    "chunk-blocks": Case((90,), chunk=70, queries_per_row=64, heads=(6, 2), page_size=16, density=0.6),
    "chunk-per-query-head": Case((37,), chunk=19, queries_per_row=8, heads=(6, 2), density=0.5, per_query_head=True),
    "chunk-window": Case((61,), chunk=30, queries_per_row=16, window=11, density=0.8),
    "chunk-window-of-one": Case((13,), chunk=9, queries_per_row=8, window=1),
    "chunk-large-pages": Case((140,), chunk=10, queries_per_row=8, heads=(2, 1), page_size=128),
    "decode-ragged": Case((1, 7, 64, 33), density=0.5),
    "decode-group-of-3": Case((9, 18), heads=(9, 3), head_dim=64, density=0.8),
    "decode-per-query-head": Case((50, 31), heads=(8, 2), density=0.4, per_query_head=True),
    "decode-window": Case((70, 12, 3), window=9, density=0.9),
    "decode-pieces": Case((530, 3), heads=(1, 1), page_size=64),
    "decode-pages-of-one": Case((9, 5), page_size=1, density=0.7),
    "pages-of-six": Case((40,), chunk=21, queries_per_row=12, page_size=6, density=0.7),
    "chunk-whole-tiles": Case((330,), chunk=70, queries_per_row=32, page_size=16, density=0.8),
    "chunk-whole-tiles-window": Case((330,), chunk=70, queries_per_row=32, page_size=16, window=200, density=0.9),
    "decode-whole-tiles": Case((300, 129, 64), page_size=16, density=0.8),
    "decode-whole-tiles-window": Case((300, 129, 64), page_size=16, window=150, density=0.9),
    "head-dim-8": Case((20,), chunk=20, queries_per_row=16, head_dim=8),
    "head-dim-40": Case((17, 21), head_dim=40, density=0.7),
    "head-dim-200": Case((12,), chunk=5, queries_per_row=4, heads=(2, 2), head_dim=200),
    "head-dim-256": Case((12, 9), heads=(2, 1), head_dim=256),
}


@pytest.mark.parametrize(("dtype", "out_tolerance", "lse_tolerance"), DTYPES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_triton_equals_native_equals_reference(
    case: Case, dtype: torch.dtype, out_tolerance: float, lse_tolerance: float
) -> None:
    problem = make_problem(case, dtype)
    reference = run("reference", problem)
    assert_same(reference, written_out(problem), out_tolerance, lse_tolerance)
    for backend in (name for name, there in TWINS.items() if there):
        assert_same(run(backend, problem), reference, out_tolerance, lse_tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "out_tolerance", "lse_tolerance"), DTYPES)
@pytest.mark.parametrize(("heads", "page_size"), [((3, 3), 8), ((4, 1), 8), ((4, 2), 16)], ids=["mha", "mqa", "gqa"])
def test_every_page_is_dense_attention_around_page_borders(
    backend: Backend,
    dtype: torch.dtype,
    out_tolerance: float,
    lse_tolerance: float,
    heads: tuple[int, int],
    page_size: int,
) -> None:
    for length in (1, page_size - 1, page_size, page_size + 1):
        case = Case((length,), chunk=length, queries_per_row=page_size, heads=heads, page_size=page_size)
        problem = make_problem(case, dtype)
        got = run(backend, problem)
        assert_same(got, dense_attention(problem), out_tolerance, lse_tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("queries_per_row", [1, 8])
def test_a_row_that_sees_nothing_is_zero_with_lse_minus_infinity(backend: Backend, queries_per_row: int) -> None:
    problem = make_problem(Case((12,), chunk=8, queries_per_row=queries_per_row), torch.float32)
    pages = problem.pages.clone()
    pages[0] = -1
    out, lse = run(backend, replace(problem, pages=pages))
    assert torch.equal(out[:queries_per_row], torch.zeros_like(out[:queries_per_row]))
    assert lse[:queries_per_row].isneginf().all()
    assert lse[queries_per_row:].isfinite().all()
    out, lse = run(backend, replace(problem, pages=pages[..., :0]))
    assert torch.equal(out, torch.zeros_like(out))
    assert lse.isneginf().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["chunk-ragged", "chunk-window", "decode-ragged", "chunk-whole-tiles-window"])
def test_what_no_query_sees_changes_no_bit(backend: Backend, name: str) -> None:
    poisoned = make_problem(CASES[name], torch.bfloat16)
    clean = replace(poisoned, k=poisoned.k.nan_to_num(nan=3.0), v=poisoned.v.nan_to_num(nan=-2.0))
    for got, expected in zip(run(backend, poisoned), run(backend, clean), strict=True):
        assert torch.equal(got, expected)
        assert not got.isnan().any()


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend.values != ("reference",)])
@pytest.mark.parametrize("name", ["chunk-ragged", "decode-ragged", "decode-pieces", "decode-whole-tiles"])
def test_neither_padding_nor_company_changes_a_bit(backend: Backend, name: str) -> None:
    problem = make_problem(CASES[name], torch.float32)
    out, lse = run(backend, problem)
    padded = run(backend, replace(problem, pages=torch.nn.functional.pad(problem.pages, (0, 40), value=-1)))
    assert torch.equal(out, padded[0])
    assert torch.equal(lse, padded[1])
    for row in range(len(problem.starts)):
        here = slice(row * problem.queries_per_row, (row + 1) * problem.queries_per_row)
        alone = replace(
            problem,
            q=problem.q[here],
            frames=problem.frames[row : row + 1],
            pages=problem.pages[row : row + 1, :, : int((problem.pages[row] >= 0).sum(-1).max())],
            starts=problem.starts[row : row + 1],
        )
        got = run(backend, alone)
        assert torch.equal(out[here], got[0])
        assert torch.equal(lse[here], got[1])


@pytest.mark.skipif(not TWINS["triton"], reason="not built")
def test_any_number_of_pieces_merges_to_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("keysift.attention.ops.paged_attention.triton"), "PIECE_TOKENS", 4)
    problem = make_problem(Case((140, 7), heads=(4, 1)), torch.float32)  # 35 pieces, 33 of the second empty
    assert_same(run("triton", problem), written_out(problem), 1e-5, 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["chunk-first", "decode-ragged", "decode-pieces"])
def test_disjoint_selections_merge_by_their_lse_to_their_union(backend: Backend, name: str) -> None:
    union = make_problem(CASES[name], torch.float32)
    side = torch.rand(union.pages.shape) < 0.5
    parts = [replace(union, pages=keep(union.pages, mask)) for mask in (side, ~side)]
    (out_a, lse_a), (out_b, lse_b) = (run(backend, part) for part in parts)
    lse = torch.logaddexp(lse_a, lse_b)
    share_a, share_b = ((part - lse).exp().nan_to_num(0.0)[..., None] for part in (lse_a, lse_b))
    assert_same((out_a * share_a + out_b * share_b, lse), run(backend, union), 1e-5, 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore:All-NaN slice")  # numpy, inside the interpreter
@pytest.mark.parametrize("name", ["chunk-first", "decode-pieces"])
def test_a_nan_that_is_seen_is_not_hidden(backend: Backend, name: str) -> None:
    problem = make_problem(CASES[name], torch.float32)
    problem.q[0, 0] = float("nan")
    out, lse = run(backend, problem)
    assert out[0, 0].isnan().all()
    assert lse[0, 0].isnan()
    assert out[:, 1:].isfinite().all()


def test_a_twin_that_does_not_know_a_dtype_leaves_it_to_the_reference() -> None:
    problem = make_problem(CASES["decode-ragged"], torch.float64)
    assert_same(run("auto", problem), written_out(problem), 1e-5, 1e-5)
    for backend in TWINS:
        with pytest.raises(BackendUnavailable, match="paged_attention"):
            run(backend, problem)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["chunk-blocks", "decode-pieces"])
def test_the_device_is_never_waited_for(name: str) -> None:
    problem = make_problem(CASES[name], torch.bfloat16)
    expected = run("triton", problem)  # compiles
    tensors = [t.cuda() for t in (problem.q, problem.k, problem.v, problem.frames, problem.pages, problem.starts)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, lse = paged_attention(
            *tensors, queries_per_row=problem.queries_per_row, scale=problem.scale, window=problem.window
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(out.cpu(), expected[0])
    assert torch.equal(lse.cpu(), expected[1])
