"""The Triton twin of `column_scores` against the reference: in Triton's interpreter where there is no GPU."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from keysift.attention.ops import ColumnScores, column_scores
from keysift.kvcache.ops import BackendUnavailable, use_backend
from keysift.kvcache.ops.dispatch import Backend

pytest.importorskip("triton")
TWIN = "keysift.attention.ops.column_scores_triton"
TOLERANCE = 2e-6  # products of 16-bit numbers are exact in fp32: no dtype needs more
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@dataclass(frozen=True)
class Case:
    """Probes of as many queries each, at these positions of their own sequences of `pages` pages; -1: no query."""

    positions: tuple[tuple[int, ...], ...]
    pages: int
    page_size: int = 4
    heads: tuple[int, int] = (4, 2)
    head_dim: int = 16
    one_table: bool = False


@dataclass
class Call:
    """The arguments of the op."""

    q: Tensor  # [B * m, Hq, D]
    k: Tensor  # [N, Hkv, S, D]
    frames: Tensor  # [B, Hkv, F]
    positions: Tensor  # [B * m]
    queries_per_probe: int


CASES = {
    "one-token": Case(((0,),), pages=1),
    "ragged": Case(((9, 10, 11, 12, 13), (2, 3, -1, -1, -1), (-1, 20, 7, 30, 31)), pages=9),
    "shared-table": Case(((5, 6, 7), (14, 15, -1)), pages=4, one_table=True),
    "nobody": Case(((-1, -1), (3, 2)), pages=2),
    "group-of-3": Case((tuple(range(70, 90)),), pages=6, page_size=16, heads=(6, 2), head_dim=40),
    "wide-group": Case(((11, -1),), pages=3, heads=(71, 1)),
    "many-tiles": Case((tuple(range(3, 90, 4)),), pages=6, page_size=16, heads=(4, 1), head_dim=24),
    "pages-of-one": Case(((30, 4, 9), (12, 13, 14)), pages=31, page_size=1, heads=(3, 3)),
    "pages-of-six": Case(((28, 29, 30), (5, 6, 40)), pages=7, page_size=6),
    "pages-of-130": Case(((259, 129, 130, 131), (3, 128, 258, -1)), pages=2, page_size=130, heads=(2, 1)),
    "head-dim-200": Case(((18, 19), (3, 4)), pages=5, heads=(4, 2), head_dim=200),
    "head-dim-256": Case(((18,),), pages=2, page_size=16, heads=(2, 1), head_dim=256),
}


def make_call(case: Case, dtype: torch.dtype) -> Call:
    """Scattered frames that hold NaN where no query looks; so do the queries that are not there."""
    probes, heads = len(case.positions), case.heads[1]
    tables, width = 1 if case.one_table else probes, case.pages * case.page_size
    order = torch.stack([torch.randperm(tables * case.pages) for _ in range(heads)])
    table = order.view(heads, tables, case.pages).transpose(0, 1)
    positions = torch.tensor(case.positions, dtype=torch.int32)
    last = positions.amax(1) if not case.one_table else positions.max()[None]
    keys = torch.randn(tables, heads, width, case.head_dim)
    keys[(torch.arange(width) > last[:, None])[:, None].expand(-1, heads, -1)] = torch.nan
    k = torch.full((tables * case.pages + 2, heads, case.page_size, case.head_dim), torch.nan)
    k[table, torch.arange(heads)[:, None]] = keys.unflatten(2, (case.pages, -1))
    packed = torch.randn(positions.numel(), case.heads[0] + heads, case.head_dim)
    packed[positions.flatten() < 0] = torch.nan
    q = packed.to(dtype)[:, : case.heads[0]]  # as a slice of a fused projection
    frames = table.int().expand(probes, -1, -1)
    return Call(q, k.to(dtype), frames, positions.flatten(), positions.shape[1])


def run(backend: Backend, call: Call, bands: bool = True) -> ColumnScores:
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    tensors = (call.q, call.k, call.frames, call.positions)
    with use_backend(backend):
        scores = column_scores(
            *(tensor.to(device) for tensor in tensors),
            queries_per_probe=call.queries_per_probe,
            scale=call.q.shape[2] ** -0.5,
            bands=bands,
        )
    return ColumnScores(scores.mass.cpu(), scores.peak.cpu(), None if scores.bands is None else scores.bands.cpu())


def assert_same(got: ColumnScores, expected: ColumnScores, tolerance: float = 0.0) -> None:
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


def pad(call: Call, pages: int) -> Call:
    """The same probes with a wider table, whose new pages are NaN."""
    frames = torch.nn.functional.pad(call.frames, (0, pages), value=call.k.shape[0] - 1)
    return Call(call.q, call.k, frames, call.positions, call.queries_per_probe)


def only(call: Call, probe: int) -> Call:
    queries = slice(probe * call.queries_per_probe, (probe + 1) * call.queries_per_probe)
    frames = call.frames[probe : probe + 1]
    return Call(call.q[queries], call.k, frames, call.positions[queries], call.queries_per_probe)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_twin_equals_the_reference(case: Case, dtype: torch.dtype) -> None:
    call = make_call(case, dtype)
    assert_same(run("triton", call), run("reference", call), TOLERANCE)


@pytest.mark.parametrize("name", ["ragged", "nobody", "pages-of-six", "group-of-3"])
def test_masses_and_bands_sum_to_one_for_each_probe_with_a_query(name: str) -> None:
    scores = run("triton", make_call(CASES[name], torch.bfloat16))
    assert scores.bands is not None
    there = (torch.tensor(CASES[name].positions) >= 0).any(1).float()[:, None].expand(-1, scores.mass.shape[1])
    torch.testing.assert_close(scores.mass.sum(-1), there, atol=1e-5, rtol=0.0)
    torch.testing.assert_close(scores.bands.sum(-1), there, atol=1e-5, rtol=0.0)


def test_the_masses_do_not_depend_on_whether_bands_are_wanted() -> None:
    call = make_call(CASES["ragged"], torch.float32)
    mass, peak, bands = run("triton", call, bands=False)
    assert bands is None
    assert_same(ColumnScores(mass, peak, None), run("triton", call)._replace(bands=None))


def test_any_number_of_pieces_joins_to_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{TWIN}.PIECE_TOKENS", 32)
    call = make_call(Case(((549, 31, 32), (3, -1, 40)), pages=138, heads=(2, 1)), torch.float32)
    assert_same(run("triton", call), run("reference", call), TOLERANCE)


@pytest.mark.parametrize("probes", [0, 2])
def test_a_bound_on_the_scratch_changes_no_bit(monkeypatch: pytest.MonkeyPatch, probes: int) -> None:
    call = make_call(CASES["ragged"], torch.float32)
    whole = run("triton", call)
    per_probe = call.queries_per_probe * call.q.shape[1] * 2 * call.frames.shape[2] * 4
    monkeypatch.setattr(f"{TWIN}.HALVES_BYTES", probes * per_probe)  # none at all: one key head at a time
    assert_same(run("triton", call), whole)


@pytest.mark.parametrize("name", ["ragged", "pages-of-130", "group-of-3"])
def test_what_no_query_sees_changes_no_bit(name: str) -> None:
    call = make_call(CASES[name], torch.bfloat16)
    clean = Call(call.q.nan_to_num(2.0), call.k.nan_to_num(3.0), call.frames, call.positions, call.queries_per_probe)
    scores = run("triton", call)
    assert all(part is not None and part.isfinite().all() for part in scores)
    assert_same(scores, run("triton", clean))


def test_neither_padding_nor_company_changes_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{TWIN}.PIECE_TOKENS", 16)
    call = make_call(CASES["ragged"], torch.float32)
    scores, padded = run("triton", call), run("triton", pad(call, 20))
    pages = call.frames.shape[2]
    assert_same(ColumnScores(*(part[..., :pages] for part in padded if part is not None)), scores)
    assert all(part is not None and not part[..., pages:].any() for part in padded)
    for probe in range(len(call.frames)):
        alone = run("triton", only(call, probe))
        assert_same(alone, ColumnScores(*(part[probe : probe + 1] for part in scores if part is not None)))


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # numpy, inside the interpreter
def test_a_nan_that_is_seen_is_not_hidden() -> None:
    call = make_call(CASES["ragged"], torch.float32)
    call.q[1, 2] = torch.nan  # of the first probe, at position 10: pages 0 to 2
    mass, peak, bands = run("triton", call)
    assert bands is not None
    for part in (mass, peak, bands):
        assert part[0, 2, :3].isnan().all()
        assert part[0, [0, 1, 3]].isfinite().all()
        assert part[1:].isfinite().all()


def test_no_queries_and_no_pages_give_empty_or_zero_scores() -> None:
    call = make_call(CASES["nobody"], torch.float32)
    none = Call(call.q[:0], call.k, call.frames, call.positions[:0], 0)
    assert all(part is not None and not part.any() for part in run("triton", none))
    nowhere = Call(call.q, call.k, call.frames[..., :0], torch.full_like(call.positions, -1), 2)
    assert run("triton", nowhere).mass.shape == (2, 4, 0)


def test_a_dtype_that_the_twin_does_not_know_is_refused() -> None:
    with pytest.raises(BackendUnavailable, match="column_scores"):
        run("triton", make_call(CASES["one-token"], torch.float64))


@pytest.mark.gpu
def test_the_device_is_never_waited_for() -> None:
    call = make_call(CASES["group-of-3"], torch.bfloat16)
    expected = run("triton", call)  # compiles
    tensors = [tensor.cuda() for tensor in (call.q, call.k, call.frames, call.positions)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        scores = column_scores(
            *tensors, queries_per_probe=call.queries_per_probe, scale=call.q.shape[2] ** -0.5, bands=True
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same(ColumnScores(*(part.cpu() for part in scores if part is not None)), expected)
