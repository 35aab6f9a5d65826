"""Launches of the Triton twin of `column_scores`: pieces, the bound of its scratch memory, unsupported calls."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module

import pytest
import torch

from keysift.attention.ops import ColumnScores, column_scores
from keysift.kvcache.ops import BackendUnavailable

from .score_problems import CASES, SHORT, Case, Problem, assert_equal, assert_same, make_problem, run

pytest.importorskip("triton")
TWIN = "keysift.attention.ops.column_scores.triton"


@pytest.mark.parametrize("tokens", [32, 128, 1024])
def test_any_number_of_pieces_joins_to_the_whole(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    monkeypatch.setattr(import_module(TWIN), "PIECE_TOKENS", tokens)
    problem = make_problem(Case(((0, (549, 31, 32)), (1, (3, -1, 40)))), torch.bfloat16)
    assert_same(run("triton", problem), run("reference", problem))


@pytest.mark.parametrize("probes", [0, 3])
def test_a_bound_on_the_scratch_changes_no_bit(monkeypatch: pytest.MonkeyPatch, probes: int) -> None:
    problem = make_problem(CASES["ragged"], torch.bfloat16)
    whole = run("triton", problem)
    per_probe = problem.queries_per_probe * problem.q.shape[1] * 2 * problem.frames.shape[2] * 4
    monkeypatch.setattr(import_module(TWIN), "HALVES_BYTES", probes * per_probe)  # none at all: one key head at a time
    assert_equal(run("triton", problem), whole)


def test_no_queries_for_each_probe_and_no_pages() -> None:
    problem = make_problem(CASES["absent"], torch.float32)
    nowhere = replace(problem, frames=problem.frames[..., :0], positions=torch.full_like(problem.positions, -1))
    assert run("triton", nowhere).mass.shape == (2, 2, 0)
    none = replace(problem, q=problem.q[:0], positions=problem.positions[:0], queries_per_probe=0)
    assert all(part is not None and not part.any() for part in run("triton", none))


def test_a_head_dim_that_native_refuses() -> None:
    problem = make_problem(Case(SHORT, head_dim=20), torch.float32)
    assert_same(run("triton", problem), run("reference", problem))


def refused() -> dict[str, Problem]:
    problem = make_problem(CASES["one-token"], torch.float32)
    apart = problem.k.repeat_interleave(2, -1)[..., ::2]
    return {
        "two dtypes": replace(problem, q=problem.q.bfloat16()),
        "a dtype without kernels": make_problem(CASES["one-token"], torch.float64),
        "too large a head": make_problem(Case(((0, (0,)),), head_dim=264), torch.float32),
        "values of a key apart": replace(problem, k=apart),
    }


@pytest.mark.parametrize("why", ["two dtypes", "a dtype without kernels", "too large a head", "values of a key apart"])
def test_calls_that_the_twin_cannot_do_are_refused(why: str) -> None:
    with pytest.raises(BackendUnavailable, match="column_scores"):
        run("triton", refused()[why])


@pytest.mark.gpu
def test_the_device_is_never_waited_for() -> None:
    problem = make_problem(CASES["group-of-3"], torch.bfloat16)
    expected = run("triton", problem)  # compiles
    tensors = [tensor.cuda() for tensor in (problem.q, problem.k, problem.frames, problem.positions)]
    numbers = {"queries_per_probe": problem.queries_per_probe, "scale": problem.q.shape[2] ** -0.5}
    torch.cuda.set_sync_debug_mode("error")
    try:
        scores = column_scores(*tensors, **numbers, bands=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_equal(ColumnScores(*(part.cpu() for part in scores if part is not None)), expected)
