"""From masses to page lists that change little: both twins against the words of the contract, and its laws."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from keysift.attention.ops.steady_pages import SteadyPages, steady_pages
from keysift.attention.ops.top_pages import top_pages
from keysift.kvcache.ops import BackendUnavailable, use_backend
from keysift.kvcache.ops.dispatch import Backend
from tests.problems import built

from .steady_problems import CASES, Case, Inputs, make_inputs, written_out
from .test_top_pages import as_lists

BUILT = built("keysift.attention.ops.steady_pages.native")
NATIVE = pytest.mark.skipif(not BUILT, reason="not built")
COMPILED = importlib.util.find_spec("triton") is not None
TRITON = pytest.mark.skipif(not COMPILED, reason="no Triton")
TWINS = [pytest.param("native", marks=NATIVE), pytest.param("triton", marks=TRITON)]
BACKENDS = pytest.mark.parametrize("backend", ["reference", *TWINS])
BOTH: tuple[Backend, ...] = ("reference", "native") if BUILT else ("reference",)


EACH_CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def run(backend: Backend, case: Case, inputs: Inputs) -> SteadyPages:
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    with use_backend(backend):
        got = steady_pages(*(each.to(device) for each in inputs), **case.options)  # type: ignore[arg-type]
    got = SteadyPages(*(each.cpu() for each in got))
    lists = (len(case.lasts), case.lists)
    assert got.pages.dtype == got.refused.dtype == torch.int32
    assert got.pages.shape == (*lists, min(case.pages, case.sinks + case.window + case.budget))
    assert got.refused.shape == (*lists, min(case.pages, case.queried, case.budget))
    assert got.read.dtype == got.bound_exceeded.dtype == torch.bool
    assert got.overlap.shape == got.bound_exceeded.shape == lists
    return got


@BACKENDS
@EACH_CASE
@pytest.mark.parametrize("seed", range(3))
def test_the_contract(case: Case, backend: Backend, seed: int) -> None:
    inputs = make_inputs(case, seed)
    got = run(backend, case, inputs)
    expected = list(written_out(case, inputs))
    assert as_lists(got.pages) == [sorted(each.chosen) for each in expected]
    assert as_lists(got.refused) == [sorted(each.refused) for each in expected]
    assert got.bound_exceeded.flatten().tolist() == [each.bound_exceeded for each in expected]
    overlap = torch.tensor([each.overlap for each in expected], dtype=torch.float64)
    torch.testing.assert_close(got.overlap.flatten().double(), overlap, equal_nan=True)
    kept = torch.stack([each.kept for each in expected]).view(got.kept.shape)
    torch.testing.assert_close(got.kept.double(), kept, atol=1e-5, rtol=1e-5)
    for row, each in zip(got.averages.flatten(0, 1), expected, strict=True):
        averages = torch.tensor(each.averages + [0.0] * (case.pages - len(each.averages)), dtype=torch.float64)
        torch.testing.assert_close(row.double(), averages, atol=1e-6, rtol=1e-5)
    listed = [row.nonzero().flatten().tolist() for row in got.read.flatten(0, 1)]
    assert listed == as_lists(got.pages)


def test_the_cases_are_what_they_are_called() -> None:
    """Else they would test nothing: some are refused, the bound_exceeded opens, the comparison ends it."""
    got = {name: run("reference", case, make_inputs(case)) for name, case in CASES.items()}
    for name in ("nothing-comes-in", "reluctant", "long"):
        assert bool((got[name].refused >= 0).any()), name
    for name in ("bound_exceeded", "nothing-is-refused"):
        assert bool(got[name].bound_exceeded.any()), name
    assert not bool((got["no-comparison"].refused >= 0).any())


@NATIVE
@EACH_CASE
def test_every_instruction_set(case: Case) -> None:
    from keysift.kvcache.native.library import isas, use_isa

    inputs = make_inputs(case)
    reference = run("reference", case, inputs)
    for isa in isas():
        with use_isa(isa):
            got = run("native", case, inputs)
        for name in ("pages", "refused", "read", "bound_exceeded"):
            assert torch.equal(getattr(got, name), getattr(reference, name)), name
        for name in ("kept", "averages", "overlap"):
            ours, theirs = getattr(got, name), getattr(reference, name)
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5, equal_nan=True)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    lasts = draw(st.lists(st.integers(0, 60), min_size=1, max_size=3))
    return Case(
        tuple(lasts),
        max(lasts) + 1 + draw(st.integers(0, 3)),
        group=draw(st.integers(1, 3)),
        sinks=draw(st.integers(0, 3)),
        window=draw(st.integers(1, 5)),
        budget=draw(st.integers(0, 16)),
        queried=draw(st.integers(0, 20)),
        most=draw(st.integers(-1, 6)),
        factor=draw(st.sampled_from([0.0, 1.0, 1.25])),
        epsilon=draw(st.sampled_from([0.0, 0.01, 0.1, 1.0])),
        steps=draw(st.sampled_from([0.0, 0.5])),
        residents=draw(st.sampled_from([0.0, 0.5, 1.0])),
    )


@settings(max_examples=150)
@given(case=cases(), seed=st.integers(0, 99))
def test_the_laws(case: Case, seed: int) -> None:
    """Bounds of a list, of its changes and of its refusals; chosen and refused pages are disjoint."""
    for backend in BOTH:
        check_laws(backend, case, make_inputs(case, seed))


@TRITON
@settings(max_examples=20)
@given(case=cases(), seed=st.integers(0, 99))
def test_the_laws_of_the_kernel(case: Case, seed: int) -> None:
    check_laws("triton", case, make_inputs(case, seed))


def check_laws(backend: Backend, case: Case, inputs: Inputs) -> None:
    known, read = inputs[3], inputs[4]
    got = run(backend, case, inputs)
    lists, refused = as_lists(got.pages), as_lists(got.refused)
    for number, (pages, rest) in enumerate(zip(lists, refused, strict=True)):
        row, index = divmod(number, case.lists)
        last, first = case.lasts[row], int(case.firsts[row])
        forced = {page for page in range(last + 1) if page < case.sinks or page >= first}
        assert forced <= set(pages) <= set(range(last + 1))
        assert len(set(pages) - forced) <= case.budget
        assert not set(rest) & set(pages)
        assert all(page < first for page in rest), "only full pages stand in by their means"
        if not known[row]:
            assert not rest
            assert not got.bound_exceeded[row, index]
            continue
        new = len(set(pages) - set(read[row, index].nonzero().flatten().tolist()))
        if case.most >= 0 and not got.bound_exceeded[row, index]:
            assert new <= case.most + 1, "those that came in, and the row's own page"
            assert float(got.overlap[row, index]) >= 1 - (case.most + 1) / len(pages) - 1e-6
        shares = inputs[0][row, index * case.group : (index + 1) * case.group, : last + 1].softmax(-1).mean(0)
        assert float(shares[rest].sum()) <= case.epsilon + 1e-6


@BACKENDS
@pytest.mark.parametrize("name", ["ragged", "group-of-8", "equal-pages", "long", "room"])
def test_without_bound_and_comparison_it_takes_the_heaviest(backend: Backend, name: str) -> None:
    """Whatever the token before has read, as `top_pages` does with a fixed budget."""
    case = replace(CASES[name], most=-1, factor=0.0, queried=10**6)
    masses, *rest = make_inputs(case)
    inputs = (masses.masked_fill(masses.isneginf(), 1.0), *rest)  # residents without a share stay while there is room
    got = run(backend, case, inputs)  # type: ignore[arg-type]
    zones = {"heads": case.lists, "sinks": case.sinks, "window": case.window}
    with use_backend(backend):
        top = top_pages(*inputs[:3], **zones, budget=case.budget, epsilon=0.0)
    assert torch.equal(got.pages, top.pages)
    torch.testing.assert_close(got.kept, top.kept)
    assert not bool((got.refused >= 0).any())


@BACKENDS
@pytest.mark.parametrize("value", [-torch.inf, torch.nan])
def test_a_head_without_a_share(backend: Backend, value: float) -> None:
    """Such a head queries nothing; if no head has any share, residents stay."""
    case = Case((99, 33), 100, group=4)
    inputs = make_inputs(case)
    inputs[0][:, :5] = value
    got = run(backend, case, inputs)
    expected = list(written_out(case, inputs))
    assert as_lists(got.pages) == [sorted(each.chosen) for each in expected]
    assert not got.kept[:, :5].any()
    between = inputs[4][0, 0, case.sinks : case.firsts[0]]
    assert int(between.sum()) == case.budget + 1, "one has left the window"
    assert int((got.pages[0, 0] >= 0).sum()) == case.sinks + case.window + case.budget


@pytest.mark.parametrize("backend", TWINS)
@pytest.mark.parametrize("name", ["ragged", "equal-pages", "long"])
def test_neither_company_nor_spare_pages_nor_threads_change_a_bit(
    name: str, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    inputs = make_inputs(case)
    together = run(backend, case, inputs)
    for row, last in enumerate(case.lasts):
        alone = replace(case, lasts=(last,), pages=last + 1)
        if backend == "native":
            monkeypatch.setattr("keysift.attention.ops.steady_pages.native.num_threads", lambda row=row: row + 1)
        mine = [tensor[row : row + 1] for tensor in inputs]
        cut = (mine[0][..., : last + 1], *mine[1:4], mine[4][..., : last + 1], mine[5][..., : last + 1])
        got = run(backend, alone, tuple(tensor.contiguous() for tensor in cut))  # type: ignore[arg-type]
        assert torch.equal(got.kept[0], together.kept[row])
        assert torch.equal(got.averages[0], together.averages[row, :, : last + 1])
        assert as_lists(got.pages) == as_lists(together.pages[row : row + 1])
        assert as_lists(got.refused) == as_lists(together.refused[row : row + 1])


@BACKENDS
@pytest.mark.parametrize("name", ["ragged", "bound_exceeded", "equal-pages"])
def test_pages_after_the_rows_own_change_nothing(backend: Backend, name: str) -> None:
    """Whatever memory holds there."""
    case = CASES[name]
    masses, firsts, lasts, known, read, averages = make_inputs(case)
    unseen = torch.arange(case.pages) > lasts[:, None, None]
    dirty = masses, firsts, lasts, known, read | unseen, averages.masked_fill(unseen, torch.nan)
    for got, clean in zip(run(backend, case, dirty), run(backend, case, make_inputs(case)), strict=True):
        torch.testing.assert_close(got, clean, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", TWINS)
def test_what_a_twin_cannot_do_is_left_to_the_reference(backend: Backend) -> None:
    case = CASES["ragged"]
    masses, *rest, averages = make_inputs(case)
    for odd in ((masses.double(), *rest, averages), (masses, *rest, averages.double())):
        with pytest.raises(BackendUnavailable, match="steady_pages"):
            run(backend, case, odd)


@TRITON
@pytest.mark.parametrize("pages", [8192, 8193])
def test_as_many_pages_as_a_program_holds_and_one_more(pages: int) -> None:
    case = Case((pages - 1, 4000), pages, lists=1, group=2, budget=64, queried=32, most=4, epsilon=0.02)
    inputs = make_inputs(case)
    got, expected = run("triton", case, inputs), run("reference", case, inputs)
    for name in ("pages", "refused", "read", "bound_exceeded"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name
    larger = replace(case, pages=8193, budget=1100)
    with pytest.raises(BackendUnavailable, match="steady_pages"):
        run("triton", larger, make_inputs(larger))


LONG = Case((599, 300, 80, 512), 600)
PIECES = {
    "three": LONG,
    "group-of-8": replace(LONG, group=8, lists=1),
    "equal-pages": replace(LONG, steps=1.0, factor=1.0),
    "bound_exceeded": replace(LONG, most=1, epsilon=0.02),
    "any-number-comes-in": replace(LONG, most=-1, factor=0.0, epsilon=1.0),
    "no-budget": replace(LONG, budget=0),
    "nothing-queried": replace(LONG, queried=0),
    "no-sinks": replace(LONG, sinks=0),
    "room": replace(LONG, residents=0.5),
    "no-memory": replace(LONG, keep=0.0),
    "one-peak": replace(LONG, spread=30.0),
    "a-window-over-two": Case((258, 255, 256), 300, window=6),
    "all-that-fits": Case((511, 300), 512, budget=27, queried=20, most=9),
}


@TRITON
@pytest.mark.parametrize("case", PIECES.values(), ids=PIECES.keys())
@pytest.mark.parametrize("seed", range(2))
def test_a_list_in_pieces_has_the_bits_of_a_whole_one(case: Case, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With programs that hold 256 pages; a head has no share of one list, and no head any of another."""
    inputs = make_inputs(case, seed)
    inputs[0][0, 1], inputs[0][1, : case.group] = torch.nan, -torch.inf
    whole, expected = (run(backend, case, inputs) for backend in ("triton", "reference"))
    monkeypatch.setattr("keysift.kvcache.ops.heaviest.triton.MAX_PAGES", 256)
    pieces = run("triton", case, inputs)
    assert torch.equal(pieces.pages, expected.pages)
    assert torch.equal(pieces.refused, expected.refused)
    for name, mine, other in zip(pieces._fields, pieces, whole, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0, equal_nan=True, msg=name)
