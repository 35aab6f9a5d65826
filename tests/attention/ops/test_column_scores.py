"""`column_scores`: the twins against the reference, and all of them against the definition in fp64."""

from __future__ import annotations

import itertools
from dataclasses import replace
from importlib import import_module

import pytest
import torch

from keysift.attention.ops import ColumnScores
from keysift.kvcache.ops import BackendUnavailable
from keysift.kvcache.ops.dispatch import Backend

from .score_problems import (
    CASES,
    DTYPES,
    EACH_CASE,
    RAGGED,
    TWINS,
    Case,
    Problem,
    assert_equal,
    assert_same,
    each,
    make_problem,
    only,
    run,
    twins,
    written_out,
)

NATIVE = pytest.mark.skipif(not TWINS["native"], reason="not built")


@pytest.fixture(autouse=True)
def _short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces so short that what the interpreter can afford has several."""
    if TWINS["triton"]:
        monkeypatch.setattr(import_module("keysift.attention.ops.column_scores.triton"), "PIECE_TOKENS", 64)


@DTYPES
@EACH_CASE
def test_triton_equals_native_equals_reference(case: Case, dtype: torch.dtype) -> None:
    problem = make_problem(case, dtype)
    reference = run("reference", problem)
    assert_same(reference, written_out(problem))
    for backend in twins(case):
        assert_same(run(backend, problem), reference)


@each("pieces", "short-pieces", "group-of-3", "pages-of-24", "pages-of-1100")
def test_the_masses_do_not_depend_on_whether_bands_are_wanted(backend: Backend, case: Case) -> None:
    problem = make_problem(case, torch.bfloat16)
    assert_same(run(backend, problem, bands=False), run(backend, problem))


@each("prompt-blocks", "prompt-start", "absent", "pieces", "pages-of-1", "pages-of-24", "pages-of-100")
def test_masses_are_shares(backend: Backend, case: Case) -> None:
    problem = make_problem(case, torch.bfloat16)
    mass, peak, bands = run(backend, problem)
    assert bands is not None
    last = problem.lasts[:, None]
    for shares in (mass, bands):
        assert shares.min() >= 0
        torch.testing.assert_close(shares.sum(-1), (last >= 0).float().expand(shares.shape[:2]))
    assert (peak >= mass - 1e-6).all()
    assert peak.max() <= 1 + 1e-6
    unseen = torch.arange(mass.shape[2]) * case.page_size > last[..., None]
    assert not any(part.masked_select(unseen).any() for part in (mass, peak, bands))


@each("ragged", "prompt-blocks", "absent", "pages-of-24", "pages-of-100")
def test_what_no_query_sees_changes_no_bit(backend: Backend, case: Case) -> None:
    poisoned = make_problem(case, torch.bfloat16)
    got = run(backend, poisoned)
    assert not any(part is None or part.isnan().any() for part in got)
    assert_equal(got, run(backend, replace(poisoned, q=poisoned.q.nan_to_num(2.0), k=poisoned.k.nan_to_num(3.0))))


@DTYPES
@each("pieces", "short-pieces")
@pytest.mark.parametrize("spread", [0.0, 30.0, 600.0])
def test_any_magnitude_of_logits(backend: Backend, case: Case, dtype: torch.dtype, spread: float) -> None:
    problem = make_problem(replace(case, spread=spread), dtype)
    assert_same(run(backend, problem), written_out(problem), 2e-6 * max(1.0, spread))


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # numpy, inside the interpreter
@each("pieces", "short-pieces")
def test_a_nan_that_is_seen_is_not_hidden(backend: Backend, case: Case) -> None:
    problem = make_problem(case, torch.float32)
    problem.q[1, 0] = float("nan")
    for part in run(backend, problem):
        assert part is not None
        assert part[0, 0, : int(problem.positions[1]) // case.page_size + 1].isnan().all()
        assert part[:, 1].isfinite().all()
        assert part[1].isfinite().all()


@each("ragged", "one-token")
def test_no_probe_and_no_query(backend: Backend, case: Case) -> None:
    problem = make_problem(case, torch.float32)
    absent = run(backend, replace(problem, positions=torch.full_like(problem.positions, -1)))
    assert not any(part is None or part.any() for part in absent)
    nothing = replace(problem, q=problem.q[:0], frames=problem.frames[:0], positions=problem.positions[:0])
    assert run(backend, nothing).mass.shape == (0, *absent.mass.shape[1:])


@each("ragged", "prompt-blocks", "pieces", "short-pieces", "pages-of-24", backends=tuple(TWINS))
def test_neither_company_nor_spare_pages_change_a_bit(backend: Backend, case: Case) -> None:
    problem = make_problem(case, torch.float32)
    together = run(backend, problem)
    for probe in range(len(problem.frames)):
        alone = only(problem, probe)
        pages = alone.frames.shape[2]
        assert_equal(
            run(backend, alone),
            ColumnScores(*(part[probe : probe + 1, :, :pages] for part in together if part is not None)),
        )


def test_what_a_twin_cannot_do_is_left_to_the_reference() -> None:
    problem = make_problem(CASES["ragged"], torch.float64)
    assert_same(run("auto", problem), written_out(problem))
    for backend in TWINS:
        with pytest.raises(BackendUnavailable, match="column_scores"):
            run(backend, problem)


@NATIVE
@DTYPES
@EACH_CASE
def test_every_instruction_set(case: Case, dtype: torch.dtype) -> None:
    from keysift.kvcache.native.library import isas, use_isa

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
        native = import_module("keysift.attention.ops.column_scores.native")
        monkeypatch.setattr(native, "num_threads", lambda count=count: count)
        got.append(run("native", problem))
        assert_equal(got[-1], got[0])


def many_sums(one_table: bool) -> Problem:
    """Two probes over pages of one token: 160 rows of two times 40 000 sums, of which 102 are kept at once."""
    length, m = 40_000, 40
    frames = torch.arange(length, dtype=torch.int32).expand(2, 1, length)
    positions = torch.randint(length // 2, length, (2, m)).sort().values
    positions[:, -1] = length - 1
    return Problem(
        q=torch.randn(2 * m, 2, 8),
        k=torch.randn(length, 1, 1, 8),
        frames=frames if one_table else torch.stack((frames[0], frames[1].flip(-1))),
        positions=positions.flatten().int(),
        queries_per_probe=m,
        keys=[],
    )


@NATIVE
@pytest.mark.parametrize("one_table", [True, False], ids=["one-sequence", "two-sequences"])
def test_more_sums_than_are_kept_at_once(one_table: bool) -> None:
    problem = many_sums(one_table)
    together = run("native", problem)
    assert_same(together, run("reference", problem), 1e-7)
    for probe in range(2):
        expected = ColumnScores(*(part[probe : probe + 1] for part in together if part is not None))
        assert_equal(run("native", only(problem, probe)), expected)


@NATIVE
def test_native_refuses_odd_calls() -> None:
    problem = make_problem(CASES["ragged"], torch.float32)
    odd_dim = make_problem(Case(RAGGED, head_dim=20), torch.float32)
    for other in (odd_dim, replace(problem, q=problem.q.bfloat16()), replace(problem, frames=problem.frames.long())):
        with pytest.raises(BackendUnavailable, match="column_scores"):
            run("native", other)
